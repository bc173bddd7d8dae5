"""Bytes that a stage's graph keeps for the backward pass, counted exactly and here, not by the package."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from resode_cli.ode import SCHEMES, Adjoint, Monitor, repetition, solve

CONSTANT = [
    *((method, scheme) for method in ("euler", "pc", "multistep") for scheme in ("euler", "heun")),
    ("heun", "heun"),
]


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


@pytest.mark.parametrize("snapshots", [1, 5, 12, 100])
def test_checkpoint_keeps_no_more_than_its_snapshots(snapshots, make_field, state):
    kept = bytes_kept(make_field("rough", 30), Adjoint("checkpoint", snapshots=snapshots), state)
    assert kept == min(snapshots, 30) * size(state)


@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize(
    "adjoint",
    [Adjoint("checkpoint", 4), Adjoint("checkpoint", snapshots=3), Adjoint("pc"), Adjoint("multistep", 4, 1)],
    ids=lambda adjoint: adjoint.label,
)
def test_a_plan_says_how_many_states_are_kept(adjoint, depth, make_field, state):
    kept = bytes_kept(make_field("rough", depth), adjoint, state)
    assert kept == adjoint.plan(depth, "euler").states_kept * size(state)


@pytest.mark.parametrize("method", ["euler", "pc", "multistep"])
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


@pytest.mark.parametrize(
    ("method", "scheme", "kind"),
    [("euler", "euler", "tied"), ("pc", "heun", "tied"), ("heun", "heun", "tied"), ("multistep", "euler", "rough")],
)
def test_no_state_is_smuggled_past_the_hooks(method, scheme, kind, make_field, monkeypatch):
    # The numbers that are compared with the forward pass's would be all there are.
    monkeypatch.setattr(repetition, "FEWEST", 2)
    monkeypatch.setattr(repetition, "SAMPLES", 2)

    # Tensors kept as plain attributes of a graph node are invisible to saved-tensor hooks. (11, 5) occurs nowhere else.
    gc.collect()
    gc.freeze()  # what libraries hold, some million objects, is not looked through

    def alive():
        gc.collect()
        return sum(type(o) is torch.Tensor and o.shape == (11, 5) for o in gc.get_objects())

    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for depth in (8, 64):
        before = alive()
        out = solve(make_field(kind, depth), SCHEMES[scheme], Adjoint(method).plan(depth, scheme), x, monitor=Monitor())
        found.append(alive() - before)
        del out
    assert found[0] == found[1] <= 3  # x_0, x_N, and x_N as the caller has it


@pytest.mark.parametrize("method", ["euler", "pc", "multistep"])
@pytest.mark.parametrize("mode", [True, False], ids=["batch", "frozen"])
def test_a_stage_of_convolutions_keeps_two_states(method, mode, make_stage, images):
    for depth in (4, 16):
        stage = make_stage((0,) * depth).train(mode)
        stage.use_adjoint(Adjoint(method))
        stage.monitor.count_kept = True
        stage(images.clone().requires_grad_())
        assert stage.monitor.kept == 2 * size(images)


class Watcher(nn.Module):
    """Notes the states x_n of the forward pass without holding them, and at each later call which are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64) / 3)
        self.states: list[StorageWeakRef] = []
        self.held: list[set[int]] = []
        self.watching = False

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            self.held.append({n for n, state in enumerate(self.states) if not state.expired()})
        else:
            self.states.append(StorageWeakRef(x.untyped_storage()))
        return torch.tanh(x @ self.weight)


def watched(as_field, state, adjoint, depth, *, retain):
    watcher = Watcher()
    field = as_field([watcher], (0,) * depth, 1 / depth)
    x = state.clone().requires_grad_()
    out = solve(field, SCHEMES["euler"], adjoint.plan(depth, "euler"), x, monitor=Monitor())
    watcher.watching = True
    grads = [torch.autograd.grad(out.sum(), [x, watcher.weight], retain_graph=retain)]
    if retain:
        grads.append(torch.autograd.grad(out.sum(), [x, watcher.weight]))
    return watcher.held, grads


def test_anchors_are_let_go_one_by_one(as_field, state):
    # x_0 is the caller's; the state of the step before may still be there.
    held, _ = watched(as_field, state, Adjoint("checkpoint"), 8, retain=False)
    for n, h in zip(reversed(range(8)), held, strict=True):
        assert set(range(n + 1)) <= h <= set(range(n + 2))
    for method in ("pc", "multistep"):
        held, _ = watched(as_field, state, Adjoint(method, 4), 16, retain=False)
        assert held[0] == {0, 4, 8, 12}
        for anchor in (4, 8, 12):
            gone = [anchor not in h for h in held]
            assert gone == sorted(gone) and gone[-1], "gone once, and for good"
        lasted = [sum(anchor in h for h in held) for anchor in (12, 8, 4)]
        assert lasted[0] < lasted[1] < lasted[2] < len(held) - 2


@pytest.mark.parametrize("snapshots", [1, 3, 5])
def test_snapshots_are_let_go_one_by_one(snapshots, as_field, state):
    adjoint = Adjoint("checkpoint", snapshots=snapshots)
    held, _ = watched(as_field, state, adjoint, 20, retain=False)
    anchors = adjoint.plan(20, "euler").anchors
    assert held[0] == set(anchors)
    for above, anchor in enumerate(reversed(anchors[1:])):
        gone = [anchor not in h for h in held]
        assert gone == sorted(gone) and gone[-1], "gone once, and for good"
        assert all(set(anchors[: len(anchors) - 1 - above]) <= h for h, g in zip(held, gone, strict=True) if not g)


@pytest.mark.parametrize(
    "adjoint",
    [Adjoint("checkpoint"), Adjoint("checkpoint", snapshots=3), Adjoint("pc", 4), Adjoint("multistep", 4)],
    ids=lambda adjoint: adjoint.label,
)
def test_a_retained_graph_keeps_its_anchors_for_the_next_backward(adjoint, as_field, state):
    held, (first, second) = watched(as_field, state, adjoint, 16, retain=True)
    half = len(held) // 2
    anchors = set(adjoint.plan(16, "euler").anchors)
    assert all(anchors <= h for h in held[: half + 1])
    assert held[-1] <= {0, 1}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
