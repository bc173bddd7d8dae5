"""Properties of deepened stages, against numpy and a product.

Hypothesis makes up the values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resode_cli.errors import UsageError
from resode_cli.network.reading import read_split
from resode_cli.network.specs import BlockSpec, StageSpec
from resode_cli.network.stage import OdeStage
from resode_cli.surgery.depth_weights import DEPTH_WEIGHTS, TIED, step_blocks
from resode_cli.surgery.rewrite import deepen
from resode_cli.surgery.steps import MODES

PLAIN = settings(deadline=None, derandomize=True, max_examples=150)
SLOW = settings(deadline=None, derandomize=True, max_examples=60)


class Growth(nn.Module):
    """x + w x, which makes a stage a product."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * x


def growing(weights: Sequence[float]) -> OdeStage:
    """A stage of such blocks with step size 1."""
    names = tuple(str(n) for n in range(len(weights)))
    blocks = [Growth(weight) for weight in weights]
    specs, schedule = tuple(BlockSpec(name, name) for name in names), tuple(range(len(weights)))
    spec = StageSpec("layer1", "layer1", (), names, specs, schedule, Fraction(len(weights)))
    return OdeStage(spec, transition={}, blocks=blocks, splits=[read_split(block) for block in blocks])


def weights_of(stage: OdeStage) -> list[float]:
    """Of every step."""
    return [float(block.weight.detach()) for block in step_blocks(stage)]


weight_lists = st.lists(st.floats(-0.5, 0.5, allow_subnormal=False), min_size=1, max_size=6, unique=True)


@SLOW
@given(weight_lists, st.integers(0, 20))
def test_replicated_steps_are_even_runs_in_the_order_of_the_blocks(weights, more):
    blocks = len(weights) + more
    deep = deepen(growing(weights), blocks)
    schedule = deep.spec.schedule
    assert len(schedule) == blocks and deep.spec.horizon == len(weights)
    assert all(0 <= b - a <= 1 for a, b in pairwise(schedule))
    runs = Counter(schedule)
    assert sorted(runs) == list(range(len(weights))) and max(runs.values()) - min(runs.values()) <= 1
    assert weights_of(deep) == [weights[b] for b in schedule]


@SLOW
@given(weight_lists, st.integers(1, 4), st.integers(0, 15))
def test_deepening_by_a_whole_factor_on_the_way_changes_nothing(weights, factor, more):
    halfway, blocks = len(weights) * factor, len(weights) * factor + more
    at_once, by_and_by = deepen(growing(weights), blocks), deepen(deepen(growing(weights), halfway), blocks)
    assert at_once.spec == by_and_by.spec and weights_of(at_once) == weights_of(by_and_by)


@SLOW
@given(weight_lists, st.integers(0, 20), st.sampled_from(MODES), st.sampled_from([None, *DEPTH_WEIGHTS]))
def test_a_deepened_stage_has_the_weights_and_the_function_that_its_mode_says(weights, more, mode, depth_weights):
    """The weights by numpy's interpolation, and the function as the product of 1 + h w_n."""
    depth, blocks = len(weights), len(weights) + more
    refused = (
        (mode == "identity" and depth_weights not in (None, "free"))
        or (mode == "interpolate" and depth_weights == "replicate")
        or (depth_weights in ("tied+norms", "tied+stats") and blocks > 1)  # there are none
    )
    if refused:
        with pytest.raises(UsageError):
            deepen(growing(weights), blocks, mode=mode, depth_weights=depth_weights)
        return
    deep = deepen(growing(weights), blocks, mode=mode, depth_weights=depth_weights)
    assert deep.spec.depth == blocks
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    if mode == "identity":
        assert deep.spec.step_size == 1 and sum(weight == 0 for weight in weights_of(deep)) >= more
        torch.testing.assert_close(deep(x), growing(weights)(x), rtol=1e-12, atol=1e-12)
        return
    if mode == "interpolate" or depth_weights == "linear":
        places = (numpy.arange(blocks) + 0.5) / blocks * depth - 0.5
        expected = numpy.interp(places, numpy.arange(depth), weights)
    else:
        expected = numpy.array([weights[n * depth // blocks] for n in range(blocks)])
    if depth_weights in TIED:
        expected = numpy.full(blocks, expected.mean())
    numpy.testing.assert_allclose(weights_of(deep), expected, rtol=1e-12, atol=1e-12)
    growth = numpy.prod(1 + depth / blocks * expected)
    torch.testing.assert_close(deep(x), x * growth, rtol=1e-11, atol=1e-12)


@PLAIN
@given(weight_lists, st.integers(-3, 5), st.sampled_from(MODES), st.text(max_size=8) | st.none())
def test_a_stage_never_becomes_shallower_and_knows_its_words(weights, blocks, mode, depth_weights):
    if blocks < len(weights) or (depth_weights is not None and depth_weights not in DEPTH_WEIGHTS):
        with pytest.raises(UsageError):
            deepen(growing(weights), blocks, mode=mode, depth_weights=depth_weights)
    else:
        assert deepen(growing(weights), blocks, mode=mode, depth_weights=depth_weights).spec.depth == blocks
