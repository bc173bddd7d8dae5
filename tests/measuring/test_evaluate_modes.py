"""Evaluating a model leaves each of its modules in the mode that it had."""

from __future__ import annotations

import torch
from torch import nn

from resode_cli.data import Batch
from resode_cli.measuring.evaluate import evaluate
from resode_cli.network.model import OdeResNet, freeze_batch_norm


def test_a_frozen_batch_norm_stays_frozen(tiny: OdeResNet) -> None:
    freeze_batch_norm(tiny.train())
    modes = [module.training for module in tiny.modules()]
    assert True in modes and not any(m.training for m in tiny.modules() if isinstance(m, nn.BatchNorm2d))
    evaluate(tiny, [Batch(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))])
    assert [module.training for module in tiny.modules()] == modes
