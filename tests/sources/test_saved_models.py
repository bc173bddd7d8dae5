"""Networks that timm saved to a folder or to the hub, of which a cache without network stands in for the hub."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
REPOSITORY = "someone/flowers-resnet"
ARGUMENTS = {"layers": [2, 1, 1, 1], "channels": [8, 16, 16, 24], "stem_type": "deep", "stem_width": 4}
CONFIG = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 64, 64), "crop_mode": "squash"}


@pytest.fixture
def saved(tmp_path: Path, randomise) -> tuple[Path, nn.Module]:
    """A folder as timm writes it, and the network."""
    net = timm.create_model("resnet18", num_classes=7, pretrained_cfg_overlay=CONFIG, **ARGUMENTS)
    save_for_hf(randomise(net), tmp_path / "net", model_args=ARGUMENTS, safe_serialization=True)
    return tmp_path / "net", net.eval()


@pytest.fixture
def hub(saved, tmp_path: Path, monkeypatch) -> Path:
    """The hub's cache, laid out as huggingface_hub does, and no network."""
    folder, _ = saved
    cache = tmp_path / "cache" / f"models--{REPOSITORY.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c0ffee")
    shutil.copytree(folder, cache / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


def test_a_saved_folder_converts_with_its_arguments_classes_and_preprocessing(saved, tmp_path):
    folder, net = saved
    source = open_source(f"local-dir:{folder}")
    assert source.preprocessing.mean == CONFIG["mean"] and source.preprocessing.std == CONFIG["std"]
    assert source.preprocessing.size == 64 and source.preprocessing.crop_mode == "squash"
    model, check = convert(source)
    assert check.identical and torch.equal(logits(model), logits(net)) and model.info.num_classes == 7
    model_file.save(model, tmp_path / "m.safetensors")
    shutil.rmtree(folder)
    assert torch.equal(logits(model_file.load(tmp_path / "m.safetensors")), logits(net))


def test_a_repository_of_the_hub_converts_and_its_file_needs_no_hub(saved, hub, tmp_path):
    model, check = convert(open_source(f"hf-hub:{REPOSITORY}"))
    assert check.identical and torch.equal(logits(model), logits(saved[1]))
    assert model.info.source.weights == f"hf-hub:{REPOSITORY}"
    model_file.save(model, tmp_path / "m.safetensors")
    shutil.rmtree(hub)
    assert torch.equal(logits(model_file.load(tmp_path / "m.safetensors")), logits(saved[1]))


@pytest.mark.parametrize("kind", ["local-dir", "hf-hub"])
def test_another_number_of_classes_keeps_the_body_and_says_so(kind, saved, hub):
    folder, net = saved
    source = open_source(f"{kind}:{folder if kind == 'local-dir' else REPOSITORY}", num_classes=3)
    assert any("7 classes" in note and "starts at random for 3" in note for note in source.notes)
    state, own = source.net.state_dict(), net.state_dict()
    assert all(torch.equal(state[key], own[key]) for key in own if not key.startswith("fc."))
    assert state["fc.weight"].shape == (3, own["fc.weight"].shape[1])


def test_without_pretrained_the_saved_network_is_random(saved, hub):
    source = open_source(f"hf-hub:{REPOSITORY}", pretrained=False)
    assert not torch.equal(source.net.conv1[0].weight, saved[1].conv1[0].weight)
    assert any("random" in note for note in source.notes)


@pytest.mark.parametrize("option", [{"stem": "cifar"}, {"shortcut": "A"}])
@pytest.mark.parametrize("kind", ["local-dir", "hf-hub"])
def test_options_that_change_layers_are_refused_not_ignored(kind, option, saved, hub):
    with pytest.raises(UsageError, match=f"--{next(iter(option))} does not apply to {kind}:"):
        open_source(f"{kind}:{saved[0] if kind == 'local-dir' else REPOSITORY}", **option)


def test_a_repository_that_cannot_be_reached_is_a_clear_error(hub):
    with pytest.raises(
        ResodeError, match="hf-hub:someone/else cannot be fetched.*connect to the network, or .*local-dir:FOLDER"
    ):
        open_source("hf-hub:someone/else", pretrained=False)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UsageError, match="folder '.*nowhere' does not exist"):
        open_source(f"local-dir:{tmp_path / 'nowhere'}")


class Attack:
    def __reduce__(self):
        return print, ("run",)


def write_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Attack()}, protocol=2))


def nothing(folder: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).unlink(missing_ok=True)


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json of timm's"),
    "broken config": (lambda folder: halve(folder / "config.json"), "no config.json of timm's"),
    "a config of something else": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        "no config.json of timm's",
    ),
    "unknown architecture": (lambda folder: write_config(folder, architecture="resnet19"), "'resnet19'; did you mean"),
    "wrong architecture": (lambda folder: write_config(folder, architecture="resnet26"), "does not fit ResNet"),
    "half a download": (lambda folder: halve(folder / "model.safetensors"), "not a complete safetensors file"),
    "code": (with_code, "could run code"),
    "no weights": (nothing, r"no weights \(model.safetensors or pytorch_model.bin\); pass --weights"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_answered_in_one_line(kind, saved):
    folder, _ = saved
    damage, message = BROKEN[kind]
    damage(folder)
    with pytest.raises(ResodeError, match=message) as caught:
        open_source(f"local-dir:{folder}")
    assert "\n" not in str(caught.value)
