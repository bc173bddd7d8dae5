"""The adjoints of a run as a user asks for them: one for the whole network, or entries that name stages.

pc   auto,layer3=euler   layer1=pc:anchors=10,layer3=checkpoint:bits=4   heun,1=multistep
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import UsageError
from ..network.model import OdeResNet
from ..network.outside import STEM
from ..ode import Adjoint
from .adjoint_choice import AUTO, NAMES, AdjointChoice, parse_adjoint, parse_adjoints

REST = ""  # the entry that names no stage


@dataclass(frozen=True)
class AdjointsByStage:
    """An adjoint for every part of a network, each fixed or to be chosen.

    entries: what the user wrote after a stage's name or place, by that; under `REST` what names no stage.
    choices: what the entries say. Parts that no entry names, the stem among them, go by `REST`; by 'auto' without it.
    """

    entries: Mapping[str, str]
    choices: Mapping[str, AdjointChoice]

    def of(self, stage: str) -> AdjointChoice:
        """What a stage goes by, once stages are named as the model names them."""
        return self.choices.get(stage, self.rest)

    @property
    def rest(self) -> AdjointChoice:
        return self.choices.get(REST, AdjointChoice(AUTO, None))

    @property
    def names_stages(self) -> bool:
        return any(name != REST for name in self.entries)

    @property
    def chooses(self) -> bool:
        """Whether anything is to be chosen."""
        return self.to_choose is not None

    @property
    def to_choose(self) -> AdjointChoice | None:
        """What the parts that are to be chosen go by; None where every part has a method of its own."""
        return next((choice for choice in (self.rest, *self.choices.values()) if choice.fixed is None), None)

    def fixed(self, model: OdeResNet) -> dict[str, Adjoint]:
        """The adjoints that are not to be chosen, as `model.use_adjoint` takes them."""
        asked = {STEM: self.rest, **{name: self.of(name) for name in model.stages}}
        return {part: choice.fixed for part, choice in asked.items() if choice.fixed is not None}

    def with_names(self, model: OdeResNet) -> AdjointsByStage:
        """The same with each stage by its name, in the model's order.

        Raises UsageError for a stage that the model does not have, and for one that two entries name.
        """
        places = {name: place for place, name in enumerate((REST, *model.stages))}
        names = {given: given if given == REST else next(iter(model.pick([given]))) for given in self.entries}
        order = sorted(names, key=lambda given: places[names[given]])
        for first, second in pairwise(order):
            if names[first] == names[second]:
                raise UsageError(f"adjoint: stage {names[first]} is given twice, as {first} and as {second}")
        return AdjointsByStage(
            {names[given]: self.entries[given] for given in order},
            {names[given]: self.choices[given] for given in order},
        )

    @property
    def text(self) -> str:
        """As a user may write it."""
        return ",".join(f"{name}={entry}" if name != REST else entry for name, entry in self.entries.items())


def parse_adjoints_by_stage(text: str, **settings: Any) -> AdjointsByStage:
    """An adjoint, 'pc:anchors=10', or several with the stages that they are for, 'pc,layer3=euler'.

    settings: those of `parse_adjoints`, which hold for every entry that takes them and does not say otherwise.
    Raises UsageError for an entry that is there twice, and for a setting that no entry takes.
    """
    entries: dict[str, str] = {}
    for part in text.split(","):
        head, colon, own = part.partition(":")
        stage, equals, method = (word.strip() for word in head.rpartition("="))
        if equals and not stage:
            raise UsageError(f"adjoint {part.strip()!r}: write STAGE=METHOD, as in layer3=euler")
        if own.strip() in NAMES:
            raise UsageError(f"adjoint {part.strip()!r}: write {method}={own.strip()} for a stage's own method")
        if not method:
            raise UsageError(f"adjoint {text!r}: an entry has no method; write METHOD or STAGE=METHOD")
        if stage in entries and stage != REST:
            raise UsageError(f"adjoint: stage {stage} is given twice")
        if stage in entries:
            raise UsageError(
                f"adjoint {text!r}: {entries[stage]} and {method} both name no stage; write STAGE=METHOD, as in"
                f" {entries[stage]},layer3={method}"
            )
        entries[stage] = "".join((method, colon, own.strip()))
    if set(entries) == {REST} and ":" not in text:  # a name alone, whose mistakes have words of their own
        return AdjointsByStage(entries, {REST: parse_adjoint(entries[REST], **settings)})
    found = parse_adjoints(",".join(entries.values()), **settings)
    result = AdjointsByStage(entries, dict(zip(entries, found, strict=True)))
    kinds = {choice.label: None for choice in (result.rest, *found) if choice.fixed is None}
    if len(kinds) > 1:
        raise UsageError(
            f"adjoint {text!r}: a run chooses one kind of plan, not {' and '.join(map(repr, kinds))}; give anchors a"
            " number, or the other stages a method"
        )
    return result
