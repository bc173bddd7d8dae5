"""The batches that a run trains on follow from its seed, the epoch and the step, and from nothing else."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import run

from resode_cli.app import main
from resode_cli.data import Batch, open_data
from resode_cli.network.parts import Preprocessing
from resode_cli.training.loop import training_batches

PLAIN = Preprocessing(size=16, crop_fraction=1.0)
PER_EPOCH = 3  # of 14 images, two of which are left out


def found(count: int, **more: int) -> list[Batch]:
    data = open_data("digits", PLAIN, "train", augment=True, seed=5, images=14)
    chosen = {"seed": 3, "epoch": 0, **more}
    source = training_batches(data, range(14), 4, **chosen)  # type: ignore[arg-type]
    batches = list(islice(source, count))
    source.close()
    return batches


def same(some: list[Batch], others: list[Batch]) -> bool:
    pairs = list(zip(some, others, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_for_any_number_of_workers_and_from_any_step(workers: int) -> None:
    """Over the ends of epochs, which workers have gone past while the model still trains on the last batch."""
    whole = found(2 * PER_EPOCH + 2)
    assert same(found(2 * PER_EPOCH + 2, workers=workers), whole)
    assert same(found(PER_EPOCH, workers=workers, skip=2), whole[2 : 2 + PER_EPOCH])
    assert same(found(3, workers=workers, epoch=1, skip=1), whole[PER_EPOCH + 1 : PER_EPOCH + 4])


def test_every_epoch_has_each_image_once_at_most_in_an_order_and_crops_of_its_own() -> None:
    whole = found(2 * PER_EPOCH)
    first, second = whole[:PER_EPOCH], whole[PER_EPOCH:]
    for epoch in (first, second):
        images = torch.cat([batch.images for batch in epoch]).flatten(1)
        assert len(torch.unique(images, dim=0)) == 12
    assert not same(first, second)
    assert not same(found(PER_EPOCH, seed=4), first)


def test_fewer_images_than_a_batch_are_one() -> None:
    data = open_data("digits", PLAIN, "train", images=3)
    for _, batch in zip(range(4), training_batches(data, range(3), 4, seed=0, epoch=0), strict=False):
        assert len(batch.labels) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_no_random_number_of_the_callers_is_drawn(workers: int) -> None:
    """Dropout draws from there, and a resumed run must draw what the whole one did."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    found(PER_EPOCH + 1, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("asked", "count"), [("3", 3), ("auto", 0)])
def test_a_dry_run_says_how_many_processes_would_read(asked: str, count: int, here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--dry-run", "--json", "--workers", asked)) == 0
    assert json.loads(capsys.readouterr().out)["workers"] == count


def test_a_word_that_is_no_number_of_workers_is_refused(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--workers", "many")) == 2
    assert "error: --workers 'many': write a whole number, or auto" in capsys.readouterr().err
