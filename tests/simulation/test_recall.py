"""What operations are remembered to return is what they return: kinds, storages, and which tensors are one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from resode_cli.network.model import OdeResNet
from resode_cli.ode import Adjoint
from resode_cli.simulation.ledger import CPU, Ledger, Machine
from resode_cli.simulation.recall import Call, Key
from resode_cli.simulation.step import Simulation

IMAGES = (8, 3, 16, 16)


class Forgetful(dict[Key, Call]):
    """Remembers nothing: torch is asked each time."""

    def __setitem__(self, key: Key, call: Call) -> None:
        del key, call


PLANS = [
    (Adjoint(), "none"),
    (Adjoint("checkpoint"), "bf16"),
    (Adjoint("checkpoint", bits=4, slices=2), "none"),
    (Adjoint("multistep", 2), "none"),
]


@pytest.mark.parametrize(("adjoint", "amp"), PLANS, ids=lambda given: getattr(given, "label", given))
def test_a_step_is_what_it_is_without(adjoint, amp, tiny: OdeResNet):
    tiny.train()
    recalling, asking = Simulation(tiny, "cpu"), Simulation(tiny, "cpu")
    asking.calls = Forgetful()
    for _ in range(2):  # the first finds out what can be evaluated again
        assert recalling.step(adjoint, IMAGES, amp=amp) == asking.step(adjoint, IMAGES, amp=amp)
    assert recalling.calls and not asking.calls


@pytest.fixture
def calls() -> dict[Key, Call]:
    return {}


@pytest.fixture
def ledger(calls) -> Iterator[Ledger]:
    """One that counts, on tensors without numbers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, Ledger(CPU, [], mode, calls) as ledger:
        yield ledger


def kind(tensor: Tensor) -> tuple:
    return type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


OPERATIONS = {
    "new": lambda x: x * 2,
    "of a number's kind": lambda x: torch.full((2,), 1) + torch.full((2,), 1.0) + torch.full((2,), True),
    "channels last": lambda x: torch.relu(x.contiguous(memory_format=torch.channels_last)),
    "of no numbers": lambda x: x[:0] + 1,
    "several": lambda x: x.flatten(1).max(1)[1],
    "a view": lambda x: x[1:, :, ::2].transpose(0, 1),
    "several views": lambda x: x.split(2)[1],
    "in place": lambda x: (x + 1).add_(x),
    "of what is not contiguous": lambda x: x.transpose(1, 2) + x.transpose(1, 2),
    "another type": lambda x: x.to(torch.bfloat16).view(torch.int16),
    "into one that is there": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "into one that grows": lambda x: torch.add(x, 1, out=torch.empty(0)),
    "random": lambda x: torch.nn.functional.dropout(x, 0.3),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_the_second_time_is_as_the_first(operation, ledger, calls):
    x, times, found = torch.empty(4, 3, 8, 8), [], []
    before = ledger.now
    for _ in range(2):
        seconds = ledger.seconds
        out = operation(x)
        times.append(ledger.seconds - seconds)
        found.append((kind(out), ledger.now - before, out.untyped_storage().nbytes()))
        del out
        assert ledger.now == before  # it is let go
    assert calls and found[0] == found[1] and times[0] == pytest.approx(times[1], rel=1e-9)


def test_views_share_a_storage_and_in_place_operations_return_their_own(ledger):
    x = torch.empty(4, 6)
    for _ in range(2):
        now = ledger.now
        part, grown = x[1:], x.add_(1)
        assert part.untyped_storage()._cdata == x.untyped_storage()._cdata and grown is x
        assert ledger.now == now


def test_bytes_that_move_follow_from_which_tensors_are_one(ledger):
    ledger.machine = Machine(arithmetic=1e30, traffic=1.0, start=0.0)
    x, y = torch.empty(5), torch.empty(5)
    for _ in range(2):
        for other, moved in ((x, 2), (y, 3)):
            seconds = ledger.seconds
            x + other
            assert ledger.seconds - seconds == moved * x.nbytes


def test_numbers_that_are_known_stay_known(ledger):
    """`torch.tensor(3.0)` keeps its number, and what is computed of it is asked for each time."""
    for number in (3.0, 4.0):
        known = torch.tensor(number)
        assert isinstance(known, FakeTensor) and (known + 1).item() == number + 1
