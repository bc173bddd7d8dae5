"""Taps, the states of a teacher, and what a student's are compared with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resode_cli.errors import UsageError
from resode_cli.fitting.states import StateLosses, as_read, check_states, recorded, run_ends
from resode_cli.network.model import OdeResNet
from resode_cli.network.stage import Tap
from resode_cli.ode import Adjoint
from resode_cli.surgery.rewrite import deepen
from resode_cli.training.teacher import own_teacher


def deeper(model: OdeResNet, blocks: int) -> OdeResNet:
    for name, stage in model.stages.items():
        model.replace_stage(name, deepen(stage, blocks))
    return model


@pytest.mark.parametrize("depth, runs", [(3, 3), (7, 3), (36, 9), (100, 9), (100, 8), (5, 1)])
def test_runs_end_where_the_schedule_changes_blocks(depth: int, runs: int):
    ends = run_ends(depth, runs)
    schedule = [n * runs // depth for n in range(depth)]
    assert ends[0] == 0 and ends[-1] == depth
    changes = [n for n in range(1, depth) if schedule[n] != schedule[n - 1]]
    assert list(ends[1:-1]) == changes


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
def test_a_tap_sees_every_state_once_and_changes_neither_output_nor_gradient(build_tiny, images, scheme, adjoint):
    model = deeper(build_tiny(scheme=scheme), 6).double()
    stage, x = model.stages["layer1"], torch.rand(2, 4, 8, 8, dtype=torch.double)
    out = stage(x)
    expected = torch.autograd.grad(out.square().sum(), list(stage.parameters()))
    seen: list[int] = []
    kept: dict[int, Tensor] = {}

    def see(n: int, state: Tensor) -> Tensor:
        seen.append(n)
        kept[n] = state.detach()
        return state

    stage.tap = Tap((0, 2, 5, 6), see)
    stage.use_adjoint(Adjoint(adjoint))
    tapped = stage(x)
    assert seen == [0, 2, 5, 6]
    assert torch.equal(tapped, out) and torch.equal(kept[0], x) and torch.equal(kept[6], out)
    gradients = torch.autograd.grad(tapped.square().sum(), list(stage.parameters()))
    for g, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


def test_a_tap_may_put_another_state_in_place(tiny: OdeResNet):
    stage, x = tiny.stages["layer1"], torch.rand(2, 4, 8, 8)
    stage.tap = Tap((1,), lambda n, state: torch.zeros_like(state))
    expected = torch.zeros_like(x)
    for residual in stage.residuals()[1:]:
        expected = residual.step(expected, 1.0)
    torch.testing.assert_close(stage(x), expected)


def test_recorded_states_are_the_steps_states_in_the_networks_order(tiny: OdeResNet, images):
    with torch.no_grad(), recorded(tiny) as states:
        tiny(images)
    assert {name: len(found) for name, found in states.items()} == {"layer1": 4, "layer2": 3, "layer3": 3}
    x = states["layer2"][0]
    for residual, following in zip(tiny.stages["layer2"].residuals(), states["layer2"][1:], strict=True):
        assert torch.equal(residual.step(x, 1.0), following)
        x = following
    assert all(stage.tap is None for stage in tiny.stages.values())


def test_a_network_has_no_error_against_itself_and_replication_has_one_in_every_block(tiny: OdeResNet, images):
    teacher = own_teacher(tiny, "tiny")
    for blocks, exact in ((3, True), (6, False)):
        deep = deeper(tiny, blocks)
        net = check_states(deep, teacher)
        with torch.no_grad():
            with recorded(net) as targets:
                teacher.logits(images)
            losses = StateLosses(deep, targets, cut="", backward=False)
            with losses.watching():
                deep(images)
        first = losses.errors["layer1"]
        assert len(first) == 4 and first[0] == 0.0
        assert all((e == 0.0) == exact for e in first[1:])


def test_the_error_is_the_relative_distance_of_what_is_read(build_tiny, images):
    student = build_tiny(form="pre")
    teacher = own_teacher(student, "tiny")
    stage = student.stages["layer1"]
    with torch.no_grad():
        with recorded(check_states(student, teacher)) as targets:
            teacher.logits(images)
        losses = StateLosses(student, targets, cut="", backward=False)
        with losses.watching():
            student(images)
        x = targets["layer1"][0]
        for k, residual in enumerate(stage.residuals(), start=1):
            x = residual.step(x, 1.0)
            target = targets["layer1"][k]
            expected = (x.relu() - target).norm() / target.norm()
            assert losses.errors["layer1"][k] == pytest.approx(expected.item(), rel=1e-5)
        assert torch.equal(as_read(stage, x), x.relu()) and (x < 0).any()


@pytest.mark.parametrize("cut", ["blocks", "stages", ""])
def test_gradients_stop_where_they_are_cut(build_tiny, images, cut: str):
    """The gradient of a block's parameters counts the errors that it can reach, and no others."""
    student = build_tiny(form="pre")
    teacher = own_teacher(student, "tiny")
    deeper(student, 6)
    with torch.no_grad(), recorded(check_states(student, teacher)) as targets:
        teacher.logits(images)
    losses = StateLosses(student, targets, cut=cut, backward=True)
    with losses.watching():
        student(images)
    if cut:
        assert losses.total is None
    else:
        torch.autograd.backward(losses.total)
    found = student.stages["layer1"].blocks[0].conv1.weight.grad.clone()
    found_stem = student.net.conv1.weight.grad

    free = StateLosses(student, targets, cut="", backward=False)
    terms: dict[str, list[Tensor]] = {name: [] for name in targets}
    original = free._tap

    def tap(name: str) -> Tap:
        inner = original(name)

        def see(n: int, x: Tensor) -> Tensor:
            before = free.total
            x = inner.see(n, x)
            terms[name].append(free.total - (before if before is not None else 0.0))
            return x

        return Tap(inner.steps, see)

    free._tap = tap  # type: ignore[method-assign]
    with free.watching():
        student(images)
    weight = student.stages["layer1"].blocks[0].conv1.weight
    reach = {"blocks": terms["layer1"][1:2], "stages": terms["layer1"], "": [t for ts in terms.values() for t in ts]}
    (expected,) = torch.autograd.grad(torch.stack(reach[cut]).sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    if cut == "blocks":  # the first state of the first stage is the teacher's own
        assert found_stem is None or not found_stem.any()


def test_other_stages_more_steps_and_networks_without_states_are_refused(tiny: OdeResNet, build_tiny):
    deep = own_teacher(deeper(build_tiny(), 6), "deep")
    with pytest.raises(UsageError, match="has 3 steps, teacher deep 6"):
        check_states(tiny, deep)
    foreign = replace(deep, net=torch.nn.Linear(3, 3))
    with pytest.raises(UsageError, match="states of teacher deep are not known"):
        check_states(tiny, foreign)


def test_states_of_another_size_are_refused_by_name(tiny: OdeResNet, images):
    targets = {"layer1": [torch.rand(4, 3, 5, 5)] * 4}
    losses = StateLosses(tiny, targets, cut="", backward=False)
    refused = pytest.raises(UsageError, match="stage layer1: the teacher's states are 3×5×5, the model's 4×16×16")
    with refused, losses.watching():
        tiny(images)
    assert all(stage.tap is None for stage in tiny.stages.values())
    assert math.isfinite(tiny(images).sum().item())
