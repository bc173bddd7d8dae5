"""Whether a converted network is its source, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from resode_cli.network.assembling import assemble
from resode_cli.network.block_inputs import further_arguments
from resode_cli.network.model import ModelInfo, OdeResNet
from resode_cli.network.parts import Preprocessing, SourceSpec
from resode_cli.network.residual import GENERIC, LINEAR, BlockResidual
from resode_cli.sources.find_stages import find_stages
from resode_cli.surgery.convert import stage_specs

INFO = ModelInfo(SourceSpec("file", "net.py:make"), Preprocessing(), 10)
# Of the largest entry that a block makes of a state: rounding, amplified by the block's own layers.
PER_BLOCK = {torch.float32: 1e-6, torch.float64: 1e-14}
EXACT = ("relu", LINEAR, GENERIC)  # what follows the addition where not a bit of the logits may differ


def draw(size: int, dtype: torch.dtype = torch.float32, images: int = 2) -> Tensor:
    return torch.randn(images, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def converted(net: nn.Module, size: int) -> OdeResNet:
    dtype = next(net.parameters()).dtype
    return assemble(net, stage_specs(find_stages(net, draw(size, dtype, 1)).stages, scheme="euler", form="exact"), INFO)


def source_blocks(model: OdeResNet, untouched: nn.Module) -> Iterator[tuple[str, BlockResidual, nn.Module]]:
    """(name, residual function, the source's block) of every step."""
    for name, stage in model.stages.items():
        container = untouched.get_submodule(stage.spec.container)
        for block, residual in zip(stage.spec.blocks, stage.residuals(), strict=True):
            yield f"{name}.{block.name}", residual, container.get_submodule(block.origin)


def _as(dtype: torch.dtype, values: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def steps_of_the_source(model: OdeResNet, untouched: nn.Module, size: int) -> tuple[int, ...]:
    """Assert that a network converted has its source's steps and logits; returns the steps of each stage."""
    images = draw(size)
    inputs: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {}

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[block] = (args[0].clone(), further_arguments(block, args, kwargs))

    with torch.no_grad():
        found = model(images)
        blocks = list(source_blocks(model, untouched))
        hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for _, _, block in blocks]
        expected = untouched(images)
        for hook in hooks:
            hook.remove()
        for dtype, tolerance in PER_BLOCK.items():
            for stage in model.stages.values():
                stage.further = _as(dtype, stage.further)
            for name, residual, block in source_blocks(model, untouched):
                x, further = _as(dtype, inputs[block])
                wanted = block.to(dtype)(x.clone(), **further)
                residual.module.to(dtype)
                scale = wanted.abs().max().item()
                assert (residual.step(x, 1.0) - wanted).abs().max().item() <= tolerance * scale, f"{name} {dtype}"
                assert (x + residual(x) - wanted).abs().max().item() <= tolerance * scale, f"{name} {dtype}"
    if all(residual.activation in EXACT for _, residual, _ in blocks):
        assert torch.equal(found, expected)
    return tuple(stage.spec.depth for stage in model.stages.values())
