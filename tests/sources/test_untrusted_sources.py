"""What a file may ask for: arguments that shape layers, weights that are tensors; nothing that runs or fetches."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from resode_cli.errors import ResodeError
from resode_cli.network.parts import SourceSpec
from resode_cli.sources import timm_models
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.registry import build, open_source
from resode_cli.sources.timm_arguments import ALLOWED
from resode_cli.sources.weights import load_weights

ARGUMENTS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}


class Marks:
    """Creates a file when unpickled by what runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.fixture
def evil(tmp_path: Path) -> tuple[Path, Path]:
    """A pickle that leaves a trace where it is run, and the trace."""
    path, trace = tmp_path / "evil.pth", tmp_path / "was-run"
    path.write_bytes(pickle.dumps({"fc.weight": Marks(trace)}, protocol=2))
    return path, trace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = timm.create_model("resnet18", num_classes=3, **ARGUMENTS)
    save_for_hf(net, tmp_path / "net", model_args=ARGUMENTS, safe_serialization=True)
    return tmp_path / "net"


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


REFUSED = {
    "checkpoint_path": "evil.pth",
    "pretrained": True,
    "pretrained_cfg": {"file": "evil.pth"},
    "pretrained_cfg_overlay": {"file": "evil.pth", "custom_load": True},
    "pretrained_strict": False,
    "pretrained_filter_fn": "f",
    "cache_dir": "/tmp",
    "features_only": True,
    "scriptable": True,
    "exportable": True,
    "kwargs_filter": ["layers"],
    "feature_cfg": {},
    "device": "cuda",
    "block": "Bottleneck",
    "no_such_thing": 1,
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("origin", ["model file", "folder"])
def test_arguments_that_do_more_than_shape_layers_are_refused_by_name(name, origin, folder, evil):
    value = json.loads(json.dumps(REFUSED[name]).replace("evil.pth", str(evil[0])))
    with pytest.raises(ResodeError, match=f"argument '{name}' of resnet18 is not one that a file may set") as caught:
        if origin == "folder":
            configure(folder, model_args={name: value})
            open_source(f"local-dir:{folder}")
        else:
            build(SourceSpec("timm", "resnet18", arguments={"model_args": {**ARGUMENTS, name: value}}))
    assert "\n" not in str(caught.value) and not evil[1].exists()


def test_no_allowed_argument_names_a_place():
    places = ("path", "file", "url", "dir", "pretrained", "cfg", "hub", "strict", "script", "export", "feature")
    found = {name for name in ALLOWED if any(word in name.split("_") for word in places)}
    assert found == {"drop_path_rate", "strict_img_size"}  # of stochastic depth, and a check of the image's size


VALUES = {
    "not a mapping": ([1], "are a list"),
    "a path": ({"act_layer": "../../x"}, "'act_layer' of resnet18 is '../../x'"),
    "too deep": ({"layers": [10**6, 1, 1, 1]}, "'layers' of resnet18 is"),
    "many blocks": ({"layers": [60000, 1, 1, 1]}, "asks for 60,003 blocks"),
    "infinite": ({"drop_rate": float("inf")}, "'drop_rate' of resnet18 is inf"),
    "classes": ({"num_classes": 10**9}, "'num_classes' of resnet18 is 1000000000"),
    "words": ({"in_chans": "three"}, "'in_chans' of resnet18 is 'three'"),
    "a long list": ({"layers": [1] * 1000}, "'layers' of resnet18 is"),
    "nested": ({"layers": [[[[[1]]]]]}, "'layers' of resnet18 is"),
    "block arguments": ({"block_args": {"file": "x"}}, "'block_args' of resnet18 is"),
    "of another network": ({"window_size": 7}, "timm cannot build resnet18 with window_size=7"),
    "of a wrong type": ({"layers": 3}, "timm cannot build resnet18 with layers=3"),
    "no such layer": ({"act_layer": "nothing"}, "timm cannot build resnet18 with act_layer='nothing'"),
    "memory": ({"layers": [2, 1, 1, 1], "channels": [60000] * 4}, "GiB for its weights"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_cannot_be_are_refused_before_anything_is_built(kind):
    arguments, message = VALUES[kind]
    with pytest.raises(ResodeError, match=message) as caught:
        build(SourceSpec("timm", "resnet18", arguments={"model_args": arguments}))
    assert "\n" not in str(caught.value)


def test_arguments_that_shape_layers_are_taken():
    arguments = {"stem_type": "deep", "stem_width": 4, "act_layer": "silu", "block_args": {"attn_layer": "se"}}
    net = build(SourceSpec("timm", "resnet18", arguments={"model_args": {**ARGUMENTS, **arguments, "in_chans": 1}}))
    assert net.conv1[0].in_channels == 1 and isinstance(net.act1, nn.SiLU) and hasattr(net.layer1[0].se, "fc1")


@pytest.mark.parametrize(
    "entry", ["file", "url", "hf_hub_id", "state_dict", "custom_load", "source", "hf_hub_filename"]
)
def test_a_folder_loads_its_own_weights_whatever_its_config_names(entry, folder, evil):
    value = {"state_dict": {"fc.weight": [1]}, "custom_load": True, "source": "local-dir", "url": f"file://{evil[0]}"}
    configure(folder, pretrained_cfg={"file": str(evil[0]), entry: value.get(entry, str(evil[0]))})
    (folder / "model.safetensors").rename(folder / "kept.safetensors")
    (folder / "pytorch_model.bin").write_bytes(evil[0].read_bytes())
    with pytest.raises(ResodeError, match="could run code"):
        open_source(f"local-dir:{folder}")
    (folder / "kept.safetensors").rename(folder / "model.safetensors")
    assert open_source(f"local-dir:{folder}").spec.weights_sha256 is not None
    assert not evil[1].exists()


def test_a_repository_of_the_hub_is_asked_for_its_own_weights_alone(monkeypatch):
    """timm is handed only what shapes layers and images of the repository's own configuration."""
    given: list[dict[str, object]] = []
    config = {"file": "x", "url": "y", "custom_load": "hf", "hf_hub_id": "other/place", "num_classes": 3}
    monkeypatch.setattr(
        "timm.models.load_model_config_from_hf", lambda name: (dict(config), "resnet18", dict(ARGUMENTS))
    )
    monkeypatch.setattr(
        timm_models.timm,  # type: ignore[attr-defined]
        "create_model",
        lambda name, **arguments: given.append(arguments) or CifarResNet(2),  # type: ignore[attr-defined]
    )
    open_source("hf-hub:someone/net")
    for arguments in given:
        cfg = arguments.pop("pretrained_cfg")
        assert cfg == {"architecture": "resnet18", "hf_hub_id": "someone/net", "source": "hf-hub", "num_classes": 3}
        assert arguments.pop("pretrained") in (True, False)
        assert arguments == {**ARGUMENTS, "num_classes": 3}
    assert given


IMAGES = {
    "input_size": [3, "x", 224],
    "mean": ["a", 0, 0],
    "std": [0, 0, 0],
    "crop_pct": -1,
    "interpolation": "../x",
    "crop_mode": 7,
    "num_classes": "many",
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_config_that_describes_no_images_is_one_line(name, folder):
    configure(folder, pretrained_cfg={name: IMAGES[name]}, **({"num_classes": "many"} if name == "num_classes" else {}))
    with pytest.raises(ResodeError, match=rf"config\.json: its {name} is .*which cannot be"):
        open_source(f"local-dir:{folder}")


# --- files of weights --------------------------------------------------------------------------------------


def tiny() -> CifarResNet:
    return CifarResNet(2, num_classes=5, widths=(4, 4, 4))


def bomb(path: Path) -> None:
    torch.save(tiny().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{next(iter(members)).split('/')[0]}/data/999", b"\0" * 30_000_000)


def overlapping(path: Path) -> None:
    """Every member of the directory is the same, large one."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\0" * 200_000)
        first = archive.infolist()[0]
        for i in range(50):
            archive.filelist.append(first)
            archive.NameToInfo[f"x/data/{i}"] = first


def itself() -> dict:
    state: dict = {"epoch": 1}
    state["state_dict"] = state["model"] = state
    return state


def crafted_header(path: Path, shape: list[int], end: int) -> None:
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)


def nested() -> list:
    inner: list = []
    for _ in range(300):
        inner = [inner]
    return inner


def laughs() -> dict:
    state: dict = {"x": 1}
    for _ in range(60):
        state = {"a": state, "b": state}
    return state


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "zip bomb.pth": (bomb, "a compressed archive of .* that unpacks to"),
    "overlapping.pth": (overlapping, "a compressed archive of .* that unpacks to"),
    "holds itself.pth": (lambda p: torch.save(itself(), p), "no state dict among its entries"),
    "nested lists.pth": (lambda p: torch.save(nested(), p), "holds a list"),
    "a billion dictionaries.pth": (lambda p: torch.save(laughs(), p), "no state dict"),
    "a script.pt": (lambda p: torch.jit.script(nn.Linear(2, 2)).save(str(p)), "a TorchScript program"),
    "a huge shape.safetensors": (lambda p: crafted_header(p, [2**40, 2**20], 16), "not a complete safetensors"),
    "an end beyond the file.safetensors": (lambda p: crafted_header(p, [2**30], 2**32), "not a complete safetensors"),
    "no shape.safetensors": (lambda p: crafted_header(p, [-1], 16), "not a complete safetensors"),
    "a huge header.safetensors": (lambda p: p.write_bytes(b"\xff" * 7 + b"\x00" + b"{}"), "not a complete safetensors"),
    "no tensors.pth": (lambda p: torch.save({"state_dict": {"a": 1, "b": "x"}}, p), "no state dict"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_a_file_made_to_harm_is_one_line(name, tmp_path):
    write, message = FILES[name]
    write(tmp_path / name)
    with pytest.raises(ResodeError, match=message) as caught:
        load_weights(tiny(), tmp_path / name, num_classes=None)
    assert "\n" not in str(caught.value)


WEIGHT = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
TENSORS = {
    "sparse": (lambda: WEIGHT.to_sparse(), "1 sparse_coo instead of dense"),
    "complex": (lambda: WEIGHT.to(torch.complex64), "1 of type complex64 instead of float32"),
    "integers": (lambda: WEIGHT.to(torch.int32), "1 of type int32 instead of float32"),
    "truth": (lambda: WEIGHT > 0, "1 of type bool instead of float32"),
    "quantized": (lambda: torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8), "1 quantized"),
    "meta": (lambda: WEIGHT.to("meta"), "1 on the meta device"),
    "a number": (lambda: 3.5, "1 missing: conv1.weight"),
    "a list": (lambda: WEIGHT.tolist(), "1 missing: conv1.weight"),
    "one value, repeated": (lambda: torch.zeros(1).expand(2**40), r"1 wrong shape: conv1.weight \(1099511627776,\)"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_that_is_no_weight_is_named(kind, tmp_path):
    value, message = TENSORS[kind]
    torch.save({**tiny().state_dict(), "conv1.weight": value()}, tmp_path / "w.pth")
    with pytest.raises(ResodeError, match=message):
        load_weights(tiny(), tmp_path / "w.pth", num_classes=None)


@pytest.mark.parametrize(
    ("dtype", "rounded"), [(torch.float16, False), (torch.bfloat16, False), (torch.float64, True)], ids=str
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_another_precision_are_loaded_and_rounding_is_said(dtype, rounded, suffix, tmp_path):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny().state_dict().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, tmp_path / f"w{suffix}")
    net = tiny()
    notes = load_weights(net, tmp_path / f"w{suffix}", num_classes=None)
    assert bool(notes) == rounded and all("float64" in note and "rounded to float32" in note for note in notes)
    assert torch.equal(net.conv1.weight, state["conv1.weight"].float()) and net.conv1.weight.dtype == torch.float32


def test_a_view_of_a_larger_storage_is_loaded_alone(tmp_path):
    state = tiny().state_dict()
    state["linear.weight"] = torch.randn(5, 40)[:, ::10]
    torch.save(state, tmp_path / "w.pth")
    net = tiny()
    load_weights(net, tmp_path / "w.pth", num_classes=None)
    assert torch.equal(net.linear.weight, state["linear.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value, tiny_file, tmp_path):
    net = open_source(f"{tiny_file}:make", pretrained=False).net
    with torch.no_grad():
        net.linear.weight[0, 0] = net.bn1.running_mean[1] = value
    torch.save(net.state_dict(), tmp_path / "w.pth")
    (note,) = [n for n in open_source(f"{tiny_file}:make", weights=tmp_path / "w.pth").notes if "finite" in n]
    assert note == "warning: not finite (NaN or infinite) in 2 tensors of the weights: bn1.running_mean, linear.weight"
