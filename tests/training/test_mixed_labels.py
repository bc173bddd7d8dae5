"""Augmentation and softened labels of a training run: what they change, that they come again, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from small_runs import run

from resode_cli.app import main
from resode_cli.data.transforms import Augmentation, transform
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.training.mixing import Mixing
from resode_cli.training.objective import Objective
from resode_cli.training.settings import Settings

SOFTENED = {
    "label-smoothing": ["--label-smoothing", "0.1"],
    "mixup": ["--mixup", "0.4"],
    "cutmix": ["--cutmix", "1"],
    "bce": ["--bce-loss"],
    "randaugment": ["--aug", "randaugment"],
    "trivialaugment": ["--aug", "trivialaugment"],
    "augmix": ["--aug", "augmix"],
    "color-jitter": ["--color-jitter", "0.4"],
    "random-erasing": ["--random-erasing", "1"],
}


def same(one: str, other: str) -> bool:
    a, b = (load_file(f"{name}/last.safetensors") for name in (one, other))
    return all(torch.equal(a[key], value) for key, value in b.items())


@pytest.mark.parametrize("kind", SOFTENED)
def test_each_changes_what_is_learned_and_resumes_to_the_bit(kind: str, here: Path) -> None:
    more = [*SOFTENED[kind], "--schedule", "constant", "--lr", "0.05"]
    assert main(run("-o", "plain", *more[-4:], steps=2)) == 0
    assert main(run("-o", "whole", *more, steps=2)) == 0
    assert main(run("-o", "parts", *more, steps=1)) == 0
    assert main(run("-o", "parts", *more[-4:], "--resume", steps=2)) == 0
    assert same("parts", "whole") and not same("whole", "plain")


def test_mixup_goes_with_micro_batches_a_teacher_and_an_odd_number_of_images(here: Path) -> None:
    more = ["--mixup", "0.8", "--cutmix", "1", "--bce-loss", "--batch-size", "7", "--schedule", "constant"]
    for name, extra in (("one", []), ("two", ["--micro-batches", "2"])):
        assert main(run("-o", name, *more, "--teacher", "other.safetensors", *extra, steps=2)) == 0
    one, two = (load_file(f"{name}/last.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[key].float(), two[key].float(), rtol=1e-3, atol=1e-5) for key in one)


@pytest.mark.parametrize("count", [5, 6])
def test_mixed_images_have_shares_of_two_labels(count: int) -> None:
    mixing = Mixing(Settings(mixup=0.8, label_smoothing=0.1, seed=-3), 10)
    images, labels = torch.rand(count, 3, 4, 4), torch.arange(count)
    before, state = images.clone(), np.random.get_state()[1]  # type: ignore[index]
    mixed, targets = mixing(images, labels, step=4)
    again, same_targets = mixing(images, labels, step=4)
    other, _ = mixing(images, labels, step=5)
    assert torch.equal(images, before) and (np.random.get_state()[1] == state).all()  # type: ignore[index]
    assert torch.equal(mixed, again) and torch.equal(targets, same_targets) and not torch.equal(mixed, other)
    assert torch.allclose(targets.sum(1), torch.ones(count))
    share = (targets[0, 0] - 0.01) / 0.9
    partner = count - 1 if count % 2 == 0 else count - 2
    assert torch.allclose(mixed[0], share * images[0] + (1 - share) * images[partner], atol=1e-5)
    if count % 2:
        assert torch.equal(mixed[-1], images[-1]) and targets[-1, count - 1] == pytest.approx(0.91)


def test_losses_are_those_of_their_formulas(pico: OdeResNet) -> None:
    images, labels = torch.randn(4, *pico.info.preprocessing.shape), torch.tensor([0, 1, 2, 3])
    pico.eval()
    logits = pico(images)
    soft = 0.2 / logits.shape[1] + 0.8 * F.one_hot(labels, logits.shape[1])
    smooth, _ = Objective(pico, None, Settings(label_smoothing=0.2))(images, labels)
    assert torch.allclose(smooth, -(soft * logits.log_softmax(1)).sum(1).mean())
    binary, _ = Objective(pico, None, Settings(label_smoothing=0.2, bce_loss=True))(images, labels)
    assert torch.allclose(binary, F.binary_cross_entropy_with_logits(logits, soft))
    given, _ = Objective(pico, None, Settings(label_smoothing=0.2))(images, soft)
    assert torch.allclose(given, smooth), "what is smoothed already is not smoothed again"


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment", "augmix"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_change_pictures_of_any_channels(policy: str, channels: int) -> None:
    pre = Preprocessing(size=(16, 24), mean=(0.5,) * channels, std=(0.25,) * channels, interpolation="bicubic")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8))
    change = transform(pre, augment=Augmentation(policy, color_jitter=0.3, random_erasing=0.5))
    torch.manual_seed(0)
    made = [change(image) for _ in range(8)]
    assert all(x.shape == (channels, 16, 24) and x.isfinite().all() for x in made)
    assert not any(torch.equal(made[0], x) for x in made[1:])


def test_aug_none_is_no_augment(here: Path) -> None:
    assert main(run("-o", "one", "--aug", "none", steps=1)) == 0
    assert main(run("-o", "two", "--no-augment", steps=1)) == 0
    assert main(run("-o", "three", steps=1)) == 0
    assert same("one", "two") and not same("one", "three")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mixup-prob", "0.5"], "--mixup-prob is of --mixup and --cutmix"),
        (["--no-augment", "--aug", "augmix"], "--no-augment and --aug augmix contradict each other"),
        (["--aug", "none", "--color-jitter", "0.1"], "--color-jitter augments images"),
        (["--no-augment", "--random-erasing", "0.1"], "--random-erasing augments images"),
        (["--label-smoothing", "1"], "--label-smoothing 1: must be"),
        (["--mixup", "-1"], "--mixup -1: must be"),
        (["--teacher", "other.safetensors", "--distill", "1", "--bce-loss"], "--distill 1 leaves the labels out"),
        (["--aug", "rand"], "unknown aug 'rand'; did you mean"),
    ],
)
def test_contradictions_are_refused(more: list[str], message: str, here: Path, capsys: Any) -> None:
    shutil.rmtree("run")
    assert main(run("-o", "run", *more)) == 2
    assert message in capsys.readouterr().err and not Path("run/log.csv").exists()
