"""Compiled steps: one compilation for all blocks of a structure, the gradients of uncompiled ones; channels-last."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.network.reading import read_split
from resode_cli.network.specs import BlockSpec, StageSpec
from resode_cli.network.stage import OdeStage
from resode_cli.ode import SCHEMES, Adjoint
from resode_cli.surgery.rewrite import deepen, untie

METHODS = [
    Adjoint("backprop"),
    Adjoint("checkpoint"),
    Adjoint("checkpoint", 3),
    Adjoint("checkpoint", snapshots=2),
    Adjoint("multistep"),
    Adjoint("pc", 4),
    Adjoint("euler"),
]
# dynamo reads the .grad of tensors that are no leaves, and hides the warning in a way that errors get past.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
ALL_METHODS = pytest.mark.parametrize("adjoint", METHODS, ids=lambda adjoint: adjoint.label)


class Counter:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.compiled += 1
        return graph.forward


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(torch.tanh(self.conv(x)), 0.4, self.training)


class Shrinks(Draws):
    """No shortcut at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) / 100


class Branches(Draws):
    """Decides by the values of a tensor, which no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + (y if y.sum() > 0 else -y)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a record of every line that dynamo traces in pytest's report, and without threads for tiny tensors."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stage(tiny: OdeResNet) -> OdeStage:
    """Three blocks, five steps of size 3/5, in train mode and float64."""
    return deepen(tiny.stages["layer1"], 5).double().train()


@pytest.fixture
def state() -> Tensor:
    return torch.rand(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def make_stage(block: nn.Module, *, horizon: int = 1) -> OdeStage:
    """Two steps of one block."""
    distinct = BlockSpec("0", "0")
    spec = StageSpec("layer1", "layer1", (), ("0",), (distinct,), (0, 0), Fraction(horizon))
    return OdeStage(spec, transition={}, blocks=[block], splits=[read_split(block)]).double().train()


def gradients(stage: nn.Module, adjoint: Adjoint, x: Tensor) -> dict[str, Tensor]:
    """x_N, and the gradient of ½‖x_N‖² by every parameter that is not frozen and by the input, 'x'."""
    stage.use_adjoint(adjoint)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(3)
    out = stage(leaf)
    named = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(out.square().sum() / 2, [leaf, *named.values()])
    return {"out": out.detach(), **dict(zip(("x", *named), found, strict=True))}


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --- one compilation ---------------------------------------------------------------------------------------


def test_one_compilation_serves_forty_blocks(build_tiny):
    """The steps on the tape; the recorded steps and the taped evaluations; and a reversal's evaluations."""
    stage = untie(deepen(build_tiny("make_long").stages["layer1"], 40)).train()
    assert len(stage.blocks) == 40
    stage.compile_branch(backend=(counter := Counter()))
    seen = []
    for method in ("backprop", "checkpoint", "pc", "multistep", "checkpoint"):
        gradients(stage, Adjoint(method), torch.rand(2, 2, 4, 4))
        seen.append(counter.compiled)
    assert seen == [1, 2, 4, 4, 4]


def test_a_graph_is_compiled_again_only_for_what_changes_it(stage, state):
    stage.compile_branch(backend=(counter := Counter()))

    def compiled(x: Tensor = state, taken: OdeStage = stage) -> int:
        before = counter.compiled
        gradients(taken, Adjoint("checkpoint"), x)
        return counter.compiled - before

    assert [compiled(), compiled()] == [1, 0]
    assert compiled(taken=copy.deepcopy(stage)) == 0
    assert [compiled(state[:2]), compiled(state[:2]), compiled()] == [1, 0, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [compiled(), compiled()] == [1, 0]
    stage.eval()
    assert [compiled(), compiled()] == [1, 0]
    stage.train()
    for p in stage.blocks[1].parameters():
        p.requires_grad_(False)
    assert [compiled(), compiled()] == [1, 0]


def test_many_structures_are_more_graphs_and_not_an_error(build_tiny):
    """dynamo's own limit is 8 graphs for one function; past it, it runs uncompiled without saying so."""
    stage = untie(deepen(build_tiny("make_long").stages["layer1"], 10)).train()
    for i, block in enumerate(stage.blocks):
        block.bn2.momentum = 0.01 * (i + 1)
    stage.compile_branch(backend=(counter := Counter()))
    gradients(stage, Adjoint("backprop"), torch.rand(2, 2, 4, 4))
    assert counter.compiled == len(stage.blocks) == 10


# --- correctness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_gradients_and_buffers_are_those_of_uncompiled_blocks(scheme, stage, state):
    """All methods in one test, since they share the compiled graphs."""
    stage.use_scheme(scheme)
    compiled = copy.deepcopy(stage)
    compiled.compile_branch(backend="aot_eager")
    passes = (*METHODS[:-1], Adjoint(scheme), *METHODS[:2])
    for adjoint in passes:
        expected = gradients(stage, adjoint, state)
        found = gradients(compiled, adjoint, state)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-12), f"{adjoint.label}: {name}"
        assert_same(dict(compiled.named_buffers()), dict(stage.named_buffers()))
    updates = sum(int(block.bn1.num_batches_tracked) - 7 for block in compiled.blocks)
    assert updates == len(passes) * stage.spec.depth * SCHEMES[scheme].evaluations


def test_frozen_blocks_stay_frozen(stage, state):
    for p in stage.blocks[0].parameters():
        p.requires_grad_(False)
    expected = gradients(stage, Adjoint("pc", 2), state)
    stage.compile_branch(backend="aot_eager")
    assert_same(gradients(stage, Adjoint("pc", 2), state), expected)


def test_autocast_is_entered_again_in_the_backward_pass(stage, state):
    stage, state = stage.float().eval(), state.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(stage, Adjoint("checkpoint"), state)
    stage.compile_branch(backend="aot_eager")
    stage.use_adjoint(Adjoint("checkpoint"))
    leaf = state.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stage(leaf)
    assert out.dtype == torch.float32
    found = torch.autograd.grad(out.square().sum() / 2, leaf)[0]  # outside of autocast
    torch.testing.assert_close(found, expected["x"], rtol=1e-5, atol=1e-6)


def test_a_step_of_size_one_is_the_block_itself(state):
    """To the last bit with a backend that changes no formula: not x + (B(x) - x), which rounds."""
    stage = make_stage(Shrinks(), horizon=2)
    (block,) = stage.blocks
    stage.compile_branch(backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(stage(state), block(block(state)))


def test_random_blocks_train_by_backprop_only(state):
    stage = make_stage(Draws())
    expected = gradients(stage, Adjoint("backprop"), state)
    stage.compile_branch(backend="aot_eager")
    assert_same(gradients(stage, Adjoint("backprop"), state), expected)
    with pytest.raises(ResodeError, match="Draws draws random numbers.*leave out --compile"):
        gradients(stage, Adjoint("checkpoint"), state)
    assert gradients(stage.eval(), Adjoint("checkpoint"), state)


@pytest.mark.slow
def test_the_real_compiler(stage, state):
    adjoint, compiled = Adjoint("checkpoint"), copy.deepcopy(stage)
    compiled.compile_branch()
    found, expected = gradients(compiled, adjoint, state), gradients(stage, adjoint, state)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    buffers, expected = dict(compiled.named_buffers()), dict(stage.named_buffers())
    torch.testing.assert_close(buffers, expected, rtol=1e-8, atol=1e-10)
    random = make_stage(Draws())
    random.compile_branch()
    with pytest.raises(ResodeError, match="Draws draws random numbers"):
        gradients(random, adjoint, state)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "nope"}, "torch.compile: Invalid backend: 'nope'"),
        ({"nope": 1}, "unexpected keyword argument 'nope'"),
        ({"mode": "nope"}, "unknown mode 'nope' of torch.compile .allowed: default"),
        ({"mode": "reduce-overhead"}, "CUDA graphs overwrite"),
        ({"options": {"triton.cudagraphs": True}}, "CUDA graphs overwrite"),
        ({"options": {"nope": 1}}, "torch.compile: Unexpected optimization option nope"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_are_refused_in_one_line(options, message, stage):
    with pytest.raises(UsageError, match=message) as caught:
        stage.compile_branch(**options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250
    assert stage.compilation is None


def test_a_block_that_is_not_one_graph_is_named(state):
    stage = make_stage(Branches())
    stage.compile_branch(backend="eager")
    with pytest.raises(ResodeError, match="block Branches cannot be compiled: .*; leave out --compile") as caught:
        gradients(stage, Adjoint("checkpoint"), state)
    assert "\n" not in str(caught.value)


# --- the model stays what it was ---------------------------------------------------------------------------


def test_names_files_and_copies_are_those_of_an_uncompiled_model(tiny, images, tmp_path):
    tiny.eval()
    model_file.save(tiny, tmp_path / "before.safetensors")
    tiny.compile_branches(backend="eager")
    with torch.no_grad():
        expected = tiny(images)
    model_file.save(tiny, tmp_path / "after.safetensors")
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
    stage = tiny.stages["layer2"]
    again = pickle.loads(pickle.dumps(stage))
    assert again.compilation.options == {"backend": "eager"}
    x = torch.rand(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(tiny)(images), expected)
        assert torch.equal(again(x), stage(x))


def test_a_stage_put_in_a_compiled_ones_place_is_compiled(tiny, images):
    tiny.compile_branches(backend=(counter := Counter()))
    for name, stage in tiny.stages.items():
        tiny.replace_stage(name, deepen(stage, 6))
    with torch.no_grad():
        tiny.eval()(images)
    assert counter.compiled == len(tiny.stages)


# --- channels-last -----------------------------------------------------------------------------------------


def order(x: Tensor) -> str:
    return "channels last" if x.is_contiguous(memory_format=torch.channels_last) else "other"


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@ALL_METHODS
def test_states_and_adjoints_stay_channels_last(adjoint, scheme, tiny, images):
    """A state or an adjoint in the other order would be converted in every step."""
    if adjoint.method == "euler" and scheme == "heun":
        adjoint = Adjoint("heun")
    for name, stage in tiny.stages.items():
        tiny.replace_stage(name, deepen(stage, 6))
    tiny.use_channels_last()
    tiny.train().use_scheme(scheme)
    tiny.use_adjoint(adjoint)
    seen: dict[str, set[str]] = {"states": set(), "adjoints": set(), "gradients of branches": set()}

    def watch_state(module: nn.Module, arguments: tuple[Tensor]) -> None:
        seen["states"].add(order(arguments[0]))

    def watch_adjoint(module: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
        arguments[0].register_hook(lambda adjoint: seen["adjoints"].add(order(adjoint)))

    def watch_branch(module: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda adjoint: seen["gradients of branches"].add(order(adjoint)))

    for stage in tiny.stages.values():
        stage.register_forward_hook(watch_adjoint)
        for block in stage.blocks:
            block.conv1.register_forward_pre_hook(watch_state)
            block.bn2.register_forward_hook(watch_branch)
    tiny(images).square().sum().backward()
    assert seen == dict.fromkeys(seen, {"channels last"})


@pytest.mark.parametrize("adjoint", [Adjoint("checkpoint"), Adjoint("pc", 2)], ids=lambda adjoint: adjoint.label)
def test_channels_last_changes_no_gradient(adjoint, tiny, images):
    tiny.double().train()
    other = copy.deepcopy(tiny)
    other.use_channels_last()
    assert_same(gradients(other, adjoint, images.double()), gradients(tiny, adjoint, images.double()))
