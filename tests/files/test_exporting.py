"""Formats for other programs: the source's state dict, torch.export, ONNX."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import resode_cli
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files.exporting import Graph, export, source_state
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import PreprocessingChoice
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert, random_batch
from resode_cli.surgery.rewrite import deepen, tie

ONNX = importlib.util.find_spec("onnxruntime") is not None
SIZE = 32
GRAPHS = [".pt2", *([".onnx"] if ONNX else [])]
NETWORK = """
from resode_cli.sources.cifar import CifarResNet
def make():
    return CifarResNet(1, num_classes=5, widths=(2, 4, 4))
"""
NAMES = ("ant", "bée", "cat", "dog, small", "e")
# One architecture per family.
FAMILIES = {
    "timm:resnet18": 32,
    "timm:res2net50_14w_8s": 32,
    "timm:resnest26d": 32,
    "timm:skresnet18": 32,
    "timm:resnetv2_18": 32,
    "timm:legacy_seresnet18": 32,
    "timm:regnety_002": 32,
    "timm:gernet_s": 32,
    "timm:lambda_resnet26t": 32,
    "timm:tresnet_m": 32,
    "timm:nf_regnet_b0": 32,
    "torchvision:resnet18": 32,
    "torchvision:regnet_y_400mf": 32,
    "timm:hrnet_w18_small": 32,
    "timm:cs3darknet_s": 32,
    "timm:legacy_xception": 32,
    "timm:xception41": 32,
    "timm:inception_resnet_v2": 96,
    "timm:ese_vovnet39b": 32,
    "timm:hgnet_tiny": 32,
    "timm:mobilevit_xxs": 32,
    "timm:vit_tiny_r_s16_p8_224": 224,
    "timm:convnext_atto": 32,
    "timm:swin_tiny_patch4_window7_224": 224,
    "cifar:resnet20": 32,
}


def opened(name: str, randomise, size: int = SIZE):
    source = open_source(
        name, pretrained=False, num_classes=10, preprocessing=PreprocessingChoice(size=size, crop_fraction=1.0)
    )
    randomise(source.net)
    return source


def converted(name: str, randomise) -> OdeResNet:
    return convert(opened(name, randomise))[0]


LONG_FAMILIES = (
    "timm:inception_resnet_v2",
    "timm:swin_tiny_patch4_window7_224",
    "timm:tresnet_m",
    "timm:xception41",
    "timm:ese_vovnet39b",
    "timm:gernet_s",
    "timm:res2net50_14w_8s",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG_FAMILIES else ()) for name in FAMILIES]
)
def test_convert_and_export_give_the_source_back_tensor_for_tensor(name: str, randomise):
    source = opened(name, randomise, FAMILIES[name])
    before = {key: value.clone() for key, value in source.net.state_dict().items()}
    after = source_state(convert(source, images=1)[0])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_the_library_loads_the_file_strictly(name: str, randomise, tmp_path):
    model = converted(name, randomise)
    images = random_batch(model.info.preprocessing, 2)
    check = export(model, tmp_path / "plain.safetensors", images)
    library, _, architecture = name.partition(":")
    if library == "timm":
        net = timm.create_model(architecture, num_classes=10, checkpoint_path=str(tmp_path / "plain.safetensors"))
    else:
        net = torchvision.models.get_model(architecture, num_classes=10)
        net.load_state_dict(load_file(tmp_path / "plain.safetensors"), strict=True)
    with torch.no_grad():
        assert check.identical and torch.equal(net.eval()(images), model(images))


def test_tied_blocks_become_copies(tiny, images, tmp_path):
    tiny.replace_stage("layer1", tie(tiny.stages["layer1"]))
    assert export(tiny, tmp_path / "tied.safetensors", images).identical
    state = load_file(tmp_path / "tied.safetensors")
    assert torch.equal(state["layer1.0.conv1.weight"], state["layer1.1.conv1.weight"])


REFUSED = {
    "deeper": (lambda stage: deepen(stage, 4), "takes 4 steps instead of 3"),
    "heun": (lambda stage: stage.use_scheme("heun"), "takes heun steps"),
    "linear": (lambda stage: setattr(stage, "spec", replace(stage.spec, blends=(0.5, 0.5, 0))), "has weights linear"),
    "T": (lambda stage: setattr(stage, "spec", replace(stage.spec, horizon=Fraction(1))), "has steps of size 0.333"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_sources_blocks_cannot_express_is_refused(kind: str, tiny, images, tmp_path):
    change, reason = REFUSED[kind]
    stage = change(tiny.stages["layer1"])
    if isinstance(stage, nn.Module):
        tiny.replace_stage("layer1", stage)
    with pytest.raises(ResodeError, match=rf"stage layer1 {reason}.*export to .pt2 or .onnx instead"):
        export(tiny, tmp_path / "plain.safetensors", images)
    assert not (tmp_path / "plain.safetensors").exists()


def test_pre_form_is_refused_where_it_is_another_function(randomise, tmp_path):
    model, _ = convert(opened("timm:resnet18", randomise), form="pre")
    with pytest.raises(ResodeError, match="stage layer1 is in pre form"):
        source_state(model)
    model, _ = convert(opened("timm:resnetv2_18", randomise), form="pre")
    assert source_state(model)


def deepened_and_tied(randomise) -> OdeResNet:
    model = converted("cifar:resnet20", randomise)
    for name, stage in model.stages.items():
        model.replace_stage(name, deepen(tie(stage), 7))
    return model


MODELS = {
    "resnet18": lambda randomise: converted("timm:resnet18", randomise),
    "resnetv2_18": lambda randomise: converted("timm:resnetv2_18", randomise),
    "regnety_002": lambda randomise: converted("timm:regnety_002", randomise),
    "deepened and tied": deepened_and_tied,
}


@pytest.fixture(params=MODELS)
def any_model(request, randomise) -> OdeResNet:
    return MODELS[request.param](randomise)


def assert_close(found: Tensor, model: OdeResNet, images: Tensor) -> None:
    with torch.no_grad():
        expected = model(images)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.slow
def test_a_program_has_the_models_logits_for_any_batch(any_model, tmp_path):
    images = random_batch(any_model.info.preprocessing, 3)
    check = export(any_model, tmp_path / "m.pt2", images)
    assert check.max_difference <= 1e-5
    program = torch.export.load(tmp_path / "m.pt2").module()
    for batch in (images, images[:2], images.repeat(2, 1, 1, 1)):
        assert_close(program(batch), any_model, batch)


@pytest.mark.slow
@pytest.mark.skipif(not ONNX, reason="ONNX is an optional extra")
def test_an_onnx_graph_has_the_models_logits_for_any_batch(any_model, tmp_path):
    import onnxruntime

    images = random_batch(any_model.info.preprocessing, 3)
    export(any_model, tmp_path / "m.onnx", images)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (images, images[:2], images.repeat(2, 1, 1, 1)):
        assert_close(torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]), any_model, batch)


def test_the_model_stays_what_it_was_and_a_graph_may_be_of_one_shape(tiny, images, tmp_path):
    tiny.train()
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    export(tiny, tmp_path / "m.pt2", images, graph=Graph(batch_size=len(images)))
    assert tiny.training and all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())
    program = torch.export.load(tmp_path / "m.pt2").module()
    for other in (images[:1], images.repeat(1, 1, 2, 2)):
        with pytest.raises(Exception, match="(?i)guard|expected"):
            program(other)


def test_an_unknown_suffix_is_named(tiny, images, tmp_path):
    with pytest.raises(UsageError, match=r"suffix names the format \(allowed: .safetensors, .pt2, .onnx; or FOLDER/"):
        export(tiny, tmp_path / "m.pth", images)


# --- what a file takes, and what it says of itself ------------------------------------------------------------


@pytest.fixture
def named(tmp_path, randomise) -> OdeResNet:
    """The smallest network, with named classes."""
    (tmp_path / "net.py").write_text(NETWORK)
    source = open_source(f"{tmp_path / 'net.py'}:make", pretrained=False, preprocessing=PreprocessingChoice(size=8))
    randomise(source.net)
    model = convert(source)[0]
    model.name_classes(NAMES)
    return model


def export_all(model: OdeResNet, path: Path) -> Path:
    """For any number of images of any size where it is a graph."""
    export(model, path, random_batch(model.info.preprocessing, 2), graph=Graph(dynamic_size=True))
    return path


def read(path: Path) -> tuple[Callable[[Tensor], Tensor] | None, dict[str, Any]]:
    """What a user does: the network, where the file holds it, and what the file says."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return None, json.loads(file.metadata()["resode.json"])
    if path.suffix == ".pt2":
        extra = {"resode.json": ""}
        program = torch.export.load(path, extra_files=extra)
        return program.module(), json.loads(extra["resode.json"])
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    said = json.loads(session.get_modelmeta().custom_metadata_map["resode.json"])
    outputs, name = [said["output_name"]], said["input_name"]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    return lambda x: torch.from_numpy(session.run(outputs, {name: x.numpy()})[0]), said


@pytest.mark.parametrize("suffix", [*GRAPHS, ".safetensors"])
def test_a_file_says_what_it_is_and_takes_what_it_says_and_is_the_same_again(suffix: str, named, tmp_path):
    """In one test, for exporting is what costs."""
    if suffix in GRAPHS:
        named.replace_stage("layer1", deepen(named.stages["layer1"], 2))
    path, pre = export_all(named, tmp_path / f"m{suffix}"), named.info.preprocessing
    network, said = read(path)
    assert said["class_names"] == list(NAMES) and said["num_classes"] == 5
    assert (said["input_size"], said["channels"]) == ([3, 8, 8], 3)
    assert (tuple(said["mean"]), tuple(said["std"])) == (pre.mean, pre.std)
    assert (said["interpolation"], said["crop_fraction"], said["crop_mode"]) == ("bilinear", 1.0, "center")
    assert said["source"] == "net.py:make" and said["resode_version"] == resode_cli.__version__
    if network is not None:
        assert said["batch_size"] is None and said["dynamic_size"] is True
        for shape in ((1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 24, 11)):
            batch = torch.randn(shape, generator=torch.Generator().manual_seed(4))
            assert_close(network(batch), named, batch)
    torch.rand(5)  # whatever was drawn or exported before
    assert export_all(named, tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()


class Positions(CifarResNet):
    """With a number for every pixel."""

    def __init__(self) -> None:
        super().__init__(2, widths=(2, 4, 4))
        self.positions = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.positions)


class Branching(CifarResNet):
    """Another function for wide images, which no graph of both can be."""

    def __init__(self) -> None:
        super().__init__(2, widths=(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[-1] > 20 else 2 * x)


UNSIZED = {
    "takes images of 8×8, and none of 40×72: The size of tensor": Positions,
    r"cannot be exported: Guard failed.*20; without --dynamic-size": Branching,
}


@pytest.mark.parametrize(
    "reason", [pytest.param(r, marks=pytest.mark.slow if UNSIZED[r] is Branching else ()) for r in UNSIZED]
)
def test_a_network_of_one_size_is_refused_for_any(reason: str, tmp_path):
    network = UNSIZED[reason]()
    network.default_cfg = {"input_size": (3, 8, 8)}
    model, _ = convert(network)
    with pytest.raises(ResodeError, match=reason):
        export_all(model, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
