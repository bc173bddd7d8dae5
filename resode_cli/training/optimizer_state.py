"""The state of an optimizer as tensors and JSON, by the names of the parameters: what a resumed run puts back.

No pickle: what neither is a tensor nor fits JSON is refused, before a run begins. That is what this does beyond
torch.distributed.checkpoint.state_dict, which names states alike, but restores them by way of an extra step.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim import get_optimizer_info
from torch import Tensor, nn

from ..errors import ResodeError, UsageError
from .optimization import check_steps_part_by_part, create_optimizer
from .settings import Settings
from .starting import autocast_of

TENSOR, TUPLE = "tensor", "tuple"  # the one key of a JSON object that stands for a tensor, or a tuple
# The learning rate is set anew from the step before every step.
SET_BY_THE_SCHEDULE = {"lr"}
# Optimizers that count steps in their parameter groups; runs of older versions did not save that counter.
COUNTS_IN_GROUP = {"Adan", "Lamb"}


@dataclass(frozen=True)
class Saved:
    """tensors: by a number, as text; values: 'state' by parameter, 'groups' and 'further', with references to tensors.

    by_place: whether the state is that of an older version, by the places of the parameters.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    by_place: bool = False


class OptimizerState:
    """Packs and restores an optimizer's state.

    Make it beside the fresh optimizer: what a parameter group holds then is a setting. What differs later, the
    learning rate apart, is state, such as the count of steps of LAMB and Adan.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self.settings = [copy.deepcopy(_without_parameters(group)) for group in optimizer.param_groups]

    def pack(self) -> Saved:
        """Raises ResodeError for a state that cannot be written."""
        current = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        flat = [name for group in self.names for name in group]
        groups = []
        for group, settings in zip(current["param_groups"], self.settings, strict=True):
            changed = {
                key: value
                for key, value in _without_parameters(group).items()
                if key not in SET_BY_THE_SCHEDULE and not (key in settings and _same(value, settings[key]))
            }
            groups.append(_pack(changed, tensors))
        values = {
            "state": {flat[place]: _pack(entries, tensors) for place, entries in current["state"].items()},
            "groups": groups,
            "further": _pack({k: v for k, v in current.items() if k not in ("state", "param_groups")}, tensors),
            "names": self.names,
        }
        return Saved(tensors, values)

    def restore(self, saved: Saved) -> None:
        """Raises UsageError for the state of a run that trained other parameters."""
        if saved.by_place:
            self._restore_by_place(saved)
            return
        if saved.values["names"] != self.names:
            raise UsageError("--resume: the saved run trained other parameters; give it the same --stage and --freeze")
        current = self.optimizer.state_dict()
        places = {name: place for place, name in enumerate(name for group in self.names for name in group)}
        state = {places[name]: _unpack(entries, saved.tensors) for name, entries in saved.values["state"].items()}
        groups = [
            {**group, **_unpack(further, saved.tensors)}
            for group, further in zip(current["param_groups"], saved.values["groups"], strict=True)
        ]
        further = _unpack(saved.values["further"], saved.tensors)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups, **further})

    def _restore_by_place(self, saved: Saved) -> None:
        name = type(self.optimizer).__name__
        if name in COUNTS_IN_GROUP:
            raise ResodeError(
                f"--resume: an older resode saved this run without the step count of {name}; start a new run"
            )
        state: dict[int, dict[str, Any]] = {int(place): dict(entries) for place, entries in saved.values.items()}
        for key, tensor in saved.tensors.items():
            place, _, entry = key.partition("/")
            state.setdefault(int(place), {})[entry] = tensor
        current = self.optimizer.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        fits = len(state) in (0, len(parameters)) and all(
            not isinstance(entry, Tensor) or entry.ndim == 0 or entry.shape == parameters[place].shape
            for place, entries in state.items()
            if place < len(parameters)
            for entry in entries.values()
        )
        if not fits:
            raise UsageError("--resume: the saved run trained other parameters; give it the same --stage and --freeze")
        self.optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def check_optimizer(settings: Settings) -> None:
    """One step, one save and one restoring on a stand-in, so that no run ends at its first step or save.

    Raises UsageError for an optimizer that is unknown, not installed, or that needs what `finetune` does not give it.
    """
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
        try:
            optimizer = create_optimizer(net, settings)
            if settings.momentum != Settings.momentum and not get_optimizer_info(settings.optimizer).has_momentum:
                raise UsageError(f"--momentum: the optimizer {settings.optimizer} has none to set")
            state = OptimizerState(optimizer, net)
            with autocast_of(settings, torch.device("cpu")):
                loss: Tensor = net(torch.randn(2, 1, 3, 3)).square().sum()
            torch.autograd.backward(loss)
            optimizer.step()
            saved = state.pack()
            state.restore(Saved(saved.tensors, json.loads(json.dumps(saved.values))))
            check_steps_part_by_part(settings)
        except ResodeError:
            raise
        except Exception as error:  # whatever an optimizer lacks: a GPU, a package, a second derivative
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if "overflow" in reason:
                raise UsageError(f"--lr {settings.lr:g} is too large to be a step's size ({reason})") from error
            raise UsageError(
                f"--optimizer {settings.optimizer} cannot be used here ({reason}); choose another"
            ) from error


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {TENSOR: key}
    if isinstance(value, dict) and set(value) not in ({TENSOR}, {TUPLE}) and all(isinstance(k, str) for k in value):
        return {key: _pack(entry, tensors) for key, entry in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: [_pack(entry, tensors) for entry in value]}
    if isinstance(value, list):
        return [_pack(entry, tensors) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ResodeError(f"the optimizer's state holds a {type(value).__name__}, which cannot be saved; choose another")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]].clone()
        if set(value) == {TUPLE}:
            return tuple(_unpack(entry, tensors) for entry in value[TUPLE])
        return {key: _unpack(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    return value
