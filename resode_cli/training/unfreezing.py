"""--unfreeze-every: the head alone is trained at first, then one more part every so many steps, down to the stem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..errors import ResodeError, UsageError, join
from ..network.head import head_parameters
from ..network.model import OdeResNet
from ..network.outside import STEM
from ..quantities import counted
from .settings import Settings

HEAD = "head"


class Unfreezing:
    """Which of the parameters that a run trains are trained already: a function of the step alone.

    parts: the parameters by part, in the order in which they come. Before a step, those of the first
    1 + step // `settings.unfreeze_every` parts have requires_grad. A part whose parameters --freeze names has none, and
    takes no turn. The parts still to come are the first ones of the network, so that the backward pass ends where
    they begin.

    Make it once the model's parameters require a gradient as `train_only` says. Raises UsageError where there is
    nothing to unfreeze, ResodeError for a network without a head behind its stages.
    """

    def __init__(self, model: OdeResNet, settings: Settings, total: int) -> None:
        assert settings.unfreeze_every is not None
        self.model, self.every, self.total = model, settings.unfreeze_every, total
        trained = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
        by_part = {
            part: [trained[name] for name in names if name in trained]
            for part, names in parts_from_the_head(model).items()
        }
        self.parts: dict[str, list[nn.Parameter]] = {part: own for part, own in by_part.items() if own}
        self.known = len(self.parts)  # how many are trained now
        names = list(self.parts)
        if len(names) == 1:
            raise UsageError(f"--unfreeze-every has nothing to unfreeze: {names[0]} is all that is trained")
        if self.every >= total:
            raise UsageError(
                f"--unfreeze-every {self.every}: the run ends at step {total}, before anything but {names[0]} is"
                " trained; unfreeze sooner, or train the head alone by --linear-probe"
            )

    def plan(self, step: int) -> list[str]:
        """What to say before the first step of a command, of which a run that goes on has taken some."""
        names, now = list(self.parts), self._count(step)
        if step and now == len(names):
            return []
        then = f", then one more every {counted(self.every, 'step')}: {', '.join(names[now:])}" if names[now:] else ""
        said = [f"{are(names[:now])} trained {'now' if step else 'alone at first'}{then}"]
        if never := names[self._count(self.total - 1) :]:
            said.append(f"note: the run ends at step {self.total}, before {are(never)} trained")
        return said

    def _count(self, step: int) -> int:
        return min(1 + step // self.every, len(self.parts))

    def at(self, step: int) -> list[str]:
        """Train what is due before a step, counted from 0; the parts that were not trained before it."""
        count = self._count(step)
        if count == self.known:
            return []
        new = list(self.parts)[self.known : count]
        self._train(count)
        return new

    @contextmanager
    def all_trained(self) -> Iterator[None]:
        """Inside the block every part is: a plan for the backward pass has to hold for the whole network."""
        before = self.known
        self._train(len(self.parts))
        try:
            yield
        finally:
            self._train(before)

    def _train(self, count: int) -> None:
        if count == self.known:
            return
        for place, parameters in enumerate(self.parts.values()):
            for parameter in parameters:
                parameter.requires_grad_(place < count)
        self.known = count
        self.model.forget_runs()


def are(parts: Sequence[str]) -> str:
    """'stem is', 'layer1 and stem are'."""
    return f"{join(parts)} {'is' if len(parts) == 1 else 'are'}"


def parts_from_the_head(model: OdeResNet) -> dict[str, list[str]]:
    """Names of the parameters by part: the head, the stages from the last to the first, the stem.

    What is registered between two stages goes with the later one, as its transition does; behind the last, with the
    head. Raises ResodeError for a network without a head behind its stages.
    """
    groups, head = model.parameter_groups(), set(head_parameters(model.net))
    stages = {path + ".": name for name, path in model.paths.items()}
    found: dict[str, list[str]] = {part: [] for part in (HEAD, *reversed(model.stages), STEM)}
    waiting: list[str] = []
    for name, group in groups.items():
        stage = next((own for prefix, own in stages.items() if name.startswith(prefix)), None)
        if name in head and stage is not None:
            raise ResodeError("--unfreeze-every begins with the head, and this network's is inside its stages")
        if name in head:
            found[HEAD].append(name)
        elif stage is not None:
            found[stage] += [*waiting, name]
            waiting = []
        elif group == STEM:
            found[STEM].append(name)
        else:
            waiting.append(name)
    found[HEAD] += waiting
    if not found[HEAD]:
        raise ResodeError("--unfreeze-every begins with the head, and this network has none behind its stages")
    return found
