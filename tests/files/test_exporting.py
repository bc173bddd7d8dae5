"""Formats for other programs: the source's state dict, torch.export, ONNX."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from fractions import Fraction

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.files.exporting import export, source_state
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import PreprocessingChoice
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert, random_batch
from resode_cli.surgery.rewrite import deepen, tie

ONNX = importlib.util.find_spec("onnxruntime") is not None
SIZE = 64
# One architecture per family.
FAMILIES = {
    "timm:resnet18": 64,
    "timm:res2net50_14w_8s": 64,
    "timm:resnest26d": 64,
    "timm:skresnet18": 64,
    "timm:resnetv2_18": 64,
    "timm:legacy_seresnet18": 64,
    "timm:regnety_002": 64,
    "timm:gernet_s": 64,
    "timm:lambda_resnet26t": 64,
    "timm:tresnet_m": 64,
    "timm:nf_regnet_b0": 64,
    "torchvision:resnet18": 64,
    "torchvision:regnet_y_400mf": 64,
    "timm:hrnet_w18_small": 64,
    "timm:cs3darknet_s": 64,
    "timm:legacy_xception": 64,
    "timm:xception41": 64,
    "timm:inception_resnet_v2": 128,
    "timm:ese_vovnet39b": 64,
    "timm:hgnet_tiny": 64,
    "timm:mobilevit_xxs": 64,
    "timm:vit_tiny_r_s16_p8_224": 224,
    "timm:convnext_atto": 64,
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


LONG_FAMILIES = ("timm:inception_resnet_v2", "timm:swin_tiny_patch4_window7_224")


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


def test_tied_blocks_become_copies(randomise, tmp_path):
    model = converted("timm:resnet18", randomise)
    model.replace_stage("layer1", tie(model.stages["layer1"]))
    images = random_batch(model.info.preprocessing, 2)
    assert export(model, tmp_path / "tied.safetensors", images).identical
    state = load_file(tmp_path / "tied.safetensors")
    assert torch.equal(state["layer1.0.conv1.weight"], state["layer1.1.conv1.weight"])


REFUSED = {
    "deeper": (lambda stage: deepen(stage, 4), "takes 4 steps instead of 2"),
    "heun": (lambda stage: stage.use_scheme("heun"), "takes heun steps"),
    "linear": (lambda stage: setattr(stage, "spec", replace(stage.spec, blends=(0.5, 0.0))), "has weights linear"),
    "T": (lambda stage: setattr(stage, "spec", replace(stage.spec, horizon=Fraction(1))), "has steps of size 0.5"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_sources_blocks_cannot_express_is_refused(kind: str, randomise, tmp_path):
    model = converted("timm:resnet18", randomise)
    change, reason = REFUSED[kind]
    stage = change(model.stages["layer1"])
    if isinstance(stage, nn.Module):
        model.replace_stage("layer1", stage)
    with pytest.raises(ResodeError, match=rf"stage layer1 {reason}.*export to .pt2 or .onnx instead"):
        export(model, tmp_path / "plain.safetensors", random_batch(model.info.preprocessing, 2))
    assert not list(tmp_path.iterdir())


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
    "resnetv2_50": lambda randomise: converted("timm:resnetv2_50", randomise),
    "regnety_004": lambda randomise: converted("timm:regnety_004", randomise),
    "deepened and tied": deepened_and_tied,
}


LONG_MODELS = ("resnet18", "resnetv2_50", "regnety_004")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in LONG_MODELS else ()) for name in MODELS])
def any_model(request, randomise) -> OdeResNet:
    return MODELS[request.param](randomise)


def assert_close(found: Tensor, model: OdeResNet, images: Tensor) -> None:
    with torch.no_grad():
        expected = model(images)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


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


def test_the_model_stays_what_it_was(tiny, images, tmp_path):
    tiny.train()
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    export(tiny, tmp_path / "m.pt2", images)
    assert tiny.training and all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())


def test_an_unknown_suffix_is_named(tiny, images, tmp_path):
    with pytest.raises(UsageError, match=r"suffix names the format \(allowed: .safetensors, .pt2, .onnx\)"):
        export(tiny, tmp_path / "m.pth", images)


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors", *([".onnx"] if ONNX else [])])
def test_the_same_model_gives_the_same_file(suffix: str, tiny_file, randomise, tmp_path):
    """Whatever was drawn or exported before."""
    source = open_source(
        f"{tiny_file}:make", pretrained=False, preprocessing=PreprocessingChoice(size=16, crop_fraction=1.0)
    )
    model = convert(source)[0]
    images = random_batch(model.info.preprocessing, 2)
    for name in ("a", "b"):
        torch.rand(5)
        export(model, tmp_path / f"{name}{suffix}", images, origin=source.spec)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
