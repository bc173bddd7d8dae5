"""Classes of few images: their weight in the loss, and an order in which each class is drawn equally often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_runs import contents, run

from resode_cli.app import main
from resode_cli.data import ImageData, open_data
from resode_cli.errors import UsageError
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.training.balance import balanced_order, class_weights, cross_entropy
from resode_cli.training.loop import epoch_generator, training_batches
from resode_cli.training.objective import Objective
from resode_cli.training.settings import Settings

PLAIN = Preprocessing(size=8, crop_fraction=1.0)
WEIGHTED = Settings(class_weights="balanced")


@pytest.fixture
def uneven(make_folder) -> ImageData:
    """Twelve cats, three dogs, one owl."""
    folder = make_folder(each=12, size=8)
    for name, count in (("dog", 3), ("owl", 1)):
        for i in range(count, 12):
            (folder / "train" / name / f"{i}.png").unlink()
    return open_data(str(folder), PLAIN, "train")


def test_weights_are_those_of_scikit_learn(uneven: ImageData):
    said: list[str] = []
    weights = class_weights(uneven, WEIGHTED, said.append)
    assert weights is not None
    assert weights.tolist() == pytest.approx([16 / (3 * 12), 16 / (3 * 3), 16 / (3 * 1)])
    assert weights[uneven.image_labels()].mean().item() == pytest.approx(1)
    assert said == ["class weights from 0.44 (cat, 12 images) to 5.3 (owl, 1 image)"]
    assert class_weights(uneven, Settings(), said.append) is None


def test_a_class_without_images_weighs_nothing(make_folder):
    folder = make_folder(each=2, size=8)
    for file in (folder / "train" / "dog").iterdir():
        file.unlink()
    weights = class_weights(open_data(str(folder), PLAIN, "train"), WEIGHTED, lambda text: None)
    assert weights is not None and weights.tolist() == [1, 0, 1]


def test_the_parts_of_a_batch_add_up_to_its_weighted_loss():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    weights = torch.tensor([0.5, 1.0, 3.0])
    whole = cross_entropy(logits, labels, weights)
    parts = [cross_entropy(logits[i : i + 3], labels[i : i + 3], weights) / 2 for i in (0, 3)]
    assert whole.item() == pytest.approx(sum(parts).item())
    assert whole.item() == pytest.approx(
        (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean().item()
    )
    assert cross_entropy(logits, labels, None) == F.cross_entropy(logits, labels)


def test_the_objective_weighs_classes(tiny: OdeResNet, images: torch.Tensor):
    labels, weights = torch.tensor([0, 1, 2, 3]), torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0])
    loss, logits = Objective(tiny.eval(), None, WEIGHTED, weights)(images, labels)
    assert loss.item() == pytest.approx(5 / 4 * F.cross_entropy(logits[:1], labels[:1]).item())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50), st.integers(0, 99))
def test_each_class_is_drawn_equally_often(labels: list[int], epoch: int):
    order = balanced_order(range(len(labels)), labels, epoch_generator(3, epoch))
    assert len(order) == len(labels)
    drawn = Counter(labels[i] for i in order)
    assert set(drawn) == set(labels) or len(labels) < len(set(labels))
    assert max(drawn.values()) - min(drawn.values()) <= 1
    for label in set(labels):
        times = Counter(i for i in order if labels[i] == label)
        members = labels.count(label)
        assert max(times.values()) - min(times.get(i, 0) for i, own in enumerate(labels) if own == label) <= 1, members
    assert order == balanced_order(range(len(labels)), labels, epoch_generator(3, epoch))


def test_an_epoch_has_an_order_of_its_own_and_begins_anywhere(uneven: ImageData):
    def drawn(epoch: int, skip: int, count: int) -> list[list[int]]:
        source = training_batches(uneven, range(16), 4, seed=0, epoch=epoch, skip=skip, labels=uneven.image_labels())
        found = [next(source).labels.tolist() for _ in range(count)]
        source.close()
        return found

    assert drawn(0, 0, 8)[2:] == drawn(0, 2, 6) and drawn(0, 0, 8)[4:] == drawn(1, 0, 4)
    assert drawn(0, 0, 4) != drawn(1, 0, 4)
    assert all(count in (5, 6) for count in Counter(label for batch in drawn(0, 0, 4) for label in batch).values())


def test_labels_are_known_without_reading_an_image(uneven: ImageData):
    assert uneven.image_labels() == [0] * 12 + [1] * 3 + [2]
    digits = open_data("digits", PLAIN, "train", images=30)
    assert digits.image_labels() == [digits[i][1] for i in range(30)]
    named = open_data("digits", PLAIN, "train", images=30, class_names=[str(d) for d in reversed(range(10))])
    assert named.image_labels() == [named[i][1] for i in range(30)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sampler": "balanced"}, "--class-weights .*leave out one"),
        ({"teacher": "t.safetensors", "distill": 1.0}, "--distill 1 leaves the labels out, .*--class-weights"),
        ({"bce_loss": True}, "--class-weights .*--bce-loss"),
    ],
)
def test_what_contradicts_the_weights_is_refused(change: dict, message: str):
    with pytest.raises(UsageError, match=message):
        replace(WEIGHTED, **change)


@pytest.mark.parametrize("flag", ["--class-weights", "--sampler"])
def test_a_balanced_run_is_another_one_and_resumes_to_the_bit(flag: str, here: Path, capsys):
    more = (flag, "balanced", "--schedule", "constant")
    assert main(run("-o", "straight", *more, steps=5)) == 0
    assert main(run("-o", "plain", "--schedule", "constant", steps=5)) == 0
    assert main(run("-o", "parts", *more, steps=2)) == 0
    assert main(run("-o", "parts", "--resume", *more, steps=5)) == 0
    logs = {name: (here / name / "log.csv").read_text().splitlines()[-1] for name in ("straight", "plain")}
    assert logs["straight"] != logs["plain"]
    last = [contents(here / name)["last.safetensors"] for name in ("straight", "parts")]
    assert last[0] == last[1]


def test_smoothed_and_mixed_labels_are_weighed_by_their_mean_weight() -> None:
    logits, weights = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0.5, 1.0, 3.0])
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    own = cross_entropy(logits, labels, weights)
    torch.testing.assert_close(cross_entropy(logits, one_hot, weights), own)
    log_p = logits.log_softmax(1)
    smoothed = -(0.9 * log_p.gather(1, labels[:, None]).squeeze(1) + 0.1 * log_p.mean(1))
    expected = (weights.double()[labels] * smoothed).mean()
    torch.testing.assert_close(cross_entropy(logits, labels, weights, smoothing=0.1), expected)
    halves = 0.5 * (one_hot + one_hot.roll(1, 0))
    expected = (-(halves * log_p).sum(1) * (halves @ weights.double())).mean()
    torch.testing.assert_close(cross_entropy(logits, halves, weights), expected)
