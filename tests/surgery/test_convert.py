"""A converted network is its source: logits, gradients, statistics and names."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.network.assembling import assemble
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import PreprocessingChoice
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.find_stages import find_stages
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import Verification, convert, stage_specs

# source, arguments of open_source, steps per stage
NETWORKS = {
    "timm:resnet18": ({}, [2, 1, 1, 1]),
    "timm:resnet50": ({}, [2, 3, 5, 2]),
    "timm:resnetv2_18": ({}, [2, 1, 1, 1]),
    "timm:resnetv2_50": ({}, [2, 3, 5, 2]),
    "torchvision:resnet18": ({}, [2, 1, 1, 1]),
    "torchvision:resnet50": ({}, [2, 3, 5, 2]),
    "cifar:resnet20": ({"shortcut": "A"}, [3, 2, 2]),
    "cifar:resnet20 B": ({"shortcut": "B"}, [3, 2, 2]),
}
LINEAR = ("timm:resnetv2_18", "timm:resnetv2_50")

USER_NET = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, channels, activation):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = activation

    def forward(self, x):
        return self.activation(x + self.norm(self.mix(x)))


class Net(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8, activation) for _ in range(3)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu()).mean(dim=(2, 3)))


def relu():
    return Net(F.relu)


def tanh():
    return Net(torch.tanh)


def linear():
    return Net(nn.Identity())


class Noisy(Net):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def noisy():
    return Noisy(F.relu)


class Maps(Net):
    def forward(self, x):
        return self.blocks(self.stem(x))


def maps():
    return Maps(F.relu)
"""


@dataclass
class Converted:
    name: str
    source: nn.Module  # an untouched copy
    model: OdeResNet
    check: Verification
    steps: list[int]


def steps(model: OdeResNet) -> list[int]:
    return [stage.spec.depth for stage in model.stages.values()]


def open_small(name: str, **arguments):
    size = 32 if name.startswith("cifar") else 64
    source = name.removesuffix(" B")
    return open_source(
        source, pretrained=False, num_classes=10, preprocessing=PreprocessingChoice(size=size), **arguments
    )


def random_images(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    size = 32 if name.startswith("cifar") else 64
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5), dtype=dtype)


@pytest.fixture(scope="module", params=NETWORKS)
def converted(request: pytest.FixtureRequest, randomise) -> Converted:
    torch.manual_seed(0)
    arguments, expected = NETWORKS[request.param]
    source = open_small(request.param, **arguments)
    untouched = copy.deepcopy(randomise(source.net)).eval()
    model, check = convert(source)
    return Converted(request.param, untouched, model, check, expected)


def test_logits_are_the_sources_to_the_last_bit(converted: Converted):
    images = random_images(converted.name)
    with torch.no_grad():
        expected, logits = converted.source(images), converted.model(images)
    # Logits that do not depend on the image would agree whatever the stages do.
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    assert torch.equal(logits, expected)
    assert converted.check.identical and converted.check.function_kept


def test_steps_per_stage_are_the_blocks_with_an_identity_shortcut(converted: Converted):
    assert steps(converted.model) == converted.steps
    assert all(stage.spec.step_size == 1.0 for stage in converted.model.stages.values())


def test_tensors_keep_the_sources_names_and_values(converted: Converted):
    state = converted.model.file_state()
    expected = converted.source.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_resnet56_has_9_8_8_steps():
    assert steps(convert(open_small("cifar:resnet56"))[0]) == [9, 8, 8]


# All other classes of blocks are in tests/zoo/test_block_classes.py.
GRADIENT_NETWORKS = {"timm:resnet18": {}, "cifar:resnet20": {}}


@pytest.mark.parametrize("name", GRADIENT_NETWORKS)
def test_train_mode_gradients_and_statistics_are_the_sources(name: str):
    source = open_small(name)
    zero_last_norms(source.net)
    untouched = copy.deepcopy(source.net).double().train()
    model = convert(source)[0].double().train()
    images, labels = random_images(name, torch.float64), torch.tensor([1, 2, 3])
    for net in (untouched, model):
        F.cross_entropy(net(images), labels).backward()
    gradients = {model.file_name(key): p.grad for key, p in model.net.named_parameters()}
    for key, parameter in untouched.named_parameters():
        assert_close(gradients[key], parameter.grad, key)
    state = model.file_state()
    for key, buffer in untouched.named_buffers():
        assert_close(state[key].double(), buffer.double(), key)
    assert any(key.endswith("num_batches_tracked") and value == 1 for key, value in state.items())


def zero_last_norms(net: nn.Module) -> None:
    """What timm does by default. g = 0 on states with exact zeros: ties between g and -x everywhere."""
    blocks = [m for m in net.modules() if hasattr(m, "bn2") and not isinstance(m, nn.Sequential)]
    for block in blocks:
        nn.init.zeros_(getattr(block, "bn3", block.bn2).weight)


def assert_close(value: Tensor, expected: Tensor, name: str) -> None:
    scale = expected.abs().max().item()
    assert (value - expected).abs().max().item() <= 1e-10 * scale + 1e-14, name


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "hard_swish"])
def test_smooth_activations_agree_to_rounding(activation: str, randomise, info):
    net = randomise(timm.create_model("resnet18", act_layer=activation, num_classes=5)).eval()
    images = random_images("timm")
    with torch.no_grad():
        expected = net(images)
        model = assemble(net, stage_specs(find_stages(net, images).stages, scheme="euler", form="exact"), info).eval()
        assert steps(model) == [2, 1, 1, 1]
        assert {stage.activation for stage in model.stages.values()} <= {"silu", "gelu", "gelu_tanh", "hardswish"}
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh", "hard_swish", "leaky_relu"])
def test_every_residual_is_the_block_minus_its_input(activation: str, randomise, info):
    net = randomise(timm.create_model("resnet18", act_layer=activation, num_classes=5)).double().eval()
    images = random_images("timm", torch.float64)
    untouched = copy.deepcopy(net)
    model = assemble(net, stage_specs(find_stages(net, images).stages, scheme="euler", form="exact"), info).eval()
    state = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    stage = model.stages["layer1"]
    for spec, residual in zip(stage.spec.blocks, stage.residuals(), strict=True):
        block = untouched.layer1.get_submodule(spec.origin)
        with torch.no_grad():
            torch.testing.assert_close(residual(state), block(state) - state, rtol=0, atol=1e-12)


def test_a_residuals_gradient_at_ties_is_the_blocks(info):
    # A zero last norm gives g = 0; on states with exact zeros then g = -x, where torch.maximum would halve gradients.
    net = timm.create_model("resnet18", num_classes=5).double().eval()
    untouched = copy.deepcopy(net.layer1)
    images = random_images("timm", torch.float64)
    model = assemble(net, stage_specs(find_stages(net, images).stages, scheme="euler", form="exact"), info).eval()
    state = torch.randn(2, 64, 8, 8, dtype=torch.float64).relu()
    assert (untouched[0].bn2.weight == 0).all() and (state == 0).double().mean() > 0.4
    seed = torch.randn_like(state)
    stage = model.stages["layer1"]
    for block, residual in zip(untouched, stage.residuals(), strict=True):
        names, parameters = zip(*block.named_parameters(), strict=True)
        expected = torch.autograd.grad(((block(state) - state) * seed).sum(), parameters)
        own = dict(residual.module.named_parameters())
        values = torch.autograd.grad((residual(state) * seed).sum(), [own[name] for name in names])
        for name, value, wanted in zip(names, values, expected, strict=True):
            assert_close(value, wanted, name)


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_NET)
    return path


@pytest.mark.parametrize(("function", "activation"), [("relu", "relu"), ("tanh", "generic"), ("linear", "linear")])
def test_blocks_of_the_users_own_are_bit_identical_at_native_depth(function, activation, user_file, randomise):
    source = open_source(f"{user_file}:{function}", pretrained=False, preprocessing=PreprocessingChoice(size=16))
    untouched = copy.deepcopy(randomise(source.net)).eval()
    model, check = convert(source)
    assert steps(model) == [3] and model.stages["blocks"].activation == activation
    assert check.identical
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), untouched(images))


def test_pre_form_changes_a_relu_network_and_the_verification_says_so(build_tiny, tiny_file, randomise):
    source = open_source(f"{tiny_file}:make", pretrained=False, preprocessing=PreprocessingChoice(size=16))
    randomise(source.net)
    _, check = convert(source, form="pre")
    assert not check.function_kept and not check.identical and check.max_difference > 1e-3


def test_pre_form_runs_the_branch_on_the_activated_state(build_tiny):
    model = build_tiny(form="pre")
    stage = model.stages["layer1"]
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = x
        for block in stage.blocks:
            expected = expected + block.branch(F.relu(expected))
        torch.testing.assert_close(stage(x), F.relu(expected))


@pytest.mark.parametrize("name", LINEAR)
def test_pre_form_changes_nothing_on_preactivation_networks(name: str, randomise):
    source = open_small(name)
    randomise(source.net)
    model, check = convert(source, form="pre")
    assert check.identical and check.function_kept
    assert all(stage.spec.form == "pre" for stage in model.stages.values())


def test_pre_form_is_refused_where_the_branch_is_not_known(user_file):
    source = open_source(f"{user_file}:tanh", pretrained=False, preprocessing=PreprocessingChoice(size=16))
    with pytest.raises(UsageError, match="'pre'.*--form exact"):
        convert(source, form="pre")


def test_heun_changes_the_function(tiny_file, randomise):
    source = open_source(f"{tiny_file}:make", pretrained=False, preprocessing=PreprocessingChoice(size=16))
    randomise(source.net)
    model, check = convert(source, scheme="heun")
    assert not check.function_kept and check.max_difference > 1e-3
    assert all(stage.spec.scheme == "heun" for stage in model.stages.values())


def test_a_network_that_does_not_repeat_itself_is_refused(user_file):
    source = open_source(f"{user_file}:noisy", pretrained=False, preprocessing=PreprocessingChoice(size=16))
    with pytest.raises(ResodeError, match="does not agree.*nothing was written"):
        convert(source)


def test_a_network_without_logits_is_refused(user_file):
    source = open_source(f"{user_file}:maps", pretrained=False, preprocessing=PreprocessingChoice(size=16))
    with pytest.raises(ResodeError, match=r"logits \(images, classes\) are needed"):
        convert(source)


def test_a_network_that_fails_on_its_input_is_named(tmp_path):
    (tmp_path / "grey.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(5, 2)\n")
    source = open_source(f"{tmp_path / 'grey.py'}:make", pretrained=False, preprocessing=PreprocessingChoice(size=16))
    with pytest.raises(ResodeError, match=r"grey.py:make fails on a batch of shape \(4, 3, 16, 16\)"):
        convert(source)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv1.weight", "linear.weight"])
def test_a_network_whose_logits_are_no_numbers_is_refused_as_such(name: str, value: float):
    net = CifarResNet(1, widths=(2, 4, 4)).eval()
    with torch.no_grad():
        net.get_parameter(name).fill_(value)
    images = torch.randn(2, 3, 32, 32)
    # The norm that follows a convolution may make numbers of what is too large.
    usable = bool(torch.isfinite(net(images)).all())
    with nullcontext() if usable else pytest.raises(ResodeError, match="logits that are no numbers"):
        convert(net, example=images)


class SaysNothing(nn.Module):
    """Its `train` returns nothing, as some networks' that keep their norms frozen do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)) * (1 if x.sum() == 0.5 else 2))  # only the whole is known


class SaysNothingEither(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1, self.fc = (
            nn.Conv2d(3, 4, 1),
            nn.Sequential(SaysNothing(), SaysNothing()),
            nn.Linear(4, 2),
        )

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.stem(x)).mean((2, 3)))


def test_networks_and_blocks_whose_train_returns_nothing_convert():
    torch.manual_seed(0)
    net, images = SaysNothingEither(), torch.rand(3, 3, 6, 6)
    net.eval()
    expected = net(images).detach()
    model, _ = convert(net, example=images)
    assert steps(model) == [2]
    torch.testing.assert_close(model(images), expected)
