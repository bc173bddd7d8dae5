"""When traced code may stand for a block, when the block is called instead, and when a network is refused."""

from __future__ import annotations

import copy
import itertools
import os
import random
import time
from types import SimpleNamespace

import numpy
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resode_cli
from resode_cli.errors import ResodeError
from resode_cli.network.reading import read, runs_its_children
from resode_cli.ode import Adjoint
from resode_cli.surgery.rewrite import deepen, tie, untie

WIDTH = 12
COUNTER, LOG = itertools.count(), []
FLAGS, FACTOR, SETTINGS = {"half": False}, 1.0, SimpleNamespace(factor=1.0)


def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.p, self.times = nn.Linear(WIDTH, WIDTH), 0.5, 0.25, 1
        self.generator, self.numbers = torch.Generator(), numpy.random.default_rng(0)
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.scale * self.layer(x) * self.times)


class Torch(Block):
    def forward(self, x):
        return x + self.layer(x) * (2 if torch.rand(()) > 0.5 else 3)


class Numpy(Block):
    def forward(self, x):
        return x + self.layer(x) * float(numpy.random.rand())


class Python(Block):
    def forward(self, x):
        return x + self.layer(x) * random.random()


class Training(Block):
    def forward(self, x):
        return x + self.layer(x) * (random.random() if self.training else 1.0)


class OwnTorch(Block):
    def forward(self, x):
        return x + self.layer(x) * float(torch.rand((), generator=self.generator))


class OwnNumpy(Block):
    def forward(self, x):
        return x + self.layer(x) * self.numbers.random()


class Counts(Block):
    def forward(self, x):
        return x + self.layer(x) * next(COUNTER)


class Writes(Block):
    def forward(self, x):
        self.log.append(1)
        return x + self.layer(x)


class WritesElsewhere(Block):
    def forward(self, x):
        LOG.append(1)
        return x + self.layer(x)


class Sets(Block):
    def forward(self, x):
        self.times += 1
        return x + self.layer(x)


class Clock(Block):
    def forward(self, x):
        return x + self.layer(x) * time.monotonic()


class Detached(Block):
    def forward(self, x):
        with torch.no_grad():
            out = self.layer(x)
        return x + out


class Recorded(Block):
    def forward(self, x):
        with torch.enable_grad():
            out = self.layer(x)
        return x + out


class HighPrecision(Block):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            out = self.layer(x)
        return x + out


class Asks(Block):
    def forward(self, x):
        return x + (self.layer(x) if torch.is_grad_enabled() else 2 * self.layer(x))


WHOLE = [Torch, Numpy, Python, Training, OwnTorch, OwnNumpy, Counts, Writes, WritesElsewhere, Sets, Clock]
WHOLE += [Detached, Recorded, HighPrecision, Asks]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.__name__)
def test_a_forward_that_a_trace_says_too_little_of_is_called(kind, training):
    block = kind().train(training)
    states = random.getstate(), torch.get_rng_state(), str(numpy.random.get_state())
    reading = read(block)
    assert reading.split is None and reading.unclear
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert str(numpy.random.get_state()) == states[2]


@pytest.mark.parametrize("kind", [Detached, Recorded, Asks, Training, Sets], ids=lambda kind: kind.__name__)
def test_a_block_that_is_called_has_its_gradients(kind):
    net = rows_of(kind(), kind())
    model, _ = resode_cli.convert(copy.deepcopy(net), example=grey())
    for each in (net, model):
        torch.manual_seed(0), random.seed(0)
        each.train()(grey()).square().sum().backward()
    for a, b in zip(model.parameters(), net.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def rows_of(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), *blocks, nn.Linear(WIDTH, 3))


def grey() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Skips(nn.Module):
    """Stochastic depth by the loop over the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x):
        x = self.embed(x.flatten(1))
        for block in self.blocks:
            if not (self.training and torch.rand(()) > 0.5):
                x = block(x)
        return self.head(x)


class OnlyInTraining(nn.Sequential):
    def forward(self, x):
        for i, block in enumerate(self):
            x = block(x) if not (self.training and i == 2) else x
        return x


@pytest.mark.parametrize(
    "net", [Skips(), OnlyInTraining(*rows_of(Block(), Block()))], ids=["draws", "goes by the mode"]
)
def test_a_loop_that_does_more_in_train_mode_is_refused(net):
    with pytest.raises(
        ResodeError,
        match="does not run its blocks one after the other|in train mode .* does not agree",
    ):
        resode_cli.convert(net, example=grey())


@pytest.mark.parametrize("kind", [OwnTorch, OwnNumpy, Counts], ids=lambda kind: kind.__name__)
def test_a_network_that_never_answers_twice_alike_is_refused(kind):
    with pytest.raises(ResodeError, match="does not agree"):
        resode_cli.convert(rows_of(kind(), kind()), example=grey())


class Chance(nn.Sequential):
    def forward(self, x):
        for block in self:
            if not (self.training and random.random() > 0.99):
                x = block(x)
        return x


def test_a_sequence_with_a_say_of_its_own_is_not_one_that_runs_its_children():
    assert not runs_its_children(Chance(Block(), Block()).eval())
    assert not runs_its_children(Chance(Block(), Block()).train())


def test_verifying_leaves_the_network_as_it_was():
    net = rows_of(Sets(), nn.BatchNorm1d(WIDTH), Block())
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(1), random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    model, _ = resode_cli.convert(net, example=grey())
    found = model.file_state()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [m.times for m in model.modules() if isinstance(m, Block)] == [1, 1]


@pytest.mark.parametrize("form", ["exact", "pre"])
def test_a_number_is_read_as_it_is_and_the_code_stays(form):
    model, _ = resode_cli.convert(rows_of(Block(), Block()), example=grey(), form=form)
    (stage,) = model.stages.values()
    branch, x = stage.splits[0].branch, torch.randn(2, WIDTH)
    for scale in (0.0, 3.0, 0.5):
        stage.blocks[0].scale = scale
        r = stage.residuals()[0]
        layer = stage.blocks[0].layer
        expected = scale * layer(F.relu(x)) if form == "pre" else F.relu(x + scale * layer(x)) - x
        torch.testing.assert_close(r(x), expected)
        assert r.branch is branch


def test_what_is_decided_anew_in_pre_form_is_read_anew():
    model, _ = resode_cli.convert(rows_of(Block(), Block()), example=grey(), form="pre")
    (stage,) = model.stages.values()
    stage.blocks[0].times, x = 3, torch.randn(2, WIDTH)
    torch.testing.assert_close(stage.residuals()[0](x), 1.5 * stage.blocks[0].layer(F.relu(x)))


@pytest.mark.parametrize("change", [("scale", 2.0), ("times", 3)], ids=["a number", "a decision"])
@pytest.mark.parametrize(
    "rewrite",
    [
        lambda stage: deepen(stage, 6),
        lambda stage: deepen(stage, 5, mode="interpolate", depth_weights="linear"),
        lambda stage: untie(deepen(stage, 6)),
        lambda stage: tie(deepen(stage, 6)),
        lambda stage: tie(stage),
        copy.deepcopy,
    ],
    ids=["deepened", "linear", "untied", "tied deep", "tied", "copied"],
)
def test_rewritten_stages_follow_their_blocks_too(rewrite, change):
    model, _ = resode_cli.convert(rows_of(Block(), Block()), example=grey())
    (stage,) = model.stages.values()
    stage = rewrite(stage)
    for block in stage.blocks:
        setattr(block, *change)
    x = torch.randn(3, WIDTH)
    factor = {"scale": 2.0, "times": 0.5 * 3}[change[0]]
    for n in range(stage.spec.depth):
        b, w = stage.spec.schedule[n], stage.spec.blends[n] if stage.spec.blends else 0.0
        first, second = [stage.blocks[min(k, len(stage.blocks) - 1)].layer(x) for k in (b, b + 1)]
        expected = F.relu(x + factor * torch.lerp(first, second, w)) - x
        torch.testing.assert_close(stage.field().residuals[stage.field().schedule[n]](x), expected)


def test_a_number_changed_between_forward_and_backward_is_an_error():
    model, _ = resode_cli.convert(rows_of(Block(), Block()), example=grey())
    (stage,) = model.stages.values()
    model.use_adjoint(Adjoint("checkpoint"))
    loss = model(grey()).sum()
    stage.blocks[1].scale = 0.25
    with pytest.raises(ResodeError, match="scale of block Block was changed between the forward pass"):
        loss.backward()
    model.use_adjoint(Adjoint("backprop"))
    loss = model(grey()).sum()
    stage.blocks[1].scale = 0.5
    loss.backward()


class Global(Block):
    factor = 1.0

    def forward(self, x):
        return x + self.layer(x) * (0.5 if FLAGS["half"] else 1.0) * FACTOR * SETTINGS.factor * self.factor


class Helper(Block):
    def forward(self, x):
        return x + doubled(self.layer(x))


class Environment(Block):
    def forward(self, x):
        return x + self.layer(x) * float(os.environ.get("RESODE_FACTOR", "1"))


def made_with(factor: float) -> type[Block]:
    def forward(self, x):
        return x + factor * self.layer(x)

    def change():
        nonlocal factor
        factor = 3.0

    return type("Closure", (Block,), {"forward": forward, "change": staticmethod(change)})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Block, lambda patch: patch.setattr(Block, "forward", lambda self, x: x - self.layer(x))),
        (Global, lambda patch: patch.setitem(FLAGS, "half", True)),
        (Global, lambda patch: patch.setitem(globals(), "FACTOR", 3.0)),
        (Global, lambda patch: patch.setattr(SETTINGS, "factor", 3.0)),
        (Global, lambda patch: patch.setattr(Global, "factor", 3.0)),
        (Helper, lambda patch: patch.setitem(globals(), "doubled", torch.sin)),
        (Environment, lambda patch: patch.setenv("RESODE_FACTOR", "3")),
        (made_with(0.5), lambda _: None),
    ],
    ids=["class", "dictionary", "global", "object", "class attribute", "function", "environment", "closure"],
)
def test_what_changes_outside_a_block_is_followed(kind, change, monkeypatch):
    net = rows_of(kind(), kind())
    model, _ = resode_cli.convert(copy.deepcopy(net), example=grey())
    before = net(grey())
    assert torch.equal(model(grey()), before)
    change(monkeypatch)
    getattr(kind, "change", lambda: None)()
    assert torch.equal(model(grey()), net(grey()))
    assert not torch.equal(net(grey()), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_stage_follows_its_blocks():
    net = rows_of(Block(), Block())
    model, _ = resode_cli.convert(copy.deepcopy(net), example=grey())
    model.compile_branches(backend="eager")
    (stage,) = model.stages.values()
    for name, value in (("scale", 0.25), ("times", 3), ("scale", 0.75)):
        for block in (*stage.blocks, net[2], net[3]):
            setattr(block, name, value)
        torch.testing.assert_close(model(grey()), net(grey()))


def test_an_exported_program_is_of_the_blocks_as_they_are():
    net = rows_of(Block(), Block())
    model, _ = resode_cli.convert(copy.deepcopy(net), example=grey())
    (stage,) = model.stages.values()
    for block in (*stage.blocks, net[2], net[3]):
        block.scale, block.times = 0.25, 3
    program = torch.export.export(model.eval(), (grey(),))
    torch.testing.assert_close(program.module()(grey()), net(grey()))


def test_timms_blocks_are_read_and_follow_its_drop_path():
    net = timm.create_model("resnet18", num_classes=5, drop_path_rate=0.3).double()
    model, _ = resode_cli.convert(copy.deepcopy(net), example=torch.randn(2, 3, 32, 32).double())
    assert {rule.activation for stage in model.stages.values() for rule in stage.splits} == {"relu"}
    rules = [stage.splits for stage in model.stages.values()]
    for each in (net, model):
        for module in each.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.7
    model.use_adjoint(Adjoint("checkpoint"))
    images, losses = torch.randn(3, 3, 32, 32).double(), []
    for each in (net, model):
        torch.manual_seed(0)
        losses.append(each.train()(images).square().sum())
        losses[-1].backward()
    assert torch.equal(*losses)
    assert all(
        a is b
        for stage, old in zip(model.stages.values(), rules, strict=True)
        for a, b in zip(stage.splits, old, strict=True)
    )
