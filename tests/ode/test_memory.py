"""Bytes that a stage's graph keeps for the backward pass, counted exactly and here, not by the package."""

from __future__ import annotations

import gc

import pytest
import torch

from resode_cli.ode import SCHEMES, Adjoint, Monitor, solve

CONSTANT = [("euler", "euler"), ("pc", "euler"), ("euler", "heun"), ("pc", "heun"), ("heun", "heun")]


def bytes_kept(field, adjoint, x, scheme="euler"):
    """Bytes of the distinct storages saved for backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in field.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = tensor  # held: a freed address could be handed out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plan = adjoint.plan(field.depth, scheme)
        solve(field, SCHEMES[scheme], plan, x.clone().requires_grad_(), monitor=Monitor())
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def size(x):
    return x.numel() * x.element_size()


@pytest.mark.parametrize("kind", ["tied", "rough"])
@pytest.mark.parametrize(("method", "scheme"), CONSTANT)
def test_reversing_methods_keep_two_states_at_any_depth(method, scheme, kind, make_field, state):
    kept = [bytes_kept(make_field(kind, depth), Adjoint(method), state, scheme) for depth in (8, 64)]
    assert kept == [2 * size(state)] * 2


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("depth", [8, 64])
def test_checkpoint_keeps_its_anchors(depth, scheme, make_field, state):
    field = make_field("tied", depth)
    assert bytes_kept(field, Adjoint("checkpoint"), state, scheme) == depth * size(state)
    assert bytes_kept(field, Adjoint("checkpoint", 4), state, scheme) == depth // 4 * size(state)


@pytest.mark.parametrize("method", ["euler", "pc"])
def test_anchors_add_one_state_each(method, make_field, state):
    # x_0 and x_N in any case; x_0 is the first anchor too.
    assert bytes_kept(make_field("tied", 64), Adjoint(method, 8), state) == (2 + 7) * size(state)


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_backprop_grows_with_depth(scheme, make_field, state):
    shallow, deep = (bytes_kept(make_field("tied", depth), Adjoint("backprop"), state, scheme) for depth in (8, 64))
    assert shallow >= 8 * size(state)
    assert deep >= 7 * shallow


@pytest.mark.parametrize(
    ("method", "scheme"), [("backprop", "euler"), ("backprop", "heun"), ("checkpoint", "euler"), *CONSTANT]
)
def test_the_monitor_counts_the_same_bytes(method, scheme, make_field, state):
    # Two passes, because only the innermost saved-tensor hooks see a tensor.
    field, monitor = make_field("rough", 12), Monitor(count_kept=True)
    plan = Adjoint(method).plan(12, scheme)
    solve(field, SCHEMES[scheme], plan, state.clone().requires_grad_(), monitor=monitor)
    assert monitor.kept == bytes_kept(field, Adjoint(method), state, scheme)


def test_the_monitor_counts_only_when_asked(make_field, state):
    monitor = Monitor()
    solve(make_field("tied", 4), SCHEMES["euler"], None, state.clone().requires_grad_(), monitor=monitor)
    assert monitor.kept is None


@pytest.mark.parametrize(("method", "scheme"), CONSTANT)
def test_no_state_is_smuggled_past_the_hooks(method, scheme, make_field):
    # Tensors kept as plain attributes of a graph node are invisible to saved-tensor hooks. (11, 5) occurs nowhere else.
    def alive():
        gc.collect()
        return sum(type(o) is torch.Tensor and o.shape == (11, 5) for o in gc.get_objects())

    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for depth in (8, 64):
        before = alive()
        out = solve(
            make_field("tied", depth), SCHEMES[scheme], Adjoint(method).plan(depth, scheme), x, monitor=Monitor()
        )
        found.append(alive() - before)
        del out
    assert found[0] == found[1] <= 2


@pytest.mark.parametrize("method", ["euler", "pc"])
@pytest.mark.parametrize("mode", [True, False], ids=["batch", "frozen"])
def test_a_stage_of_convolutions_keeps_two_states(method, mode, make_stage, images):
    for depth in (4, 16):
        stage = make_stage((0,) * depth).train(mode)
        stage.use_adjoint(Adjoint(method))
        stage.monitor.count_kept = True
        stage(images.clone().requires_grad_())
        assert stage.monitor.kept == 2 * size(images)
