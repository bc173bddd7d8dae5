"""Folders as timm saves them: written, and read by timm and as a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.files.exporting import export
from resode_cli.files.formats import Exporting, format_of
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing, PreprocessingChoice
from resode_cli.reports.model_card import model_card
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert, random_batch
from resode_cli.surgery.rewrite import deepen

ARGUMENTS = {"layers": [2, 1, 1, 1], "channels": [8, 16, 16, 24], "in_chans": 1}
NAMES = ("ant", "bée", "cat")


@pytest.fixture
def model(tmp_path: Path, randomise) -> OdeResNet:
    """A small grey network of timm's with named classes, and preprocessing that is not timm's."""
    net = timm.create_model("resnet18", num_classes=3, **ARGUMENTS)
    save_for_hf(randomise(net), tmp_path / "source", model_args=ARGUMENTS, safe_serialization=True)
    chosen = PreprocessingChoice(
        size=(32, 48), mean=(0.3,), std=(0.2,), interpolation="bilinear", crop_fraction=0.9, crop_mode="squash"
    )
    made, _ = convert(open_source(f"local-dir:{tmp_path / 'source'}", preprocessing=chosen), images=1)
    made.name_classes(NAMES)
    return made


@pytest.fixture
def images(model: OdeResNet) -> torch.Tensor:
    return random_batch(model.info.preprocessing, 2)


def logits(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(images)


def test_timm_and_resode_read_what_was_written(model, images, tmp_path):
    folder = tmp_path / "a folder # of timm's"
    assert export(model, folder, images, kind="timm", card="# A card").identical
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    net = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(net, images), logits(model, images))
    assert tuple(net.pretrained_cfg["label_names"]) == NAMES and net.num_classes == 3
    data = resolve_model_data_config(net)
    assert (data["input_size"], [*data["mean"]], [*data["std"]]) == ((1, 32, 48), [0.3], [0.2])
    assert (data["interpolation"], data["crop_pct"], data["crop_mode"]) == ("bilinear", 0.9, "squash")
    source = open_source(f"local-dir:{folder}")
    assert source.class_names == NAMES
    assert source.preprocessing == Preprocessing((32, 48), (0.3,), (0.2,), "bilinear", 0.9, "squash")
    again, check = convert(source, images=1)
    assert again.info.class_names == NAMES and check.identical
    assert torch.equal(logits(again, images), logits(model, images))
    # Names are of the saved head: a random one, or one for other classes, has none.
    assert open_source(f"local-dir:{folder}", num_classes=2).class_names is None
    assert open_source(f"local-dir:{folder}", pretrained=False).class_names is None


def test_that_images_have_several_labels_is_in_the_folder_too(model, images, tmp_path):
    model.name_classes(NAMES, multi_label=True)
    assert "An image may have any number of them; the sigmoid" in model_card(model, "timm", "f")
    export(model, tmp_path / "f", images, kind="timm", card="# A card")
    net = timm.create_model(f"local-dir:{tmp_path / 'f'}", pretrained=True)
    assert torch.equal(logits(net, images), logits(model, images))
    again, _ = convert(open_source(f"local-dir:{tmp_path / 'f'}"), images=1)
    assert again.info.multi_label and again.info.class_names == NAMES
    assert not open_source(f"local-dir:{tmp_path / 'f'}", num_classes=2).multi_label


def test_what_timm_cannot_build_is_refused(model, images, tiny, tmp_path):
    model.replace_stage("layer1", deepen(model.stages["layer1"], 4))
    with pytest.raises(ResodeError, match=r"stage layer1 takes 4 steps.*export to .pt2 or .onnx"):
        export(model, tmp_path / "out", images, kind="timm")
    with pytest.raises(ResodeError, match=r"net.py:make is no network of timm; export to .safetensors"):
        export(tiny, tmp_path / "out", images, kind="timm")
    source = open_source("timm:resnet18", pretrained=False, num_classes=2, stem="cifar")
    with pytest.raises(ResodeError, match="timm builds no resnet18 with the stem that --stem made"):
        export(convert(source, images=1)[0], tmp_path / "out", images, kind="timm")
    assert not (tmp_path / "out").exists()


WRONG_NAMES = {
    "are 2 names of 3 classes": ["a", "b"],
    "name two classes alike": ["a", "b", "a"],
    "are no list of names": ["a", 1, None],
}


@pytest.mark.parametrize("says", WRONG_NAMES)
def test_names_that_cannot_be_are_left_out_and_said(says: str, model, tmp_path):
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "label_names": WRONG_NAMES[says]}))
    source = open_source(f"local-dir:{tmp_path / 'source'}")
    assert source.class_names is None and any(says in note for note in source.notes)


def test_names_by_number_are_in_the_order_of_the_outputs(model, tmp_path):
    config = tmp_path / "source" / "config.json"
    names = {"2": "two", "0": "zero", "1": "one"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "label_names": names}))
    assert open_source(f"local-dir:{tmp_path / 'source'}").class_names == ("zero", "one", "two")


@pytest.mark.parametrize(
    ("out", "format", "found"),
    [
        (None, None, "pt2"),
        (None, "onnx", "onnx"),
        ("x.onnx", None, "onnx"),
        ("x.safetensors", "safetensors", "safetensors"),
        ("x.a1_in1k/", None, "timm"),
        ("x.a1_in1k", "timm", "timm"),
        ("x", None, "the suffix names the format"),
        ("x.pth", None, "the suffix names the format"),
        ("x.onnx", "pt2", "'x.onnx' is named as one of onnx"),
        ("x/", "onnx", "'x/' is named as one of timm"),
        ("x", "onnx", "must end in .onnx"),
    ],
)
def test_the_format_is_the_outputs_and_never_another(out, format, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if " " not in found:
        assert format_of(out, Exporting(format)) == found
    else:
        with pytest.raises(UsageError, match=found):
            format_of(out, Exporting(format))


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"dynamic_size": True}])
def test_options_of_graphs_are_refused_for_tensors(options):
    for kind in ("safetensors", "timm"):
        with pytest.raises(UsageError, match="is of .pt2 and .onnx"):
            format_of(None, Exporting(kind, **options))
