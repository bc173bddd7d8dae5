"""States as codes of a few bits: what they stand for, what they take, and that what one misses the next one sees."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resode_cli.errors import ResodeError
from resode_cli.ode import codec
from resode_cli.ode.codec import GROUP, Code, Layout, pack_bits, unpack_bits
from resode_cli.ode.lean import sparing
from resode_cli.ode.signs import Signs, is_positive
from resode_cli.ode.states import KeepCodes

PLAIN = settings(deadline=None, derandomize=True, max_examples=60)
KEY = (0, 0)


@PLAIN
@given(st.integers(1, 700), st.integers(2, 8), st.integers(-30, 30), st.integers(-100, 100), st.integers(0, 10**6))
def test_a_number_is_off_by_half_a_level_of_its_groups_range(numbers, bits, power, offset, seed):
    x = (torch.randn(numbers, generator=torch.Generator().manual_seed(seed)) + offset) * 10.0**power
    estimate = torch.zeros_like(x)
    code = Code.of_difference(x, estimate, bits)
    for group, found in zip(x.split(GROUP), estimate.split(GROUP), strict=True):
        reach = group.max() - group.min() + group.abs().max() * 2**-6  # lo is rounded outwards, to bfloat16
        assert (found - group).abs().max() <= 0.52 * reach / (2**bits - 1)
    again = torch.zeros_like(x)
    code.add_to(again)
    assert torch.equal(again, estimate)
    groups = -(-numbers // GROUP)
    assert code.packed.nbytes == groups * GROUP * bits // 8 and code.ranges.nbytes == groups * 4


def test_a_constant_is_told_exactly_enough_and_chunks_are_no_matter(monkeypatch):
    x = torch.cat([torch.zeros(64), torch.full((64,), 3.0), torch.randn(1000)])
    found = []
    for chunk in (2**18, 128):
        monkeypatch.setattr(codec, "CHUNK", chunk)
        estimate = torch.zeros_like(x)
        code = Code.of_difference(x, estimate, 5)
        back = estimate.clone()
        code.add_to(back, -1)
        assert back.abs().max() == 0
        found.append(estimate)
    assert torch.equal(*found)
    assert torch.equal(found[0][:64], x[:64]) and (found[0][64:128] - 3).abs().max() < 0.03


@pytest.mark.parametrize("bits", [2, 4])
def test_errors_of_a_closed_loop_do_not_add_up(bits: int):
    x, keeper = torch.randn(2, 3, 8, 8), KeepCodes(bits, 400)
    states = [x := x + 0.1 * torch.randn_like(x) for _ in range(401)]
    for n, state in enumerate(states):
        keeper.see(n, state)
    found = keeper.states(iter(keeper.saved()), None, None)  # type: ignore[arg-type]
    step = (states[1] - states[0]).abs().max()
    errors = {n: float((found.take(n) - states[n]).abs().max() / step) for n in reversed(range(400))}
    late, early = (max(errors[n] for n in steps) for steps in (range(300, 400), range(10, 110)))
    assert late <= 1.5 * early < 1


@pytest.mark.parametrize("last", [False, True])
def test_a_state_comes_back_in_its_order_in_memory(last: bool):
    x = torch.randn(2, 6, 5, 4)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    layout = Layout.of(x)
    back = layout.shaped(layout.flat(x))
    assert torch.equal(back, x) and back.stride() == x.stride()


@PLAIN
@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_signs_take_a_bit_each(flags: list[bool]):
    x = torch.tensor(flags)
    packed = pack_bits(x)
    assert packed.numel() == -(-len(flags) // 8) and torch.equal(unpack_bits(packed, len(flags)).bool(), x)


class Rectified(nn.Module):
    """Rectifiers as a layer, a function, in place, leaky and as a comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x * 1.0) - 0.5
        x = F.relu(x + 0.3).relu() - self.leaky(x - 0.1)
        return torch.where(is_positive(x), x, -3 * x)


def test_another_state_is_rectified_as_the_first_was():
    """By the derivative at the first state, of a function that is linear between its kinks."""
    torch.manual_seed(0)
    block, x = Rectified().double(), torch.randn(500, dtype=torch.float64)
    other = x + 0.2 * torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(block(leaf).sum(), leaf)[0]
    recorded = Signs()
    with torch.no_grad():
        recorded.around(KEY, lambda: block(x))
    again = recorded.again(iter(recorded.saved()))
    leaf = other.clone().requires_grad_()
    found = torch.autograd.grad(again.around(KEY, lambda: block(leaf)).sum(), leaf)[0]
    assert torch.equal(found, expected)
    leaf = other.clone().requires_grad_()
    assert not torch.equal(torch.autograd.grad(block(leaf).sum(), leaf)[0], expected)


def test_other_rectifiers_than_in_the_forward_pass_are_an_error():
    x, recorded = torch.randn(64), Signs()
    recorded.around(KEY, lambda: F.relu(x))
    saved = recorded.saved()
    with pytest.raises(ResodeError, match="rectifies other tensors"):
        recorded.again(iter(saved)).around(KEY, lambda: F.relu(F.relu(x)))
    with pytest.raises(ResodeError, match="rectifies other tensors"):
        recorded.again(iter(saved)).around(KEY, lambda: x)
    with pytest.raises(ResodeError, match="rectifies other tensors"):
        recorded.again(iter(saved)).around(KEY, lambda: F.relu(x[:8]))


def test_a_lean_evaluation_keeps_no_result_of_an_expanding_layer_and_has_the_same_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4))
    x, alive, gradients = torch.randn(2, 3, 6, 6, requires_grad=True), [], []
    for is_lean in (False, True):
        made: list[weakref.ref[object]] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out, made=made: made.append(weakref.ref(out.untyped_storage())))
            for layer in (net[0], net[3])
        ]
        with sparing(x, (lambda: x) if is_lean else None):
            out = net(x)
        for hook in hooks:
            hook.remove()
        alive.append([storage() is not None for storage in made])
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *net.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert alive == [[True, True], [False, True]]  # of the two, the first makes its input larger


def test_a_lean_evaluation_refuses_a_layer_whose_input_is_written_to():
    x, layer, norm = torch.randn(2, 3, 4, 4), nn.Conv2d(3, 9, 1), nn.BatchNorm2d(9)
    with sparing(x, lambda: x):
        given = x.requires_grad_() * 1
        out = norm(layer(given))
        given.detach().mul_(2)
    with pytest.raises(ResodeError, match="writes to a layer's input"):
        out.sum().backward()


def test_states_may_change_their_shape_on_the_way():
    """As between the blocks of a transition: codes then start from the state itself again."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 8, 8), (2, 3, 8, 8), (2, 6, 4, 4), (2, 6, 4, 4), (2, 6, 4, 4), (2, 9, 2, 2)]
    states = [torch.randn(shape, generator=generator) for shape in shapes]
    keeper = KeepCodes(8, len(states))
    for n, x in enumerate([*states, states[-1]]):
        keeper.see(n, x)
    found = keeper.states(iter(keeper.saved()), None, None)  # type: ignore[arg-type]
    for n in reversed(range(len(states))):
        assert (found.take(n) - states[n]).abs().max() < 0.05 * states[n].abs().max()
        assert (found.again() is None) == (n < 5)  # the last by itself is read off its code again
