"""Figures by image and class against what is counted by hand, and images that cannot be read in between."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from resode_cli.data import batches, open_data
from resode_cli.errors import ResodeError
from resode_cli.measuring.by_image import ImageResults, evaluate_images
from resode_cli.measuring.class_figures import ClassFigures
from resode_cli.measuring.evaluate import evaluate
from resode_cli.network.parts import Preprocessing

PRE = Preprocessing(size=8, crop_fraction=1.0)


class Reads(nn.Module):
    """Logits that depend on the image alone."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1)) * 5


def results(labels: list[int], guesses: list[int], losses: list[float] | None = None, classes: int = 3) -> ImageResults:
    count = len(labels)
    return ImageResults(
        classes,
        torch.arange(count),
        torch.tensor(labels).int(),
        torch.tensor(guesses).int(),
        torch.full((count,), 0.5),
        torch.tensor(losses or [1.0] * count),
        torch.ones(count, dtype=torch.bool),
    )


def test_it_agrees_with_the_evaluation_of_batches(make_folder) -> None:
    data = open_data(str(make_folder(size=8)), PRE, "test")
    model = Reads().train()
    found, known = evaluate_images(model, data, batch_size=4), evaluate(model, batches(data, 4))
    assert (found.top1, len(found)) == (known.top1, known.images)
    assert found.losses.double().mean().item() == pytest.approx(known.loss)
    assert torch.equal(found.predictions.long(), known.predictions)
    assert found.places.tolist() == list(range(len(data)))
    assert model.training
    image, label = data[2]
    assert found.labels[2] == label
    logits = model(image[None])[0]
    assert found.probabilities[2].item() == pytest.approx(logits.softmax(0).max().item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_places_go_on_after_images_that_cannot_be_read(batch_size: int, make_folder) -> None:
    folder = Path(make_folder(size=8))
    files = sorted((folder / "test").rglob("*.png"))
    for place in (1, 2, len(files) - 1):
        files[place].write_bytes(b"none")
    data = open_data(str(folder), PRE, "test", skip_corrupt=True)
    found = evaluate_images(Reads(), data, batch_size=batch_size)
    left = [i for i in range(len(files)) if i not in (1, 2, len(files) - 1)]
    assert found.places.tolist() == left
    assert [Path(data.file_of(i)) for i in found.places] == [files[i] for i in left]
    assert found.labels.tolist() == [data[i][1] for i in left]


def test_a_set_that_nothing_can_be_read_of_is_an_error(make_folder) -> None:
    folder = Path(make_folder(size=8))
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"none")
    with pytest.raises(ResodeError, match="no image could be read"):
        evaluate_images(Reads(), open_data(str(folder), PRE, "test", skip_corrupt=True), batch_size=4)


def test_by_class() -> None:
    found = results([0, 0, 0, 1, 1], [0, 0, 1, 1, 0]).by_class()
    assert found == [ClassFigures(3, 3, 2), ClassFigures(2, 2, 1), ClassFigures(0, 0, 0)]
    assert (found[0].precision, found[0].recall, found[0].f1) == (2 / 3, 2 / 3, pytest.approx(2 / 3))
    assert (found[2].precision, found[2].recall, found[2].f1) == (None, None, None)
    assert ClassFigures(0, 4, 0).recall is None and ClassFigures(0, 4, 0).precision == 0
    own = ClassFigures(4, 2, 1)
    assert own.precision is not None and own.recall is not None
    assert own.f1 == pytest.approx(2 * own.precision * own.recall / (own.precision + own.recall))


def test_who_is_taken_for_whom() -> None:
    found = results([0, 0, 1, 1, 2], [0, 1, 0, 0, 2])
    assert found.pairs == {(0, 0): 1, (0, 1): 1, (1, 0): 2, (2, 2): 1}
    assert found.confused(5) == [(1, 0, 2), (0, 1, 1)] and found.confused(1) == [(1, 0, 2)]
    assert results([20_000], [3], classes=21_842).pairs == {(20_000, 3): 1}  # no matrix of half a billion entries


def test_the_worst_mistakes_are_mistakes_only() -> None:
    found = results([0, 1, 2, 0], [1, 1, 0, 2], [0.5, 9.0, 2.0, math.log(2)])
    assert found.mistakes(10) == [2, 3, 0] and found.mistakes(1) == [2] and found.mistakes(0) == []
    assert results([1], [1]).mistakes(3) == []
