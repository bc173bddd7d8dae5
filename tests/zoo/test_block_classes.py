"""One architecture per class of block: the converted network is its source, step by step, in value and in gradient."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from block_classes import CORE, OTHERS, Architecture
from torch import Tensor, nn

from resode_cli.adapters.discover import find_stages
from resode_cli.conversion import stage_specs
from resode_cli.model import ModelInfo, OdeResNet, assemble
from resode_cli.ode import Adjoint
from resode_cli.parts import Preprocessing, SourceSpec

INFO = ModelInfo(SourceSpec("file", "net.py:make"), Preprocessing(), 10)
# Of the largest entry, for one block: rounding of its input, amplified by its own layers.
PER_BLOCK = {torch.float32: 1e-6, torch.float64: 1e-14}


def draw(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def converted(net: nn.Module, size: int) -> OdeResNet:
    dtype = next(net.parameters()).dtype
    return assemble(net, stage_specs(find_stages(net, draw(size, dtype)), scheme="euler", form="exact"), INFO)


def source_blocks(model: OdeResNet, untouched: nn.Module):
    """(residual function, the source's block) for every step."""
    for name, stage in model.stages.items():
        container = untouched.get_submodule(stage.spec.container)
        for block, residual in zip(stage.spec.blocks, stage.residuals(), strict=True):
            yield f"{name}.{block.name}", residual, container.get_submodule(block.origin)


@pytest.mark.parametrize("architecture", [*CORE, *OTHERS], ids=str)
def test_each_step_and_the_logits_are_the_sources(architecture: Architecture, randomise):
    untouched = randomise(architecture.build()).eval()
    model = converted(copy.deepcopy(untouched), architecture.size).eval()
    assert tuple(stage.spec.depth for stage in model.stages.values()) == architecture.steps
    images = draw(architecture.size)
    inputs: dict[nn.Module, Tensor] = {}
    blocks = list(source_blocks(model, untouched))
    hooks = [b.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].clone()})) for _, _, b in blocks]
    with torch.no_grad():
        expected, found = untouched(images), model(images)
        for hook in hooks:
            hook.remove()
        for dtype, tolerance in PER_BLOCK.items():
            for name, residual, block in blocks:
                x = inputs[block].to(dtype)
                wanted = block.to(dtype)(x.clone())
                residual.module.to(dtype)
                scale = wanted.abs().max().item()
                assert (residual.step(x, 1.0) - wanted).abs().max().item() <= tolerance * scale, f"{name} {dtype}"
                assert (x + residual(x) - wanted).abs().max().item() <= tolerance * scale, f"{name} {dtype}"
    scale = expected.abs().max().item()
    assert torch.equal(found, expected) if architecture.exact else (found - expected).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("architecture", [*CORE, *OTHERS], ids=str)
def test_training_has_the_sources_gradients_statistics_and_random_numbers(architecture: Architecture):
    # Freshly built: last norms at zero where that is the default, so that g = −x = 0 is everywhere.
    untouched = architecture.build(**architecture.random).double()
    model = converted(copy.deepcopy(untouched), architecture.size).train()
    model.use_adjoint(Adjoint("checkpoint"))
    found, expected = trained(model, architecture.size), trained(untouched.train(), architecture.size)
    own = {model.file_name(key): parameter for key, parameter in model.net.named_parameters()}
    for name, parameter in untouched.named_parameters():
        assert (own[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            assert (own[name].grad - parameter.grad).abs().max().item() <= 1e-12 * expected.scale, name
    buffers = {model.file_name(name): buffer for name, buffer in model.net.named_buffers()}
    for name, buffer in untouched.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-13, msg=name)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-11, atol=1e-12)
    assert torch.equal(found.random_state, expected.random_state)


@dataclass(frozen=True)
class Trained:
    """scale: of the gradients."""

    logits: Tensor
    scale: float
    random_state: Tensor


def trained(net: nn.Module, size: int) -> Trained:
    """After a forward and a backward pass."""
    torch.manual_seed(5)
    logits = net(draw(size, torch.float64))
    F.cross_entropy(logits, torch.tensor([1, 3])).backward()
    scale = max(p.grad.abs().max().item() for p in net.parameters() if p.grad is not None)
    return Trained(logits.detach(), scale, torch.get_rng_state())
