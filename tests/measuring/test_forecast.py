"""Predictions of memory, against what is then counted; and that a model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.gradients.check_grad import check_gradients
from resode_cli.measuring.forecast import forecast_conversion, forecast_gradients
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import PreprocessingChoice
from resode_cli.ode import Adjoint
from resode_cli.ode.memory import LiveBytes
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import VERIFIED, convert, random_batch


def test_memory_of_gradients_is_that_of_the_whole_batch(tiny: OdeResNet, images: Tensor):
    tiny.eval()
    weights = sum(p.nbytes for p in tiny.parameters())
    with LiveBytes([*tiny.parameters(), *tiny.buffers(), images]) as live:
        logits = tiny(images)
        F.cross_entropy(logits, logits.argmax(1)).backward()
    found = forecast_gradients(tiny, images, [Adjoint("backprop")]).bytes - 2 * weights - images.nbytes
    assert live.peak <= found <= 1.3 * live.peak


def test_more_methods_take_longer_and_corrections_longer_still(tiny: OdeResNet, images: Tensor, monkeypatch):
    # Every step takes one second.
    clock = iter(float(i) for i in range(100))
    monkeypatch.setattr("resode_cli.measuring.forecast.time.perf_counter", lambda: next(clock))

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


def test_gradients_of_every_method_fit_into_the_forecast(tiny: OdeResNet, images: Tensor):
    labels = torch.arange(len(images)) % 5
    methods = [Adjoint("backprop"), Adjoint("pc"), Adjoint("checkpoint")]
    found = forecast_gradients(tiny, images, methods).bytes
    with LiveBytes([*tiny.parameters(), *tiny.buffers(), images, labels]) as live:
        check_gradients(tiny, images, labels, methods=methods)
    assert live.peak <= found <= 2.5 * live.peak


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:convnext_atto", "cifar:resnet20"])
def test_a_conversion_fits_into_its_forecast(name: str):
    source = open_source(name, pretrained=False, preprocessing=PreprocessingChoice(size=96))
    image = random_batch(source.preprocessing, 1)
    weights = sum(p.nbytes for p in source.net.parameters())
    found = forecast_conversion(source.net.eval(), image, VERIFIED)
    assert found is not None and not any(module._forward_hooks for module in source.net.modules())
    with LiveBytes([*source.net.parameters(), *source.net.buffers()]) as live:
        convert(source)
    assert found.bytes >= 0.9 * (weights + live.peak)
    # The copy that is written is not in what `convert` has alive.
    assert found.bytes <= 1.7 * (weights + max(live.peak, weights))


def test_bytes_alive_are_those_of_storages_not_of_views():
    x = torch.zeros(100)
    with LiveBytes([x]) as live:
        a = x + 1
        b = a.view(10, 10).t()[2:]
        assert live.now == live.peak == 400
        del a
        assert live.now == 400 and len(b)
        del b
        assert live.now == 0
        x.view(10, 10).add_(1)
        assert live.now == 0 and live.peak == 400


def test_a_network_that_fails_has_no_forecast():
    net = nn.Conv2d(4, 8, 1)
    assert forecast_conversion(net, torch.zeros(1, 3, 10, 10), 5) is None
    assert not net._forward_hooks


def test_a_network_that_cannot_be_simulated_is_predicted_without_its_memory(tiny: OdeResNet, images: Tensor):
    tiny.net.conv1.register_forward_pre_hook(lambda module, given: given if float(given[0].sum()) < 1e9 else None)
    found = forecast_gradients(tiny, images, [Adjoint("pc")])
    assert found.bytes is None and found.seconds > 0
