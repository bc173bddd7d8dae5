"""Images reach the network as its preprocessing says, in splits, the same on every run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from resode_cli.data import ImageData, batches, open_data, transform
from resode_cli.data.workers import WorkerDied
from resode_cli.errors import UsageError
from resode_cli.measuring.evaluate import evaluate
from resode_cli.network.parts import Preprocessing
from resode_cli.sources import timm_models, torchvision_models

PLAIN = Preprocessing(size=16, crop_fraction=1.0)


def labels(data: ImageData) -> list[int]:
    return [int(label) for batch in batches(data, 64) for label in batch.labels]


# which images


@pytest.mark.parametrize("n", [3, 4, 7, 9, 100])
def test_a_part_of_the_images_covers_every_class(n: int, make_folder):
    data = open_data(str(make_folder()), PLAIN, "train", images=n)
    assert len(data) == min(n, 9)
    counts = np.bincount(labels(data), minlength=3)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1


def test_images_are_evenly_spaced():
    data = open_data("digits", PLAIN, "test", images=100)
    steps = np.diff(list(data.indices))
    assert data.indices[0] == 0 and set(steps) == {3, 4} and len(data) == 100


@pytest.mark.parametrize("n", [0, -1])
def test_no_images_are_a_usage_error(n: int):
    with pytest.raises(UsageError, match=f"--images {n}: must be 1 or more"):
        open_data("digits", PLAIN, "test", images=n)


# preprocessing


def noise(size: int) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8).numpy())


def by_hand(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    pixels = np.asarray(image).astype(np.float64) / 255
    return torch.tensor((pixels - preprocessing.mean) / preprocessing.std).permute(2, 0, 1).float()


def test_images_are_normalised_per_channel():
    preprocessing = Preprocessing(size=16, crop_fraction=1.0, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    image = noise(16)
    result = transform(preprocessing, augment=False)(image)
    torch.testing.assert_close(result, by_hand(image, preprocessing), rtol=1e-5, atol=1e-5)


def test_the_crop_is_the_middle_of_the_resized_image():
    # Size over fraction is 16, so that nothing is resampled.
    preprocessing = Preprocessing(size=8, crop_fraction=0.5)
    image = noise(16)
    result = transform(preprocessing, augment=False)(image)
    torch.testing.assert_close(result, by_hand(image.crop((4, 4, 12, 12)), preprocessing), rtol=1e-5, atol=1e-5)


def test_the_interpolation_is_the_preprocessings():
    bilinear, nearest = (
        transform(Preprocessing(size=8, crop_fraction=1.0, interpolation=name), augment=False)(noise(16))
        for name in ("bilinear", "nearest")
    )
    assert not torch.equal(bilinear, nearest)


def photograph() -> Image.Image:
    """Smooth, and wider than high, so that how it is made square shows."""
    y, x = np.mgrid[0:90, 0:140]
    channels = [127 + 120 * np.sin(x / 23), 127 + 120 * np.cos(y / 17), 127 + 120 * np.sin((x + y) / 31)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "resnetv2_50x1_bit", "tresnet_m", "convnextv2_atto"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_images_are_those_of_timms_own_evaluation(name: str, mode: str):
    config = {**timm.get_pretrained_cfg(name).to_dict(), "crop_mode": mode}
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    own = timm.data.create_transform(**data, is_training=False)(photograph())
    found = transform(timm_models.preprocessing_of(config), augment=False)(photograph())
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50.IMAGENET1K_V1", "resnet50.IMAGENET1K_V2", "regnet_y_400mf"])
def test_images_are_those_of_torchvisions_own_evaluation(name: str):
    preset = torchvision_models._weights(name).transforms()
    found = transform(torchvision_models.preprocessing(name, nn.Identity()), augment=False)(photograph())
    torch.testing.assert_close(found, preset(photograph()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_every_mode_become_three_channels(mode: str, tmp_path):
    folder = tmp_path / "modes" / "test" / "a"
    folder.mkdir(parents=True)
    noise(16).convert(mode).save(folder / "0.png")
    image = open_data(str(tmp_path / "modes"), PLAIN, "test")[0][0]
    assert isinstance(image, Tensor)
    assert image.shape == (3, 16, 16)


# augmentation


def augmented(seed: int = 5, **arguments) -> ImageData:
    return open_data("digits", PLAIN, "train", augment=True, seed=seed, images=12, **arguments)


def all_images(data: ImageData, **arguments) -> Tensor:
    return torch.cat([batch.images for batch in batches(data, 4, **arguments)])


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    expected = all_images(augmented())
    torch.manual_seed(123)  # the caller's own random numbers do not matter
    assert torch.equal(all_images(augmented()), expected)
    order = [7, 3, 11, 0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert torch.equal(all_images(augmented(), order=order), expected[order])


def test_augmentation_is_the_same_with_workers():
    data = augmented()
    assert torch.equal(all_images(data, epoch=3, workers=1), all_images(data, epoch=3))


def test_epochs_seeds_and_images_are_augmented_differently():
    data = augmented()
    first = all_images(data)
    second = all_images(data, epoch=1)
    other = all_images(augmented(seed=6))
    plain = all_images(open_data("digits", PLAIN, "train", images=12))
    for a, b in ((first, second), (first, other), (second, other), (first, plain)):
        assert sum(not torch.equal(x, y) for x, y in zip(a, b, strict=True)) >= 9
    assert torch.equal(all_images(data), first)


def test_augmentation_leaves_the_callers_generator_alone():
    data = augmented()
    before = torch.get_rng_state()
    for i in range(len(data)):
        data[i]
    assert torch.equal(torch.get_rng_state(), before)


def flipped(flip: bool) -> int:
    """How often a gradient from dark to light comes out reversed."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))).convert("RGB")
    augment = transform(PLAIN, augment=True, flip=flip)
    return sum(bool(image[0, 8, 5] > image[0, 8, 10]) for image in (augment(ramp) for _ in range(40)))


def test_mirror_images_come_only_where_they_mean_the_same():
    assert flipped(False) == 0
    assert 8 <= flipped(True) <= 32


# batches


def test_batches_have_the_size_asked_for(make_folder):
    data = open_data(str(make_folder()), PLAIN, "train")
    assert [len(batch.labels) for batch in batches(data, 4)] == [4, 4, 1]


def test_evaluation_counts_by_hand(make_folder, tiny):
    found = list(batches(open_data(str(make_folder()), PLAIN, "test"), 4))
    result = evaluate(tiny.train(), found)
    with torch.no_grad():
        logits = tiny.eval()(torch.cat([batch.images for batch in found]))
    targets = torch.cat([batch.labels for batch in found])
    assert result.top1 == (logits.argmax(1) == targets).double().mean().item()
    assert result.top5 == 1.0 and result.images == 9
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_a_worker_that_dies_as_it_starts_is_missed_at_once(make_folder, monkeypatch):
    """It is no child any more when the loader has started, so nobody would hear of its death."""
    start = multiprocessing.process.BaseProcess.start

    def die(self: multiprocessing.process.BaseProcess) -> None:
        start(self)
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    data = open_data(str(make_folder()), Preprocessing(size=16), "train")
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", die)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match="died"):
            list(batches(data, 2, workers=2))
    assert time.monotonic() - began < 30


class Slow(ImageData):
    """Every image takes its time."""

    seconds = 0.0

    def __getitem__(self, key):
        time.sleep(self.seconds)
        return super().__getitem__(key)


@pytest.mark.parametrize(("seconds", "stuck"), [(0.7, False), (20.0, True)])
def test_slow_images_are_waited_for_and_stuck_ones_are_one_line(seconds, stuck, make_folder, monkeypatch):
    """A wait that is longer than the loader's own goes on, and loses no batch; past the limit it ends."""
    monkeypatch.setattr("resode_cli.data.workers.LOOKED_AFTER", 0.3)
    monkeypatch.setattr("resode_cli.data.workers.STUCK", 3)
    data = open_data(str(make_folder(each=1)), PLAIN, "test")
    slow = Slow(data.name, data.samples, data.class_names, transform=data.transform)
    slow.seconds = seconds
    if stuck:
        with pytest.raises(WorkerDied, match="no image was read in 3 seconds"):
            list(batches(slow, 1, workers=1))
        return
    found = list(batches(slow, 1, workers=1))
    expected = list(batches(data, 1))
    assert len(found) == 3 and all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))
