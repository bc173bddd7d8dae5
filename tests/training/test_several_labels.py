"""Runs on images with several labels: what is learned, measured, resumed and refused, and what reads the model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from small_runs import run

from resode_cli.app import main
from resode_cli.data import open_data
from resode_cli.files import model_file
from resode_cli.measuring.predict import predict
from resode_cli.network.parts import Preprocessing
from resode_cli.training.balance import class_weights
from resode_cli.training.objective import Objective
from resode_cli.training.settings import Settings

COLOURS = ("blue", "green", "red")
TABLE = ["--data", "tags.csv", "--lr", "0.05", "--bn", "batch", "--no-augment", "--log-every", "1"]
BEST = "tagged-run/best.safetensors"


@pytest.fixture(scope="module")
def tagged(made: Path) -> Path:
    """Images of three colours, each there or not, and a finished run of four steps on them."""
    generator = torch.Generator().manual_seed(5)
    lines = ["path,tags"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        Path("tagged").mkdir()
        for i in range(40):
            there = (torch.rand(3, generator=generator) < 0.4).tolist()
            Image.new("RGB", (8, 8), tuple(200 * on + 20 for on in reversed(there))).save(f"tagged/{i}.png")
            lines.append(f"tagged/{i}.png,{';'.join(c for c, on in zip(COLOURS, there, strict=True) if on)}")
        Path("tags.csv").write_text("\n".join(lines))
        assert main(run("-o", "tagged-run", *TABLE, "--max-steps", "4")) == 0
    return made


@pytest.fixture
def work(tagged: Path, here: Path) -> Path:
    """A copy of its folder, to work in."""
    return here


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_run_measures_labels_and_says_so(work: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*run("-o", "new", *TABLE), "--json"]) == 0
    out, said = capsys.readouterr()
    assert "each is learned by its own binary cross-entropy, and mAP is measured" in said
    assert "a new head" in said and "for the 3 classes of tags.csv" in said
    found = json.loads(out)
    assert {"map", "micro_f1", "macro_f1", "exact_match", "loss", "images", "skipped"} == set(found["after"])
    assert found["best_map"] == max(found["before"]["map"], found["after"]["map"]) and "best_top1" not in found
    with open("new/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert "top1" not in rows[0] and rows[0]["map"] == str(found["before"]["map"])
    assert all(0 <= float(row["label_accuracy"]) <= 1 for row in rows if row["split"] == "train")
    info = model_file.load("new/best.safetensors").info
    assert info.multi_label and info.class_names == COLOURS
    assert info.history[-1]["measured"]["map"] == pytest.approx(found["best_map"])


def test_a_run_that_goes_on_repeats_the_one_that_was_not_stopped(work: Path):
    asked = (*TABLE, "--schedule", "constant", "--class-weights", "balanced")
    assert main(run("-o", "stopped", *asked, steps=2)) == 0
    assert main(run("-o", "stopped", *asked, "--resume", steps=4)) == 0
    assert main(run("-o", "whole", *asked, steps=4)) == 0
    one, other = (load_file(f"{name}/state.safetensors") for name in ("stopped", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert model_file.load("stopped/last.safetensors").info.multi_label


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mixup", "0.2"], "--mixup mixes the labels of images of one class"),
        (["--cutmix", "1"], "--cutmix mixes"),
        (["--label-smoothing", "0.1"], "--label-smoothing shares one label among all classes"),
        (["--sampler", "balanced"], "--sampler balanced draws each class equally often"),
        (["--best-by", "top1"], "--best-by top1 is of images of one class each; of several labels there is map"),
        (
            ["--teacher", "m.safetensors", "--distill", "0.5"],
            "gives an image one class, the model any number of labels",
        ),
    ],
)
def test_what_means_nothing_for_several_labels_is_refused(flags: list[str], message: str, work: Path, capsys):
    assert main(run("-o", "new", *TABLE, *flags, model=BEST)) != 0
    assert message in capsys.readouterr().err and not Path("new/state.safetensors").exists()


def test_a_dry_run_refuses_it_too_and_a_figure_of_labels_is_not_of_classes(work: Path, capsys):
    assert main([*run("-o", "new", *TABLE, "--mixup", "0.2"), "--dry-run"]) == 2
    assert "--mixup mixes" in capsys.readouterr().err
    assert main(run("-o", "new", "--best-by", "map")) == 2
    assert "--best-by map is of images with several labels" in capsys.readouterr().err


def test_the_loss_is_that_of_every_label_and_rare_ones_weigh_more(work: Path):
    model = model_file.load(BEST)
    data = open_data("tags.csv", model.info.preprocessing, "train", multi_label=True, class_names=COLOURS)
    labels = torch.tensor([[0.0, 1, 1], [0, 0, 0]])
    images = torch.randn(2, 3, 8, 8)
    loss, logits = Objective(model.eval(), None, Settings())(images, labels)
    chances = logits.double().sigmoid()
    by_hand = -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    weights = class_weights(data, Settings(class_weights="balanced"), lambda text: None)
    counts = torch.tensor(data.label_counts())
    assert weights.tolist() == pytest.approx(((len(data) - counts) / counts).tolist())
    weighed, _ = Objective(model, None, Settings(class_weights="balanced"), weights)(images, labels)
    by_hand = -(weights * labels * chances.log() + (1 - labels) * (1 - chances).log()).mean()
    assert weighed.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_other_commands_read_the_data_and_the_model(work: Path, capsys: pytest.CaptureFixture[str]):
    found = answer(capsys, "eval", BEST, "--data", "tags.csv", "--split", "all")
    assert set(found["splits"]) == {"train", "val"} and 0 <= found["splits"]["val"]["map"] <= 1
    found = answer(capsys, "check-grad", BEST, "--data", "tags.csv", "--images", 4, "--adjoint", "checkpoint")
    assert found["loss"] == pytest.approx(_loss("tags.csv", 4), rel=1e-4)
    rewritten = ("deepen", BEST, "--blocks", 2, "--no-fit", "--data", "tags.csv", "-o", "deep.safetensors")
    found = answer(capsys, *rewritten)
    assert found["before"]["map"] >= 0 and 0 <= found["label_agreement"] <= 1
    assert model_file.load("deep.safetensors").info.multi_label
    assert answer(capsys, "info", "deep.safetensors")["multi_label"] is True
    assert main(["eval", BEST, "--data", "digits"]) == 1
    assert "the model gives an image any number of labels, and in digits each has one class" in capsys.readouterr().err
    assert main(["eval", "m.safetensors", "--data", "tags.csv"]) == 1
    assert "images have several labels, and the model gives an image one class" in capsys.readouterr().err


def _loss(table: str, images: int) -> float:
    model = model_file.load(BEST)
    data = open_data(table, model.info.preprocessing, "val", images=images, multi_label=True)
    logits = model.eval()(torch.stack([data[i][0] for i in range(images)]))
    labels = torch.stack([data[i][1] for i in range(images)])
    return F.binary_cross_entropy_with_logits(logits, labels).item()


def test_predictions_are_the_labels_above_a_threshold_each_with_its_own_chance(work: Path, capsys):
    model = model_file.load(BEST).eval()
    data = open_data("tags.csv", Preprocessing(size=8, crop_fraction=1.0), "val")
    path = data.file_of(0)
    batch = torch.stack([open_data("tags.csv", model.info.preprocessing, "val")[0][0]])
    chances = dict(zip(COLOURS, model(batch).double().sigmoid()[0].tolist(), strict=True))
    middle = sorted(chances.values())[1]
    (found,) = predict(model, path, threshold=middle - 1e-6)
    assert dict(zip(found.classes, found.probabilities, strict=True)) == pytest.approx(
        {name: chance for name, chance in chances.items() if chance > middle - 1e-5}, abs=1e-6
    )
    assert list(found.probabilities) == sorted(found.probabilities, reverse=True) and len(found.classes) == 2
    (all_of_them,) = predict(model, path, top=3)
    assert set(all_of_them.classes) == set(COLOURS)
    (none,) = predict(model, path, threshold=1.0)
    assert none.classes == () and none.error is None
    assert main(["predict", BEST, path, "--threshold", "1", "--csv", "p.csv"]) == 0
    assert "–" in capsys.readouterr().out and Path("p.csv").read_text() == f"path\n{path}\n"
    for flags, message in (
        (["--threshold", "0.5", "--top", "2"], "--top gives so many labels, --threshold the probable ones"),
        (["--threshold", "1.5"], "--threshold 1.5"),
        (["--top", "4"], "tells 3 classes apart"),
    ):
        assert main(["predict", BEST, path, *flags]) == 2 and message in capsys.readouterr().err
    assert main(["predict", "m.safetensors", path, "--threshold", "0.5"]) == 2
    assert "--threshold is of models that give an image several labels" in capsys.readouterr().err


def test_the_page_has_figures_by_label_and_no_confusions(work: Path, capsys: pytest.CaptureFixture[str]):
    found = answer(capsys, "report", "tagged-run")
    (about,) = found["runs"]
    assert about["images"]["map"] == pytest.approx(about["best_map"])
    assert [own["class"] for own in about["images"]["classes"]] == list(COLOURS)
    page = Path("tagged-run/report.html").read_text()
    assert "mean average precision" in page and "average precision" in page and "mAP before" in page
    assert "Confusion matrix" not in page and "top-1" not in page


def test_an_export_says_what_its_outputs_are(work: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", BEST, "-o", "plain.safetensors"]) == 0
    from safetensors import safe_open

    with safe_open("plain.safetensors", "pt") as file:
        described = json.loads(file.metadata()["resode.json"])
    assert described["multi_label"] is True and described["class_names"] == list(COLOURS)


def test_a_head_for_labels_gives_way_to_one_for_classes_and_the_other_way_round(work: Path):
    assert main(run("-o", "new", "--new-head", model=BEST)) == 0
    info = model_file.load("new/best.safetensors").info
    assert not info.multi_label and info.num_classes == 10
    assert "multi_label" not in model_file.read_metadata(Path("new/best.safetensors"))
    assert main(run("-o", "again", *TABLE, "--new-head", model="new/best.safetensors")) == 0
    assert model_file.load("again/best.safetensors").info.multi_label


def test_a_teacher_of_several_labels_teaches_each_labels_chance(work: Path, capsys: pytest.CaptureFixture[str]):
    asked = ("--teacher", BEST, "--distill", "1", "--lr", "1e-9")
    found = answer(capsys, *run("-o", "taught", "--data", "tags.csv", "--no-augment", *asked, model=BEST, steps=1))
    assert found["after"]["map"] == pytest.approx(found["before"]["map"])
    with open("taught/log.csv", newline="") as file:
        (loss,) = (float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train")
    assert loss == pytest.approx(0, abs=1e-3)  # in train mode, the BatchNorm of the student alone uses the batch
