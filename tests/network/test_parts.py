"""Every part of a network is evaluated again, not the steps alone: stem and transitions, under every plan."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resode_cli
from resode_cli.errors import ResodeError
from resode_cli.network.mixing import mixes_images
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.ode import Adjoint, kept_bytes
from resode_cli.ode.memory import LiveBytes

IMAGES, PIXELS, CLASSES = 5, 12, 3
LABELS = torch.tensor([0, 1, 2, 1, 0])


class Block(nn.Module):
    """A residual block; with a shortcut of its own where it changes the width."""

    def __init__(self, width: int, out: int, drop: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Identity() if width == out else nn.Conv2d(width, out, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(self.drop(out)))
        out += self.short(x)
        return F.relu(out)


class Net(nn.Module):
    """A stem of layers and functions, two stages, a head."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.tensor(1.3))  # a parameter of the network's own
        self.layer1 = nn.Sequential(Block(6, 8, drop), Block(8, 8, drop), Block(8, 8, drop))
        self.layer2 = nn.Sequential(Block(8, 10, drop), Block(10, 10, drop))
        self.fc = nn.Linear(10, CLASSES)

    def stem(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.dropout(F.relu(self.bn(self.conv(x))) * self.scale, self.drop, self.training), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class UsesItsStemTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        return self.fc(self.layer2(self.layer1(stem)).mean((2, 3))) + stem.mean((1, 2, 3)).unsqueeze(1)


class HasABranchBesides(Net):
    """Computed before the first stage, and no part of what that is given."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__(drop)
        self.besides = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        besides = torch.tanh(self.besides(x.mean((2, 3))))
        return super().forward(x) + besides


class WritesToItsImages(Net):
    writing = False  # or it would be no function, which `convert` finds out

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(x.mul_(0.5) if self.writing else x)


class MixesImages(Net):
    """In eval mode too."""

    def stem(self, x: Tensor) -> Tensor:
        x = super().stem(x)
        return x - x.mean(0, keepdim=True)


def pair(kind: Callable[..., Net] = Net, drop: float = 0.0) -> tuple[OdeResNet, Net]:
    """A converted network, and its source, with statistics that are not those of a fresh one; in float64."""
    torch.manual_seed(3)
    source = kind(drop).double()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    model, _ = resode_cli.convert(copy.deepcopy(source), example=images())
    return model, source


def images() -> Tensor:
    return torch.randn(IMAGES, 3, PIXELS, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def train(net: nn.Module, x: Tensor | None = None) -> Tensor:
    """Gradients after a forward and a backward pass with fixed random numbers, as one vector."""
    torch.manual_seed(7)
    net.zero_grad()
    F.cross_entropy(net(images() if x is None else x), LABELS).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def assert_trains_alike(model: OdeResNet, source: Net) -> None:
    found, expected = train(model), train(source)
    random = torch.get_rng_state()
    assert (found - expected).norm() <= 1e-13 * expected.norm()
    buffers = {model.file_name(name): b for name, b in model.net.named_buffers()}
    assert all(torch.allclose(buffers[name], b, rtol=1e-13) for name, b in source.named_buffers())
    train(model)
    assert torch.equal(torch.get_rng_state(), random)


EXACT = [Adjoint("checkpoint"), Adjoint("checkpoint", 2), Adjoint("checkpoint", snapshots=1)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("adjoint", EXACT, ids=lambda adjoint: adjoint.label)
def test_gradients_buffers_and_random_numbers_are_backprops(adjoint: Adjoint, drop: float, training: bool):
    model, source = pair(drop=drop)
    model.use_adjoint(adjoint)
    assert_trains_alike(model.train(training), source.train(training))
    assert model.stem.monitor.evaluations == 1 and not any(model.stem.kept.values())
    assert all(stage.entry.monitor.evaluations == 1 for stage in model.stages.values())


@pytest.mark.parametrize("part", ["stem", "layer1", "layer2"])
def test_parts_may_be_planned_one_by_one(part: str):
    model, source = pair(drop=0.3)
    model.use_adjoint({part: Adjoint("checkpoint")})
    assert_trains_alike(model.train(), source.train())
    evaluated = {"stem": model.stem.monitor.evaluations}
    evaluated |= {name: stage.monitor.evaluations for name, stage in model.stages.items()}
    assert {name for name, count in evaluated.items() if count} == {part}


def test_the_graph_keeps_the_inputs_of_its_parts_and_no_more():
    model, _ = pair()
    model.train().use_adjoint(Adjoint("checkpoint"))
    inputs: list[int] = []
    for stage in model.stages.values():
        for block in (*stage.transition, *stage.blocks):
            block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].nbytes))
    x = images()
    model(x)  # the first finds out what can be evaluated again
    inputs.clear()
    with kept_bytes(model.parameters()) as count:
        out = model(x)
    pooled = IMAGES * 10 * 8  # what the head's linear layer keeps
    assert count() == x.nbytes + sum(inputs) + pooled
    out.sum().backward()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (UsesItsStemTwice, "is used beyond the first stage's entry"),
        (HasABranchBesides, "is used beyond the first stage's entry"),
        (WritesToItsImages, "writes to its images"),
    ],
)
def test_a_stem_that_cannot_be_cut_off_keeps_its_activations(kind: type[Net], reason: str):
    model, source = pair(kind)
    model.net.writing = source.writing = True
    model.use_adjoint(Adjoint("checkpoint"))
    assert_trains_alike(model.train(), source.train())
    assert [reason in why for why in model.stem.kept.values()] == [True]
    assert list(model.kept_parts) == ["stem"]
    assert model.stem.monitor.evaluations == 0


def test_a_stem_used_beyond_its_stage_later_on_is_no_silent_loss():
    class Later(Net):
        late = False

        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem(x)
            out = self.fc(self.layer2(self.layer1(stem)).mean((2, 3)))
            return out + stem.square().mean((1, 2, 3)).unsqueeze(1) if self.late else out

    model, _ = pair(Later)
    model.train().use_adjoint(Adjoint("checkpoint"))
    train(model)
    model.net.late = True
    with pytest.raises(ResodeError, match="used beyond that stage's entry"):
        train(model)


def test_two_forward_passes_before_one_backward_and_gradients_of_images():
    model, source = pair(drop=0.3)
    model.use_adjoint(Adjoint("checkpoint"))
    found = []
    for net in (model.train(), source.train()):
        first, second = images().requires_grad_(), (images() * 0.7).requires_grad_()
        torch.manual_seed(1)
        loss = F.cross_entropy(net(first), LABELS) + 2 * F.cross_entropy(net(second), LABELS)
        found.append(torch.autograd.grad(loss, [first, second, *net.parameters()]))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*found, strict=True))


def test_a_retained_graph_gives_the_same_gradient_twice():
    model, _ = pair()
    model.train().use_adjoint(Adjoint("checkpoint"))
    loss = F.cross_entropy(model(images()), LABELS)
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("frozen", ["conv,bn,scale", "layer1.0", "conv,bn,scale,layer1", "layer2.0.conv1"])
def test_frozen_parts_have_no_gradient_and_the_others_theirs(frozen: str):
    model, source = pair()
    model.use_adjoint(Adjoint("checkpoint"))
    names = tuple(frozen.split(","))
    for net, name_of in ((model.net, model.file_name), (source, lambda name: name)):
        for name, p in net.named_parameters():
            p.requires_grad_(not name_of(name).startswith(names))
    assert_trains_alike(model.train(), source.train())


def test_weights_changed_between_the_passes_are_an_error():
    model, _ = pair()
    model.train().use_adjoint(Adjoint("checkpoint"))
    loss = F.cross_entropy(model(images()), LABELS)
    with torch.no_grad():
        model.net.conv.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_is_that_of_the_forward_pass():
    model, _ = pair()
    model.float().train()
    found = []
    for adjoint in (Adjoint("checkpoint"), Adjoint("backprop")):
        model.use_adjoint(adjoint)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images().float()).float(), LABELS)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert torch.equal(*found)


# Slices of the batch


@pytest.mark.parametrize("slices", [2, 3, 5, 64])
def test_slices_of_the_batch_have_backprops_gradient(slices: int):
    model, source = pair()
    model.use_adjoint(Adjoint("checkpoint", slices=slices))
    freeze_batch_norm(model.train())
    freeze_batch_norm(source.train())
    assert_trains_alike(model, source)
    per_part = min(slices, IMAGES)
    assert {stage.monitor.evaluations for stage in model.stages.values()} == {2 * per_part, per_part}


@pytest.mark.parametrize("kind", [Net, MixesImages])
def test_a_part_that_mixes_images_is_not_cut_into_slices(kind: type[Net]):
    model, _ = pair(kind)
    model.train(kind is Net).use_adjoint(Adjoint("checkpoint", slices=2))
    with pytest.raises(ResodeError, match="mixes the images of a batch"):
        model(images())


def test_batch_norm_is_seen_to_mix_images_where_its_scale_is_zero():
    """As in a fresh network, whose blocks hand their state on: the gradient, and the statistics, are the batch's."""
    model, _ = pair()
    stage = model.stages["layer1"]
    with torch.no_grad():
        for block in stage.blocks:
            block.bn2.weight.zero_()
            block.bn2.bias.zero_()
    for tracked in (True, False):
        for module in stage.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = tracked
        x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
        assert mixes_images(stage.blocks[0].train(), stage.blocks[0], x)
    assert not mixes_images(stage.blocks[0].train(), freeze_and_return(stage.blocks[0]), x)


def test_looking_for_images_that_mix_holds_no_two_gradients_at_a_time():
    net = nn.Sequential(nn.Flatten(), *[nn.Linear(300, 300) for _ in range(8)])
    with LiveBytes(net.parameters()) as live:
        assert not mixes_images(net, net, torch.randn(2, 300))
    assert live.peak < 3 * 300 * 300 * 4


def freeze_and_return(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = True
    freeze_batch_norm(block)
    return block


def test_slices_would_draw_other_random_numbers_and_are_refused():
    model, _ = pair(drop=0.3)
    freeze_batch_norm(model.train())
    model.use_adjoint(Adjoint("checkpoint", slices=2))
    with pytest.raises(ResodeError, match="draws random numbers"):
        model(images())


# Codes


@pytest.mark.parametrize("frozen", [True, False])
def test_a_bit_more_halves_the_error_of_coded_states(frozen: bool):
    model, source = pair()
    for net in (model.train(), source.train()):
        if frozen:
            freeze_batch_norm(net)
    expected, errors = train(source), {}
    for bits in (2, 4, 6, 8):
        model.use_adjoint(Adjoint("checkpoint", bits=bits))
        errors[bits] = float((train(model) - expected).norm() / expected.norm())
    assert errors[8] < 0.005
    for bits in (4, 6, 8):
        assert 2 <= errors[bits - 2] / errors[bits] <= 8  # with flipped rectifiers it would be 2 at best


@pytest.mark.parametrize("slices", [1, 2])
def test_codes_take_their_bits_and_the_signs_one_each(slices: int):
    model, _ = pair()
    model.float().train()
    freeze_batch_norm(model)
    x = images().float()
    kept = {}
    for bits in (2, 4):
        model.use_adjoint(Adjoint("checkpoint", bits=bits, slices=slices))
        model(x)
        with kept_bytes(model.parameters()) as count:
            out = model(x)
        kept[bits] = count()
        out.sum().backward()
    numbers = IMAGES * (PIXELS // 2) ** 2 * (6 + 8 + 8 + 8 + 10)  # of the inputs of two transitions and three steps
    assert kept[4] - kept[2] == pytest.approx(numbers * 2 / 8, rel=0.05)


def test_coded_states_go_with_heun_with_bf16_and_with_the_other_order_in_memory():
    model, _ = pair()
    model.float().train()
    model.use_scheme("heun")
    model.use_channels_last()
    found = []
    for adjoint in (Adjoint("backprop"), Adjoint("checkpoint", bits=8)):
        model.use_adjoint(adjoint)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images().float()).float(), LABELS)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert (found[0] - found[1]).norm() <= 0.03 * found[0].norm()


def test_a_compiled_stage_shows_no_signs():
    model, _ = pair()
    model.compile_branches(backend="eager")
    model.train().use_adjoint(Adjoint("checkpoint", bits=4))
    with pytest.raises(ResodeError, match="runs compiled"):
        model(images())


def test_every_part_that_does_not_repeat_itself_is_an_error():
    """A number that changes from call to call, in the stem and in a transition."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * (1 + 0.5 * self.calls)

    for where in ("bn", "layer1.0.bn1"):
        model, _ = pair()
        model.train().use_adjoint(Adjoint("checkpoint"))
        name = next(n for n, _ in model.net.named_modules() if model.file_name(f"{n}.x") == f"{where}.x")
        owner, _, child = name.rpartition(".")
        norm = model.net.get_submodule(name)
        model.net.get_submodule(owner).register_module(child, nn.Sequential(norm, Counting()))
        with pytest.raises(ResodeError, match="gives another result than in the forward pass"):
            train(model)
