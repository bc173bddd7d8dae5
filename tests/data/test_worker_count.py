"""How many processes read images, where the user leaves it open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resode_cli.data import batches, loading, open_data, workers
from resode_cli.data.workers import FEW, FEW_ANEW, MOST, worker_count
from resode_cli.errors import UsageError
from resode_cli.machine import cores
from resode_cli.machine.cores import available_cores
from resode_cli.network.parts import Preprocessing
from resode_cli.options import check_options
from resode_cli.training.settings import Settings


@pytest.mark.parametrize(
    ("text", "found"),
    [("150000 100000", 2), ("100 100000", 1), ("max 100000", 6), ("9900000 100000", 6), ("nonsense", 6), ("", 6)],
)
def test_cores_are_those_that_a_container_may_use(text: str, found: int, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cores, "_QUOTAS", ((tmp_path / "none",), (tmp_path / "cpu.max",)))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6), raising=False)
    assert available_cores() == found


@pytest.mark.parametrize(("quota", "found"), [("250000", 2), ("-1", 6)])
def test_groups_of_the_first_version_have_two_files(quota: str, found: int, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "quota").write_text(quota)
    (tmp_path / "period").write_text("100000\n")
    monkeypatch.setattr(cores, "_QUOTAS", ((tmp_path / "quota", tmp_path / "period"),))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6), raising=False)
    assert available_cores() == found


@pytest.mark.parametrize(
    ("images", "device", "cores", "count"),
    [
        (FEW - 1, "cuda", 16, 0),
        (FEW, "cuda", 1, 0),
        (FEW, "cuda:1", 4, 3),
        (FEW, "cuda", 64, MOST),
        (FEW, "cpu", 2, 0),
        (FEW, "cpu", 16, 4),
    ],
)
def test_auto_goes_by_images_cores_and_device(
    images: int, device: str, cores: int, count: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "fork")
    assert worker_count("auto", images, device) == count
    assert worker_count(5, images, device) == 5


@pytest.mark.parametrize(("asked", "started"), [("auto", 2), (1, 1), (0, 0)])
def test_as_many_are_started_as_are_asked_for_or_pay(asked: int | str, started: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(loading, "worker_count", lambda asked, images, device: 2 if asked == "auto" else asked)
    counts: list[int] = []
    arguments = workers.loader_arguments
    monkeypatch.setattr(loading, "loader_arguments", lambda count: counts.append(count) or arguments(count))
    data = open_data("digits", Preprocessing(size=8, crop_fraction=1.0), "test", images=6)
    assert sum(len(batch.labels) for batch in batches(data, 2, workers=asked)) == 6
    assert counts == [started]


@pytest.mark.parametrize("value", ["many", "1.5", ""])
def test_a_word_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match=f"--workers '{value}': write a whole number, or auto"):
        Settings(workers=value)


def test_a_number_is_one_of_its_range() -> None:
    with pytest.raises(UsageError, match="--workers -1: must be from 0 to 1024"):
        Settings(workers=-1)
    check_options(Settings(workers=3))


def test_workers_that_start_anew_want_more_images(monkeypatch: Any) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: 4)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    assert worker_count("auto", FEW_ANEW - 1, "cuda") == 0 < worker_count("auto", FEW_ANEW, "cuda")
