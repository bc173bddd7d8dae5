"""Figures of images with several labels, against what is counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from resode_cli.measuring.class_figures import ClassFigures
from resode_cli.measuring.multi_label import LabelResults, average_precisions, f1_scores, measure

NAN = math.nan


def of_class(scores: list[float], labels: list[int]) -> float:
    return average_precisions(torch.tensor(scores)[:, None], torch.tensor(labels)[:, None].bool())[0].item()


@pytest.mark.parametrize(
    "scores, labels, expected",
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 / 1 + 2 / 3) / 2),
        ([0.6, 0.7, 0.8, 0.9], [1, 0, 1, 0], (1 / 2 + 2 / 4) / 2),
        ([0.9, 0.8], [1, 1], 1.0),
        ([0.9, 0.8, 0.1], [0, 0, 1], 1 / 3),
        # Equal scores are one threshold, whatever their order: both images are taken at once.
        ([0.5, 0.5, 0.1], [1, 0, 1], 1 / 2 * 1 / 2 + 1 / 2 * 2 / 3),
        ([0.5, 0.5, 0.1], [0, 1, 1], 1 / 2 * 1 / 2 + 1 / 2 * 2 / 3),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 1 / 4),
    ],
)
def test_average_precision_is_as_counted_by_hand(scores: list[float], labels: list[int], expected: float):
    assert of_class(scores, labels) == pytest.approx(expected)


def test_a_class_without_images_has_no_average_precision():
    assert math.isnan(of_class([0.9, 0.1], [0, 0]))


def test_all_figures_of_three_images():
    # By class: a is right twice; b is given once too often and missed once; c is in no image and never given.
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    probabilities = torch.tensor([[0.9, 0.6, 0.1], [0.8, 0.3, 0.2], [0.4, 0.1, 0.49]])
    found = measure(probabilities, labels, 0.25, ("bad.png",))
    assert f1_scores(probabilities >= 0.5, labels).tolist() == pytest.approx([1.0, 0.0, NAN], nan_ok=True)
    assert found.micro_f1 == pytest.approx(2 * 2 / (3 + 3))  # two right, of three given and three that are there
    assert found.macro_f1 == pytest.approx(0.5)
    assert found.exact_match == pytest.approx(1 / 3)
    assert found.map == pytest.approx((1.0 + 1 / 2) / 2)
    assert (found.images, found.loss, found.skipped) == (3, 0.25, ("bad.png",))
    results = LabelResults(torch.arange(3), labels, probabilities, torch.tensor([0.1, 0.7, 0.2]))
    assert results.by_class() == [ClassFigures(2, 2, 2), ClassFigures(1, 1, 0), ClassFigures(0, 0, 0)]
    assert results.average_precisions == [1.0, 0.5, None]
    assert results.mistakes(5) == [1, 0]  # the largest loss first; the third image is right
    assert results.evaluation.map == found.map


def test_nothing_given_and_nothing_there_is_an_exact_match_and_no_score():
    found = measure(torch.zeros(2, 2), torch.zeros(2, 2).bool(), 0.0, ())
    assert (found.exact_match, found.map, found.micro_f1, found.macro_f1) == (1.0, 0.0, 0.0, 0.0)
