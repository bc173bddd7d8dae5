"""A small network, what it is fitted to, and images."""

from __future__ import annotations

import pytest

from resode_cli.data import open_data
from resode_cli.fitting.images import FitData
from resode_cli.network.model import OdeResNet
from resode_cli.training.teacher import Teacher, own_teacher


@pytest.fixture
def pictures(make_folder, tiny: OdeResNet) -> FitData:
    folder = make_folder(classes=("a", "b", "c"), each=16)
    data = open_data(str(folder), tiny.info.preprocessing, "train", labelled=False)
    return FitData(data, data)


@pytest.fixture
def pair(tiny: OdeResNet) -> tuple[OdeResNet, Teacher]:
    """A student in `pre` form, and the exact network as its teacher."""
    teacher = own_teacher(tiny, "tiny")
    for stage in tiny.stages.values():
        stage.use_form("pre")
    return tiny, teacher
