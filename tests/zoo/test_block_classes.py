"""One architecture per class of block: the converted network is its source, step by step, in value and in gradient."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from block_classes import CORE, LONG, OTHERS, Architecture
from checks import converted, draw, steps_of_the_source
from torch import Tensor, nn

from resode_cli.network.residual import GENERIC
from resode_cli.ode import Adjoint

# Large images, and all that are no ResNets, are for `.ci/run`.
every_architecture = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(each, marks=pytest.mark.slow if each.name in LONG or each in OTHERS else (), id=str(each))
        for each in (*CORE, *OTHERS)
    ],
)


@every_architecture
def test_each_step_and_the_logits_are_the_sources(architecture: Architecture, randomise):
    net = randomise(architecture.build()).eval()
    model = converted(copy.deepcopy(net), architecture.size).eval()
    splits = [split for stage in model.stages.values() for split in stage.splits]
    assert steps_of_the_source(model, net, architecture.size) == architecture.steps
    if architecture in CORE:  # their branches are read where the activation allows
        without_formula = architecture.arguments.get("act_layer") in ("leaky_relu", "mish")
        assert splits and {split.activation == GENERIC for split in splits} == {without_formula}


@every_architecture
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
