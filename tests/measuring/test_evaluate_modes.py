"""Evaluating a model leaves each of its modules in the mode that it had."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
from torch import nn

from resode_cli.data import Batch
from resode_cli.errors import ResodeError
from resode_cli.measuring.evaluate import evaluate
from resode_cli.network.model import OdeResNet, freeze_batch_norm


def test_a_frozen_batch_norm_stays_frozen(tiny: OdeResNet) -> None:
    freeze_batch_norm(tiny.train())
    modes = [module.training for module in tiny.modules()]
    assert True in modes and not any(m.training for m in tiny.modules() if isinstance(m, nn.BatchNorm2d))
    evaluate(tiny, [Batch(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))])
    assert [module.training for module in tiny.modules()] == modes


def test_what_is_read_ends_with_an_evaluation_that_breaks_off(tiny: OdeResNet) -> None:
    """Its error holds what it was reading, and a worker that is found with it later is waited for."""
    closed = []

    def read() -> Generator[Batch, None, None]:
        try:
            while True:
                yield Batch(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
        finally:
            closed.append(True)

    def broken(images: int) -> None:
        raise ResodeError(f"after {images}")

    with pytest.raises(ResodeError, match="after 2") as held:
        evaluate(tiny, read(), on_batch=broken)
    assert closed and held.tb is not None
