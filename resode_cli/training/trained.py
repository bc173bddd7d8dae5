"""Which of a network's parameters a training run trains, and which of its BatchNorms rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from ..errors import ResodeError, UsageError, first_few, unknown
from ..network.head import head_parameters
from ..network.model import OdeResNet
from .settings import Settings


def with_stage_names(settings: Settings, model: OdeResNet) -> Settings:
    """Stages that are given by their places (3), by their names (layer3). Raises UsageError for none of the model's.

    So are those that adjoints are for, in the model's order.
    """
    stages = None if settings.stages is None else tuple(model.pick(settings.stages))
    return replace(settings, stages=stages, adjoint=settings.adjoint_choice().with_names(model).text)


def fresh_head(model: OdeResNet) -> tuple[str, ...]:
    """Names of the head's parameters, where it started at random and no training run has trained it since.

    The model's history tells: `convert` notes a head that starts so, `finetune` whether it trained the head.
    """
    fresh: tuple[str, ...] = ()
    for entry in model.info.history:
        if entry.get("command") in ("convert", "new-head"):
            noted = entry.get("fresh_head")
            fresh = tuple(name for name in noted if isinstance(name, str)) if isinstance(noted, (list, tuple)) else ()
        elif entry.get("command") == "finetune" and entry.get("trained_head", entry.get("stages") is None):
            fresh = fresh if entry.get("steps") == 0 else ()
    known = dict(model.net.named_parameters())
    return tuple(name for name in fresh if name in known)


def train_only(model: OdeResNet, settings: Settings, say: Callable[[str], None]) -> None:
    """Freeze the parameters that the settings do not train: all but a stage's, the head's, or those that are named.

    Raises UsageError for a name that nothing has, and where nothing is left to train; ResodeError for a network
    without a head of its own.
    """
    trained = _chosen(model, settings, say)
    for pattern in settings.freeze or ():
        trained -= _matching(pattern, _named(model))
    if not trained:
        raise UsageError(f"--freeze {','.join(settings.freeze or ())} leaves nothing to train")
    if settings.stages is None:  # with them, it was said what is trained
        _tell_of_frozen_head(model, trained, settings, say)
    for name, parameter in model.net.named_parameters():
        parameter.requires_grad_(name in trained)


def _tell_of_frozen_head(
    model: OdeResNet, trained: Collection[str], settings: Settings, say: Callable[[str], None]
) -> None:
    """Say it where weights that started at random, and stand behind all else, are to stay so."""
    weights = {name: p for name, p in model.net.named_parameters() if p.ndim > 1}
    if any(name in weights and name not in trained for name in fresh_head(model)):
        say(
            f"note: the head started at random, and --freeze {','.join(settings.freeze or ())} leaves it so: what is"
            " trained has to make up for it"
        )


def _chosen(model: OdeResNet, settings: Settings, say: Callable[[str], None]) -> set[str]:
    everything = dict(model.net.named_parameters())
    if settings.linear_probe:
        head = set(head_parameters(model.net))
        inside = [name for name, part in model.parameter_groups().items() if name in head and part in model.stages]
        if not head or inside:
            raise ResodeError("--linear-probe trains the head, and this network has none behind its stages")
        return head
    if settings.stages is None:
        return set(everything)
    own = {id(parameter) for stage in model.pick(settings.stages).values() for parameter in stage.parameters()}
    chosen = {name for name, parameter in everything.items() if id(parameter) in own}
    if fresh := set(fresh_head(model)) - chosen:
        layers = sorted({name.rpartition(".")[0] or name for name in fresh})
        if fresh - {name for pattern in settings.freeze or () for name in _matching(pattern, _named(model))}:
            say(
                f"note: the head started at random, so it is trained beside --stage; --freeze {','.join(layers)}"
                " would leave it as it is"
            )
    return chosen | fresh


def _named(model: OdeResNet) -> dict[str, set[str]]:
    """The parameters that a name stands for: a part of the model, a module of its network, or a parameter."""
    found: dict[str, set[str]] = {}
    for name, part in model.parameter_groups().items():
        found.setdefault(part, set()).add(name)
    names = {id(parameter): name for name, parameter in model.net.named_parameters()}
    for path, module in model.net.named_modules():
        if path and (own := {names[id(p)] for p in module.parameters()}):
            found[path] = own
    return found | {name: {name} for name in names.values()}


def _matching(pattern: str, named: Mapping[str, set[str]]) -> set[str]:
    """Raises UsageError for a pattern that matches nothing."""
    matched = [own for name, own in named.items() if fnmatchcase(name, pattern)]
    if not matched:
        raise unknown("pattern of --freeze", pattern, named, named_by=f"parts: {first_few(list(named), 6)}")
    return set().union(*matched)


def trains_head(model: OdeResNet) -> bool:
    """Whether any of the head's parameters is trained."""
    known = dict(model.net.named_parameters())
    return any(known[name].requires_grad for name in head_parameters(model.net))


def freeze_norms_of_frozen_parts(module: nn.Module, *, frozen: bool = False) -> None:
    """Put the BatchNorms in eval mode of which nothing is trained.

    One that has no parameters is as the module is that it stands in. frozen: whether that one is.
    """
    own = next(module.parameters(), None)
    here = frozen if own is None else not any(p.requires_grad for p in module.parameters())
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and here:
        module.eval()
    for child in module.children():
        freeze_norms_of_frozen_parts(child, frozen=here)
