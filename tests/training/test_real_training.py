"""Fine-tuning a real network on real images: with stages run backwards it learns what it learns by backprop."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from resode_cli import data
from resode_cli.files import model_file
from resode_cli.sources.registry import open_source
from resode_cli.surgery.batch_norm import recalibrate
from resode_cli.surgery.convert import convert
from resode_cli.surgery.rewrite import deepen, untie
from resode_cli.training.finetune import finetune
from resode_cli.training.settings import Settings

STEPS = 40


@pytest.fixture
def untied24(shared_data: Path, cifar10: Path, tmp_path: Path) -> Path:
    """A ResNet-56 in `pre` form, recalibrated, at 24 untied steps per stage."""
    torch.set_flush_denormal(True)
    model, _ = convert(open_source("cifar:resnet56", weights=shared_data / "resnet56_cifar10.th"), form="pre")
    train = data.open_data(str(cifar10), model.info.preprocessing, "train", images=1000)
    order = [i for start in range(10) for i in range(start, len(train), 10)]
    recalibrate(model, data.batches(train, 100, order=order))
    for name, stage in model.stages.items():
        model.replace_stage(name, untie(deepen(stage, 24)))
    model_file.save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def losses(folder: Path) -> list[float]:
    with (folder / "log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train"]


@pytest.mark.real
@pytest.mark.slow
def test_pc_fine_tunes_a_real_network_as_backprop_does(untied24: Path, cifar10: Path, tmp_path: Path, assert_ran_by):
    """Layers 2 and 3 are run backwards by pc. Layer 1 cannot be: the monitor moves it to anchors at the first step."""
    results = {}
    for method in ("pc", "backprop"):
        model = model_file.load(untied24)
        settings = Settings(adjoint=method, batch_size=48, max_steps=STEPS, lr=5e-3, clip_grad=5.0)
        train = data.open_data(str(cifar10), model.info.preprocessing, "train", augment=True)
        test = data.open_data(str(cifar10), model.info.preprocessing, "test", images=500)
        results[method] = finetune(
            model, train, test, out=tmp_path / method, settings=settings, device=torch.device("cpu")
        )
        assert_ran_by(tmp_path / method, method, moved=["layer1"] if method == "pc" else [])
    torch.set_flush_denormal(False)
    assert results["pc"].after.top1 >= results["pc"].before.top1 + 0.03
    pairs = list(zip(losses(tmp_path / "pc"), losses(tmp_path / "backprop"), strict=True))
    assert len(pairs) == STEPS // 20
    for ours, exact in pairs:
        assert ours == pytest.approx(exact, rel=0.05)
