"""A source network with its stages in the places of its blocks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from functools import partial

from torch import nn

from ..errors import ResodeError
from .between import Emptied, OnePiece
from .model import ModelInfo, OdeResNet, shapes_of, take_hooks, with_submodule
from .parts import BlockSplit
from .reading import is_plain_sequence, read_split, runs_its_children, whole
from .residual import GENERIC
from .seen_values import TRUSTED, root
from .sharing import share_layers
from .specs import StageSpec
from .stage import OdeStage


def assemble(net: nn.Module, specs: Sequence[StageSpec], info: ModelInfo) -> OdeResNet:
    """Replace the stages of a source network by OdeStages. `net` is used up."""
    paths: dict[str, str] = {}
    built = shapes_of(net)
    twice = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if twice:
        raise ResodeError(f"two stages are called {twice[0]}")
    for spec in specs:
        try:
            container = net.get_submodule(spec.container)
        except AttributeError as error:
            raise ResodeError(f"the source network has no {spec.container!r}") from error
        # Not `named_children`, which leaves out the further names of a child that has several.
        children = {name: child for name, child in container._modules.items() if child is not None}
        stage = _build_stage(spec, children)
        first, *others = (*spec.transition, *dict.fromkeys(spec.source_blocks))
        is_whole = {first, *others} == set(children) and not isinstance(container, nn.ModuleList)
        known = is_plain_sequence(container) or root(type(container)) in TRUSTED
        emptied = [
            Emptied(spec.name, i, children[name], last=i == len(others)) for i, name in enumerate(others, start=1)
        ]
        stage.emptied = tuple(emptied)
        if is_whole and known and runs_its_children(container):
            paths[spec.name] = spec.container
            take_hooks(stage, container)
            net = with_submodule(net, spec.container, stage)
            continue
        # The stage takes the first one's place. The others stay, emptied, for what counts or indexes them.
        paths[spec.name] = f"{spec.container}.{first}".lstrip(".")
        container.register_module(first, stage)
        stage.is_first = True
        for name, module in zip(others, stage.emptied, strict=True):
            container.register_module(name, module)
        if hasattr(net, "group_matcher"):
            net.__dict__["group_matcher"] = partial(_refuse_groups, spec.name)
        if others and is_plain_sequence(container):
            owner = _owner(net, spec.container)
            for method in ("forward_intermediates", "get_intermediate_layers"):
                if hasattr(owner, method):
                    owner.__dict__[method] = partial(_refuse_features, spec.name)
    return OdeResNet(net, paths, info, built)


def _owner(net: nn.Module, container: str) -> nn.Module:
    """The module whose forward iterates over a list of blocks, and may hand out what is between them."""
    owner = container.rpartition(".")[0]
    while isinstance(net.get_submodule(owner), nn.ModuleList):
        owner = owner.rpartition(".")[0]
    return net.get_submodule(owner)


def _refuse_features(stage: str, *_: object, **__: object) -> None:
    raise OnePiece(stage, "hands out no intermediate features")


def _refuse_groups(stage: str, *_: object, **__: object) -> None:
    raise ResodeError(
        f"the parameters of stage {stage} are below its first block, so that names no longer tell the layers apart"
        " (layer decay goes by them)"
    )


def _build_stage(spec: StageSpec, children: dict[str, nn.Module]) -> OdeStage:
    named = (*spec.transition, *spec.source_blocks, *(b.origin for b in spec.blocks))
    unknown_names = [name for name in named if name not in children]
    if unknown_names:
        raise ResodeError(f"stage {spec.name}: the source network has no block {unknown_names[0]!r}")
    splits: dict[str, BlockSplit] = {}
    blocks: list[nn.Module] = []
    for block in spec.blocks:
        module = children[block.origin]
        if block.origin in splits:
            module = copy.deepcopy(module)
        else:
            splits[block.origin] = BlockSplit(whole, GENERIC) if spec.further else read_split(module)
        blocks.append(module)
    by_name = {block.name: module for block, module in zip(spec.blocks, blocks, strict=True)}
    for block, module in zip(spec.blocks, blocks, strict=True):
        if block.shares is not None:
            if block.shares not in by_name or block.shares == block.name:
                raise ResodeError(f"stage {spec.name}: block {block.name} shares the weights of {block.shares!r}")
            share_layers(module, by_name[block.shares], norms=block.shares_norms)
    return OdeStage(
        spec,
        transition={name: children[name] for name in spec.transition},
        blocks=blocks,
        splits=[splits[block.origin] for block in spec.blocks],
    )
