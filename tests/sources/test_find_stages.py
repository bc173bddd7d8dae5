"""What is taken for a residual step, and how a container's children become stages."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from resode_cli.errors import ResodeError
from resode_cli.network.assembling import assemble
from resode_cli.network.parts import Preprocessing, Source, SourceSpec
from resode_cli.sources.find_stages import find_stages
from resode_cli.surgery.convert import convert, stage_specs

CHANNELS = 4


class Step(nn.Module):
    """x + norm(conv(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


class Plain(Step):
    """No shortcut: a VGG's layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class NormShortcut(Step):
    """As in RegNetV and RepVGG: the branch is added to norm(x), not to x."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.conv(x)


class PlainNormShortcut(Step):
    """The same without parameters to set to zero, and fresh statistics, with which it changes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.conv(x)


class ConvShortcut(Step):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv(x)


class HalfShortcut(Step):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.conv(x)


class FlippedShortcut(Step):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) + self.conv(x)


class SmallerShortcut(nn.Sequential):
    """Halves the state: never a step."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1), nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class InPlace(Step):
    """The activation before the branch writes to the state."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(F.relu_(x)))


class Net(nn.Module):
    """Stem, a container of layers, head. A list is iterated over, a sequence is called."""

    def __init__(self, layers: Sequence[nn.Module], *, container: type[nn.Module] = nn.Sequential) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.layers = nn.ModuleList(layers) if container is nn.ModuleList else nn.Sequential(*layers)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if isinstance(self.layers, nn.ModuleList):
            for layer in self.layers:
                x = layer(x)
        else:
            x = self.layers(x)
        return self.head(x.mean(dim=(2, 3)))


class KeepsEveryState(Net):
    """The states between the steps are read too, as in DLA."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = x
        for layer in self.layers:
            x = layer(x)
            total = total + x
        return self.head(total.mean(dim=(2, 3)))


class Indexes(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](self.stem(x)))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture
def assert_same_after_conversion(images, randomise, info):
    """Convert, compare logits and names with an untouched copy, and return {stage: (transition, steps)}."""

    def check(net: nn.Module) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        randomise(net).eval()
        untouched = copy.deepcopy(net)
        model = assemble(net, stage_specs(find_stages(net, images).stages, scheme="euler", form="exact"), info).eval()
        with torch.no_grad():
            assert torch.equal(model(images), untouched(images))
        state = model.file_state()
        assert set(state) == set(untouched.state_dict())
        assert all(torch.equal(state[key], value) for key, value in untouched.state_dict().items())
        return {name: (stage.spec.transition, stage.spec.source_blocks) for name, stage in model.stages.items()}

    return check


def as_source(net: nn.Module) -> Source:
    return Source(SourceSpec("file", "net.py:make"), net, Preprocessing(size=16))


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_steps_of_a_container_become_one_stage(container, assert_same_after_conversion):
    net = Net([Step(), Step(), Step()], container=container)
    assert assert_same_after_conversion(net) == {"layers": ((), ("0", "1", "2"))}


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_a_transition_between_steps_makes_two_stages(container, assert_same_after_conversion):
    net = Net([Step(), Step(), Plain(), Step()], container=container)
    assert assert_same_after_conversion(net) == {"layers": ((), ("0", "1")), "layers#2": (("2",), ("3",))}


def test_what_follows_the_last_step_stays_where_it_is(assert_same_after_conversion):
    net = Net([Plain(), Step(), Step(), Plain(), Plain()])
    assert assert_same_after_conversion(net) == {"layers": (("0",), ("1", "2"))}


def test_a_flat_sequence_is_a_stage_with_stem_and_head_inside(assert_same_after_conversion):
    stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 5)]
    net = nn.Sequential(stem, Step(), Step(), SmallerShortcut(), Step(), *head)
    assert assert_same_after_conversion(net) == {"net": (("0",), ("1", "2")), "net#2": (("3",), ("4",))}


def test_a_flat_sequence_of_nothing_but_stem_and_steps_is_one_stage(assert_same_after_conversion):
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3))

    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), Step(), Step(), Pool())
    assert assert_same_after_conversion(net) == {"net": (("0",), ("1", "2"))}


def test_containers_inside_containers_are_stages_of_their_own(assert_same_after_conversion):
    net = Net([nn.Sequential(Step(), Step()), nn.Sequential(SmallerShortcut(), Step())])
    assert assert_same_after_conversion(net) == {"layers.0": ((), ("0", "1")), "layers.1": (("0",), ("1",))}


def test_stages_without_any_step_are_legal(assert_same_after_conversion):
    net = ResNet(BasicBlock, [2, 1, 1, 1], channels=(4, 8, 8, 8), stem_width=4, num_classes=5)
    net.conv1, net.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)  # timm's stem has 64 channels
    net.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
    net.layer2 = nn.Sequential(BasicBlock(4, 8, downsample=nn.Conv2d(4, 8, 1)))
    stages = assert_same_after_conversion(net)
    assert {name: len(steps) for name, (_, steps) in stages.items()} == {
        "layer1": 2,
        "layer2": 0,
        "layer3": 0,
        "layer4": 0,
    }


class Reshapes(Step):
    """As in Swin: the addition is not the last thing that happens."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return (flat + self.norm(self.conv(x)).flatten(2)).unflatten(2, x.shape[2:])


class Decides(Step):
    """By its values, which no tracing follows."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.conv(x))
        return x + branch if branch.mean() > 0 else x + branch / 2


@pytest.mark.parametrize("block", [Reshapes, Decides], ids=lambda block: block.__name__)
def test_a_block_whose_forward_does_not_tell_is_put_to_the_test(block, assert_same_after_conversion):
    assert assert_same_after_conversion(Net([block(), block()])) == {"layers": ((), ("0", "1"))}


@pytest.mark.parametrize(
    "block",
    [Plain, NormShortcut, ConvShortcut, HalfShortcut, FlippedShortcut, InPlace],
    ids=lambda block: block.__name__,
)
def test_a_block_whose_shortcut_is_not_the_identity_is_not_a_step(block, assert_same_after_conversion):
    stages = assert_same_after_conversion(Net([Step(), block(), Step()]))
    assert stages == {"layers": ((), ("0",)), "layers#2": (("1",), ("2",))}


class StepThenMore(nn.Module):
    """As in FastViT and DaViT: the branch is added to what a residual step of its own gives."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.mixer = nn.Sequential(*(Step() for _ in range(depth))) if depth > 1 else Step()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        return x + self.conv(x)


def test_a_block_of_residual_parts_is_one_step(assert_same_after_conversion):
    stages = assert_same_after_conversion(Net([StepThenMore(), StepThenMore()]))
    assert stages == {"layers": ((), ("0", "1"))}


def test_a_module_that_adds_something_and_runs_a_chain_is_a_container(assert_same_after_conversion):
    class Positioned(nn.Module):
        """As a stage that adds its position embedding."""

        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(CHANNELS, 1, 1))
            self.steps = nn.Sequential(Step(), Step())

        def forward(self, x: Tensor) -> Tensor:
            return self.steps(x + self.position)

    assert assert_same_after_conversion(Net([Positioned()])) == {"layers.0.steps": ((), ("0", "1"))}
    assert assert_same_after_conversion(Net([StepThenMore(2)])) == {"layers.0.mixer": ((), ("0", "1"))}


def test_a_constant_is_not_a_branch(assert_same_after_conversion):
    class Bias(nn.Module):
        """As a table of relative positions."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(CHANNELS, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    assert assert_same_after_conversion(Net([Step(), Bias(), Plain(), Step()])) == {
        "layers": ((), ("0",)),
        "layers#2": (("1", "2"), ("3",)),
    }


def test_blocks_that_look_residual_and_are_left_out_are_named_once_with_their_number(images):
    class Unseen(nn.Module):
        """Its children cannot become transitions."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = InPlace(), InPlace(), NormShortcut()

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x))) * 2

    found = find_stages(Net([Step(), Step(), Unseen()]), images)
    assert [stage.blocks for stage in found.stages] == [("0", "1")]
    assert found.left_out == [
        "layers.2.first (InPlace), like 1 more, writes to its input",
        "layers.2.third (NormShortcut) is a sum of norm (BatchNorm2d), conv (Conv2d), not of its input and a branch",
    ]
    assert find_stages(Net([Step(), Step()]), images).left_out == []


def test_a_norm_without_parameters_is_not_taken_for_the_identity(images):
    assert [stage.blocks for stage in find_stages(Net([Step(), PlainNormShortcut()]), images).stages] == [("0",)]


def test_a_network_without_residual_steps_is_refused_with_the_reason(images):
    net = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1), Plain(), Plain(), nn.Flatten(), nn.Linear(CHANNELS * 256, 5)
    )
    with pytest.raises(ResodeError, match="Sequential has no residual steps.*adds a branch to its input"):
        find_stages(net, images)


def test_a_block_that_runs_twice_is_not_a_step(images):
    shared = Step()
    with pytest.raises(ResodeError, match=r"layers.0 \(Step\), like 1 more, runs in several places"):
        find_stages(Net([shared, Plain(), shared], container=nn.ModuleList), images)


def test_states_that_are_read_elsewhere_too_are_no_stage(images):
    net = KeepsEveryState([Step(), Step()], container=nn.ModuleList)
    with pytest.raises(ResodeError, match=r"layers.0 \(Step\), like 1 more, is in a chain whose states are read by"):
        find_stages(net, images)


def test_a_chain_is_cut_where_one_state_is_read_elsewhere_too(assert_same_after_conversion):
    class ReadsTheMiddle(Net):
        def forward(self, x: Tensor) -> Tensor:
            states = [self.stem(x)]
            for layer in self.layers:
                states.append(layer(states[-1]))
            return self.head((states[2] + states[-1]).mean(dim=(2, 3)))

    net = ReadsTheMiddle([Step() for _ in range(5)], container=nn.ModuleList)
    assert assert_same_after_conversion(net) == {"layers": ((), ("0", "1")), "layers#2": ((), ("2", "3", "4"))}


def test_a_list_that_is_indexed_keeps_its_length(assert_same_after_conversion):
    net = Indexes([Step(), Step(), Plain()], container=nn.ModuleList)
    assert assert_same_after_conversion(net) == {"layers": ((), ("0", "1"))}


def test_steps_that_are_attributes_are_a_stage(assert_same_after_conversion):
    class Attributes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = Step(), Step()  # not in the order in which they run
            self.stem, self.head = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(self.stem(x))).mean(dim=(2, 3)))

    assert assert_same_after_conversion(Attributes()) == {"net": ((), ("first", "second"))}


def test_a_container_with_more_in_its_forward_keeps_it(assert_same_after_conversion):
    class Gated(nn.Module):
        """Covers its steps with more than they are."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Step(), Step()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * x

    assert assert_same_after_conversion(Net([Gated()])) == {"layers.0": ((), ("a", "b"))}


def test_finding_stages_leaves_the_network_as_it_was(images, randomise):
    net = randomise(Net([Step(), Plain(), Step()])).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    find_stages(net, images)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


class Descends(nn.Module):
    """Adds the gradient of a function of its own, and keeps a tensor with a history."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 1)
        self.kept = self.mix.weight * 2

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.mix(y).square().sum(), y, create_graph=True)
        return x + slope


def test_a_block_may_take_gradients_inside_and_keep_what_no_copy_can_hold():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Descends(), Descends()), nn.Flatten(), nn.Linear(8 * 16, 5))
    images = torch.randn(2, 3, 4, 4)
    expected = net(images)
    model, _ = convert(net, example=images)
    assert [stage.spec.depth for stage in model.stages.values()] == [2]
    torch.testing.assert_close(model(images), expected)
