"""The card of a published model: what is known stands there, what is not is said, and folders stay private."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import SourceSpec
from resode_cli.reports.model_card import model_card
from resode_cli.sources.licences import licence_of, published

PRETRAINED = SourceSpec("timm", "resnet50", tag="a1_in1k", weights_sha256="0" * 64)
MEASURED = {"split": "val", "top1": 0.9125, "top5": 0.99, "loss": 0.3, "images": 80}


def trained(model: OdeResNet, *, adjoint: str = "pc", **more: object) -> OdeResNet:
    model.info = replace(model.info, source=PRETRAINED, history=())
    model.name_classes(["ant", "bee", "cat", "dog", "elk"])
    model.record("convert", source="timm:resnet50", seed=0)
    pieces = {"layer1": {"adjoint": "pc", "error": 0.0123}, "layer2": {"adjoint": "checkpoint", "error": None}}
    model.record("calibrate", step=0, pieces=pieces)
    model.record("finetune", data="/home/me/secret/pets", steps=3, adjoint=adjoint, **more)
    return model


def test_what_is_known_stands_in_the_card(tiny):
    card = model_card(trained(tiny, adjoint="auto", measured=MEASURED), "timm", "net-timm", repository="me/pets")
    _, _, body = card.split("---\n", 2)
    fields = ModelCard(card).data
    assert fields.license == "apache-2.0" and fields.base_model == "timm/resnet50.a1_in1k"
    assert fields.library_name == "timm" and fields.pipeline_tag == "image-classification"
    assert body.lstrip().startswith("# pets\n")
    for said in (
        "`timm:resnet50.a1_in1k`, 5 classes",
        "layer1 3 steps",
        'timm.create_model("hf-hub:me/pets", pretrained=True)',
        "Top-1 91.25% on 80 images (pets, val)",
        "| layer1 | pc | 0.012 |",
        "| layer2 | checkpoint | not measured |",
        "5: ant, bee, cat, dog, elk.",
        "16×16 (height by width), RGB, bilinear",
        "finetune data=pets, steps=3, adjoint=auto",
        "timm/resnet50.a1_in1k, are under apache-2.0",
    ):
        assert said in body, said
    assert "/home/me" not in card and "Not measured since" not in card


def test_what_is_not_known_is_said(tiny):
    model = trained(tiny)
    model.info = replace(model.info, source=SourceSpec("cifar", "resnet20", weights_sha256="0" * 64))
    card = model_card(model, "pt2", "net.pt2")
    assert "license" not in card.split("---\n")[1]
    assert "Not recorded. `resode eval" in card and "`--adjoint pc`. Errors are not recorded" in card
    assert "is not known to resode" in card and 'torch.export.load("net.pt2"' in card
    model.info = replace(model.info, source=SourceSpec("cifar", "resnet20"), history=model.info.history[:1])
    card = model_card(model, "onnx", "net.onnx")
    assert "were random: no licence" in card and "No gradient method of resode trained these weights" in card


def test_an_accuracy_of_before_is_not_one_of_now(tiny):
    model = trained(tiny, measured=MEASURED)
    model.record("deepen", blocks=10)
    assert "Not measured since: deepen came after." in model_card(model, "pt2", "net.pt2")


@pytest.mark.parametrize(("kind", "file"), [("pt2", "a.pt2"), ("onnx", "a.onnx"), ("safetensors", "a.safetensors")])
@pytest.mark.parametrize("repository", [None, "me/pets"])
def test_the_lines_that_load_it_are_python(kind, file, repository, tiny):
    card = model_card(tiny, kind, file, repository=repository)
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert (f'hf_hub_download("me/pets", "{file}")' in code) == (repository is not None)


def test_licences_are_those_that_the_library_says():
    assert licence_of(PRETRAINED) == "apache-2.0" and published(PRETRAINED) == "timm/resnet50.a1_in1k"
    other = replace(PRETRAINED, name="resnext101_32x8d", tag="fb_swsl_ig1b_ft_in1k")
    assert licence_of(other) == "cc-by-nc-4.0"
    for unknown in (replace(PRETRAINED, tag=None), SourceSpec("torchvision", "resnet18", tag="IMAGENET1K_V1")):
        assert licence_of(unknown) is None and published(unknown) is None
    assert published(SourceSpec("timm", "resnet18", weights="hf-hub:me/flowers")) == "me/flowers"
