"""The rules of a stage's backward pass: parameters, buffers, random layers, autocast, autograd's contract."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from resode_cli.errors import ResodeError
from resode_cli.ode import EULER, METHODS, SCHEMES, Adjoint, required_scheme
from resode_cli.ode.field import Evaluator

CASES = [(method, scheme) for scheme in SCHEMES for method in METHODS[1:] if required_scheme(method) in (None, scheme)]
PLANS = [
    Adjoint("checkpoint"),
    Adjoint("checkpoint", snapshots=2),
    Adjoint("euler"),
    Adjoint("pc"),
    Adjoint("multistep"),
]
PLANNED = pytest.mark.parametrize("adjoint", PLANS, ids=lambda adjoint: adjoint.label)
EXACT = pytest.mark.parametrize(
    "adjoint",
    [Adjoint("checkpoint"), Adjoint("checkpoint", 2), Adjoint("checkpoint", snapshots=2)],
    ids=["all", "every 2", "2 snapshots"],
)
SCHEDULES = pytest.mark.parametrize("schedule", [(0, 0, 0), (0, 1, 2), (0, 0, 1)], ids=["tied", "untied", "runs"])
BACKPROP = Adjoint("backprop")


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --- 1. parameters -----------------------------------------------------------------------------------------


@SCHEDULES
@EXACT
@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_exact_methods_give_backprops_gradient(horizon, scheme, adjoint, schedule, make_stage, images, stage_gradients):
    stage = make_stage(schedule, scheme=scheme, horizon=horizon)
    assert_same(stage_gradients(stage, adjoint, images), stage_gradients(stage, BACKPROP, images))


@PLANNED
def test_a_tied_parameter_gets_its_gradient_once(adjoint, make_stage, images):
    stage = make_stage((0,) * 5)
    stage.use_adjoint(adjoint)
    arrivals = {name: 0 for name, _ in stage.named_parameters()}

    def count(name):
        def hook(_):
            arrivals[name] += 1

        return hook

    for name, p in stage.named_parameters():
        p.register_post_accumulate_grad_hook(count(name))
    stage(images).square().sum().backward()
    assert set(arrivals.values()) == {1}


@PLANNED
def test_frozen_parameters_get_none_and_the_others_what_they_would(adjoint, make_stage, images):
    stage, leaf = make_stage((0, 1, 0)), images.clone().requires_grad_()
    stage.use_adjoint(adjoint)
    stage(leaf).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.zero_grad()
    frozen = {"0.conv1.weight", "1.bn2.bias"}
    for name in frozen:
        stage.get_parameter(name).requires_grad_(False)
    stage(leaf).square().sum().backward()
    assert {name for name, p in stage.named_parameters() if p.grad is None} == frozen
    for name in expected.keys() - frozen:
        assert_same(stage.get_parameter(name).grad, expected[name])


@PLANNED
def test_only_the_input_may_need_a_gradient(adjoint, make_stage, images, stage_gradients):
    stage = make_stage((0, 1, 0))
    expected = stage_gradients(stage, adjoint, images)["x"]
    stage.requires_grad_(False)
    assert_same(stage_gradients(stage, adjoint, images)["x"], expected)


@PLANNED
def test_only_the_parameters_may_need_a_gradient(adjoint, make_stage, images, stage_gradients):
    stage = make_stage((0, 1, 0))
    expected = stage_gradients(stage, adjoint, images)
    torch.manual_seed(3)
    stage(images).square().sum().div(2).backward()
    assert_same({"x": expected["x"], **{name: p.grad for name, p in stage.named_parameters()}}, expected)


# --- 2, 3. buffers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [(0, 0, 0, 0), (0, 1, 2, 3)], ids=["tied", "untied"])
@pytest.mark.parametrize("anchors", [None, 2])
@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_batch_statistics_move_as_under_backprop(method, scheme, anchors, schedule, make_stage, images):
    reference = make_stage(schedule, scheme=scheme)
    stage = copy.deepcopy(reference)
    before = {name: b.clone() for name, b in stage.named_buffers()}
    stage.use_adjoint(Adjoint(method, anchors))
    for _ in range(2):
        reference(images).square().sum().backward()
        stage(images).square().sum().backward()
    assert dict(stage.named_buffers()).keys() == dict(reference.named_buffers()).keys()
    for name, buffer in stage.named_buffers():
        assert torch.equal(buffer, reference.get_buffer(name)), name
        assert not torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_frozen_statistics_stay(method, scheme, make_stage, images):
    stage = make_stage((0, 1, 0), scheme=scheme)
    stage(images)  # statistics that are not the initial ones
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {name: b.clone() for name, b in stage.named_buffers()}
    stage.use_adjoint(Adjoint(method))
    stage(images).square().sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in stage.named_buffers())


@EXACT
def test_frozen_statistics_give_backprops_gradient(adjoint, make_stage, images, stage_gradients):
    stage = make_stage((0, 1, 0))
    stage(images)
    stage.eval()
    assert_same(stage_gradients(stage, adjoint, images), stage_gradients(stage, BACKPROP, images))


@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_modules_keep_their_mode_and_their_own_buffers(method, scheme, make_stage, images):
    stage = make_stage((0, 1, 0), scheme=scheme)
    stage.get_submodule("1.bn2").eval()
    modes = [m.training for m in stage.modules()]
    buffers = [id(b) for b in stage.buffers()]  # DistributedDataParallel broadcasts these very tensors
    stage.use_adjoint(Adjoint(method))
    stage(images).square().sum().backward()
    assert [m.training for m in stage.modules()] == modes
    assert [id(b) for b in stage.buffers()] == buffers


def test_buffers_come_back_after_a_backward_that_failed(make_stage, images):
    stage = make_stage((0, 0))
    stage.use_adjoint(Adjoint("checkpoint"))
    out = stage(images)
    buffers = [id(b) for b in stage.buffers()]
    before = [b.clone() for b in stage.buffers()]
    handle = stage.get_submodule("0.bn2").register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    handle.remove()
    assert [id(b) for b in stage.buffers()] == buffers
    assert all(torch.equal(a, b) for a, b in zip(stage.buffers(), before, strict=True))


# --- 4. random layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["DropoutModule", "DropoutFunction"])
@pytest.mark.parametrize("scheme", ["euler", "heun"])
@EXACT
def test_dropout_replays_the_forward_pass(adjoint, scheme, block, make_block, make_stage, images, stage_gradients):
    stage = make_stage((0, 0, 1, 1), blocks=[make_block(block), make_block(block)], scheme=scheme, horizon=2)
    assert_same(stage_gradients(stage, adjoint, images), stage_gradients(stage, BACKPROP, images))


@pytest.mark.parametrize("block", ["DropoutModule", "DropoutFunction"])
@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_the_generator_ends_where_backprop_leaves_it(
    method, scheme, block, make_block, make_stage, images, stage_gradients
):
    stage = make_stage((0, 0, 0), blocks=[make_block(block)], scheme=scheme)
    stage_gradients(stage, BACKPROP, images)
    expected = torch.get_rng_state()
    stage_gradients(stage, Adjoint(method), images)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("block", ["DropoutModule", "DropoutFunction"])
def test_only_evaluations_that_draw_keep_generator_state(block, make_block, make_stage, images):
    stage = make_stage((0, 1, 0, 1, 1), blocks=[make_block("Plain"), make_block(block)])

    def stashed():
        r, x = Evaluator(stage.field(), recording=True), images
        for n in range(5):
            x = EULER.advance(r, n, x)
        return set(r.draws)

    assert stashed() == {(1, 0), (3, 0), (4, 0)}
    stage.eval()
    assert stashed() == set()


# --- 5. autocast -------------------------------------------------------------------------------------------


def norm_difference(found, expected):
    a, b = (torch.cat([t.flatten() for t in gradients.values()]) for gradients in (found, expected))
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def cast_gradients(make_stage, images):
    """Gradients of a stage run under bf16, and the dtypes its convolutions returned in the backward pass."""

    def run(adjoint, *, inside, schedule=(0, 1, 0)):
        torch.manual_seed(5)
        stage, leaf = make_stage(schedule, dtype=torch.float32), images.float().requires_grad_()
        stage.use_adjoint(adjoint)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = stage(leaf)
        assert out.dtype == torch.float32
        seen = set()
        for name in ("0.conv1", "0.conv2"):
            stage.get_submodule(name).register_forward_hook(lambda module, args, result: seen.add(result.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            out.square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in stage.parameters())
        return {"x": leaf.grad, **{name: p.grad for name, p in stage.named_parameters()}}, seen

    return run


@EXACT
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_gives_backprops_gradient(inside, adjoint, cast_gradients):
    expected, _ = cast_gradients(BACKPROP, inside=False)
    found, seen = cast_gradients(adjoint, inside=inside)
    assert seen == {torch.bfloat16}
    assert norm_difference(found, expected) < 1e-2  # bf16 has 8 bits: 4e-3 is one of its roundings


@pytest.mark.parametrize("method", ["euler", "pc", "multistep"])
def test_autocast_is_entered_again_for_reconstruction(method, cast_gradients):
    _, seen = cast_gradients(Adjoint(method), inside=False)
    assert seen == {torch.bfloat16}


@PLANNED
def test_a_float32_forward_is_not_reevaluated_in_bf16(adjoint, make_stage, images):
    stage = make_stage(dtype=torch.float32)
    stage.use_adjoint(adjoint)
    out, seen = stage(images.float()), set()
    stage.get_submodule("0.conv1").register_forward_hook(lambda module, args, result: seen.add(result.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.square().sum().backward()
    assert seen == {torch.float32}


@pytest.mark.parametrize("horizon", [2, 1], ids=["h=1", "h=1/2"])
@pytest.mark.parametrize("method", ["backprop", "checkpoint", "pc", "multistep"])
@pytest.mark.parametrize("returns", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_stays_float32_whatever_the_block_returns(returns, method, horizon, make_block, make_stage, images):
    block = make_block("Plain") if returns == torch.float32 else nn.Conv2d(4, 4, 3, padding=1)
    stage = make_stage((0, 0), blocks=[block], horizon=horizon, dtype=torch.float32)
    stage.use_adjoint(Adjoint(method))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(images.float()).dtype == returns
        found = {stage(images.float()).dtype, stage(images.bfloat16()).dtype}
    assert found == {torch.float32}


# --- 6. autograd's contract --------------------------------------------------------------------------------


@PLANNED
def test_two_forwards_before_one_backward(adjoint, make_stage, images, stage_gradients):
    stage, other = make_stage((0, 1, 0)).eval(), images.flip(0).sqrt()
    first, second = (stage_gradients(stage, adjoint, x) for x in (images, other))
    loss = stage(images).square().sum() / 2 + stage(other).square().sum() / 2
    names = list(dict(stage.named_parameters()))
    found = dict(zip(names, torch.autograd.grad(loss, list(stage.parameters())), strict=True))
    assert_same(found, {name: first[name] + second[name] for name in names})


@pytest.mark.parametrize(
    "adjoint",
    [*PLANS, *(Adjoint(method, 2) for method in ("checkpoint", "euler", "pc", "multistep"))],
    ids=lambda adjoint: adjoint.label,
)
def test_a_retained_graph_gives_the_same_gradient_twice(adjoint, make_block, make_stage, images):
    stage = make_stage((0, 0, 1, 0, 0, 0), blocks=[make_block("DropoutModule"), make_block("Plain")])
    stage.use_adjoint(adjoint)
    loss = stage(images).square().sum()
    parameters = list(stage.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@PLANNED
def test_double_backward_is_refused(adjoint, make_stage, images):
    stage = make_stage()
    stage.use_adjoint(adjoint)
    loss = stage(images).square().sum()
    with pytest.raises(ResodeError, match="double backward.*'backprop'"):
        torch.autograd.grad(loss, list(stage.parameters()), create_graph=True)


@PLANNED
def test_parameters_changed_in_place_are_refused(adjoint, make_stage, images):
    stage = make_stage()
    stage.use_adjoint(adjoint)
    loss = stage(images).square().sum()
    with torch.no_grad():
        stage.get_parameter("0.conv2.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@PLANNED
def test_parameters_of_a_functional_call_are_refused(adjoint, make_stage, images):
    stage = make_stage()
    stage.use_adjoint(adjoint)
    replaced = {name: (p.detach() * 2).requires_grad_() for name, p in stage.named_parameters()}
    loss = functional_call(stage, replaced, (images,)).square().sum()
    with pytest.raises(ResodeError, match="replaced between forward and backward.*'backprop'"):
        loss.backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", ["backprop", "checkpoint", "pc", "multistep"])
def test_a_block_that_writes_to_its_input_is_refused(method, grad, make_block, make_stage, images):
    stage = make_stage((0, 0), blocks=[make_block("WritesInput")])
    stage.use_adjoint(Adjoint(method))
    with torch.set_grad_enabled(grad), pytest.raises(ResodeError, match=r"WritesInput\) of step 0 writes to its input"):
        stage(images - 0.5)


@PLANNED
@pytest.mark.parametrize("change", ["mode", "statistics"])
def test_a_block_changed_before_the_backward_pass_cannot_falsify_it(change, adjoint, make_stage, images):
    # Re-evaluations see the block as it is then. Backprop is right after a change of mode and refuses changed
    # statistics; either will do, but not another gradient without a word.
    stage = make_stage()
    stage(images)
    stage.train(change == "mode")
    stage.use_adjoint(adjoint)
    loss, parameters = stage(images).square().sum(), list(stage.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    if change == "mode":
        stage.eval()
    else:
        stage.get_buffer("0.bn1.running_var").mul_(2)
    try:
        found = torch.autograd.grad(loss, parameters)
    except (ResodeError, RuntimeError):
        return
    assert_same(found, expected)


@pytest.mark.parametrize("method", ["backprop", "checkpoint", "multistep"])
def test_a_data_parallel_replica_is_refused(method, make_stage, images):
    stage = make_stage()
    stage.use_adjoint(Adjoint(method))
    stage._is_replica = True  # what nn.parallel.replicate sets
    with pytest.raises(ResodeError, match="DistributedDataParallel"):
        stage(images)
