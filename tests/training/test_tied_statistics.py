"""A run says where one BatchNorm serves all steps, and is quiet where it does not."""

from __future__ import annotations

from typing import Any

import pytest

from resode_cli.network.model import OdeResNet
from resode_cli.surgery.rewrite import deepen, tie
from resode_cli.training.settings import Settings
from resode_cli.training.starting import tell_of_shared_statistics


def _said(model: OdeResNet, **settings: Any) -> str:
    said: list[str] = []
    tell_of_shared_statistics(model, Settings(**settings), said.append)
    return "\n".join(said)


def test_shared_statistics_that_move_are_said(tiny: OdeResNet) -> None:
    said = _said(tie(tiny, stages=["layer1", "layer3"]), bn="batch")
    assert "all steps of layer1 and layer3 share BatchNorms" in said and "tied+stats" in said


@pytest.mark.parametrize("kind", ["tied+stats", "tied+norms"])
def test_steps_with_statistics_of_their_own_are_quiet(kind: str, tiny: OdeResNet) -> None:
    assert not _said(tie(tiny, depth_weights=kind), bn="batch")


def test_frozen_statistics_and_other_blocks_are_quiet(tiny: OdeResNet) -> None:
    assert not _said(tie(tiny), bn="frozen")
    assert not _said(tiny, bn="batch")
    assert not _said(deepen(tiny, 6), bn="batch")
