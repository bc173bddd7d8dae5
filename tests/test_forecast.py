"""Predictions of memory, against what is then counted; and that a model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.forecast import forecast_gradients, forecast_inference
from resode_cli.model import OdeResNet
from resode_cli.ode import Adjoint, kept_bytes


def test_memory_of_gradients_is_that_of_the_whole_batch(tiny: OdeResNet, images: Tensor):
    tiny.eval()
    weights = sum(p.nbytes for p in tiny.parameters())
    with kept_bytes(tiny.parameters()) as count:
        logits = tiny(images)
        F.cross_entropy(logits, logits.argmax(1)).backward()
    counted = count() or 0
    found = forecast_gradients(tiny, images, [Adjoint("backprop")]).bytes - 3 * weights
    # Two of four images were run; what does not grow with the batch (statistics, slopes) counts twice.
    assert counted <= found <= 1.3 * counted


def test_more_methods_take_longer_and_corrections_longer_still(tiny: OdeResNet, images: Tensor, monkeypatch):
    clock = iter(float(i) for i in range(100))
    monkeypatch.setattr("resode_cli.forecast.time.perf_counter", lambda: next(clock))  # every step takes one second

    def seconds(*methods: Adjoint) -> float:
        return forecast_gradients(tiny, images, methods).seconds

    scale = 2  # four images, two of which were run
    assert seconds() == pytest.approx(scale)  # backprop's own
    assert seconds(Adjoint("backprop")) == pytest.approx(2 * scale)
    assert seconds(Adjoint("pc")) == pytest.approx((2 + 2 / 3) * scale)
    assert seconds(Adjoint("pc", corrections=1)) == pytest.approx(3 * scale)


def test_a_forecast_leaves_the_model_as_it_was(tiny: OdeResNet, images: Tensor):
    tiny.train()
    tiny.use_adjoint(Adjoint("pc"))
    before = copy.deepcopy(tiny.state_dict())
    forecast_gradients(tiny, images, [Adjoint("multistep")])
    assert tiny.training and all(stage.adjoint.method == "pc" for stage in tiny.stages.values())
    assert all(p.grad is None for p in tiny.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_inference_keeps_the_weights_and_the_largest_layer():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    found = forecast_inference(net, torch.zeros(1, 3, 10, 10), 5)
    assert found is not None
    layers = [(3 + 8) * 100 * 4, (8 + 2) * 100 * 4]
    assert found.bytes == sum(p.nbytes for p in net.parameters()) + 5 * max(layers)
    assert not any(m._forward_hooks for m in net.modules())


def test_a_network_that_fails_has_no_forecast():
    net = nn.Conv2d(4, 8, 1)
    assert forecast_inference(net, torch.zeros(1, 3, 10, 10), 5) is None
    assert not net._forward_hooks
