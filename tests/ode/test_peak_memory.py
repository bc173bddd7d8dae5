"""The most bytes that graphs keep at a time, where several come and go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resode_cli.ode import peak_kept_bytes

SIZE = 1000
BYTES = 4 * SIZE


def squares(x: Tensor, times: int) -> Tensor:
    """`times` multiplications, each of which keeps its input."""
    for _ in range(times):
        x = x * x
    return x.sum()


def test_one_graph_keeps_what_its_operations_save():
    x = torch.ones(SIZE, requires_grad=True)
    with peak_kept_bytes([]) as peak:
        out = squares(x, 3)
        assert peak() == 3 * BYTES
        out.backward()
    assert peak() == 3 * BYTES


def test_graphs_that_are_gone_do_not_add_up():
    x = torch.ones(SIZE, requires_grad=True)
    with peak_kept_bytes([]) as peak:
        for times in (2, 5, 3):
            squares(x, times).backward()
    assert peak() == 5 * BYTES


def test_graphs_at_the_same_time_do_and_share_a_storage():
    x = torch.ones(SIZE, requires_grad=True)
    with peak_kept_bytes([]) as peak:
        kept = [squares(x, 2), squares(x, 2)]  # both keep x itself, and a square of their own
        assert peak() == 3 * BYTES
        del kept


def test_weights_are_left_out():
    layer = nn.Linear(30, 40, bias=False)
    x = torch.ones(20, 30, requires_grad=True)
    with peak_kept_bytes(layer.parameters()) as peak:
        layer(x).sum().backward()
    assert peak() == x.nbytes
