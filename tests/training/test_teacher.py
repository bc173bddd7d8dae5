"""Whom a network is fitted to: itself before the rewrite, a model file, or a pretrained source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.surgery.rewrite import deepen, untie
from resode_cli.training.teacher import Teacher, open_teacher, own_teacher


def entry(command: str, **more: object) -> dict[str, object]:
    return {"command": command, **more}


def with_history(model: OdeResNet, *entries: dict[str, object]) -> OdeResNet:
    model.info = replace(model.info, history=entries)
    return model


def test_a_teacher_is_a_frozen_copy(tiny: OdeResNet, images: Tensor):
    teacher = own_teacher(tiny.train(), "tiny")
    expected = tiny.eval()(images).detach()
    with torch.no_grad():
        for p in tiny.parameters():
            p.zero_()
    found = teacher.logits(images)
    assert torch.equal(found, expected) and not found.requires_grad
    assert not any(p.requires_grad for p in teacher.net.parameters()) and not teacher.net.training


@pytest.mark.parametrize(
    "history, exact",
    [
        ([entry("convert")], True),
        ([entry("convert"), entry("untie"), entry("deepen", mode="replicate")], True),
        ([entry("convert"), entry("deepen", mode="replicate", depth_weights="free")], True),
        ([entry("convert"), entry("deepen", mode="interpolate")], False),
        ([entry("convert"), entry("deepen", mode="replicate", depth_weights="tied")], False),
        ([entry("convert"), entry("deepen", mode="replicate", depth_weights="linear")], False),
        ([entry("convert"), entry("deepen", fit={"steps": 5})], False),
        ([entry("convert"), entry("tie")], False),
        ([entry("convert"), entry("recalibrate")], False),
        ([entry("convert"), entry("finetune")], False),
    ],
)
def test_a_pre_form_of_the_sources_own_weights_stands_for_the_source(build_tiny, images: Tensor, history, exact: bool):
    source = build_tiny()(images).detach()
    torch.manual_seed(0)  # the same weights again
    pre = with_history(build_tiny(form="pre"), *history)
    own = pre(images).detach()
    assert not torch.allclose(source, own, rtol=1e-2)
    teacher = own_teacher(pre, "net")
    torch.testing.assert_close(teacher.logits(images), source if exact else own)
    assert ("net in exact form" in teacher.name) == exact
    assert {stage.spec.form for stage in pre.stages.values()} == {"pre"}  # the student's form is its own


def test_a_teacher_keeps_its_depth(tiny: OdeResNet):
    for name, stage in tiny.stages.items():
        tiny.replace_stage(name, untie(deepen(stage, 6)))
    teacher = own_teacher(tiny, "deep")
    assert isinstance(teacher.net, OdeResNet)
    assert {stage.spec.depth for stage in teacher.net.stages.values()} == {6}


class Mean(nn.Module):
    """Logits that are the mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).double()


def test_images_are_normalised_again_as_the_teacher_wants_them():
    student = Preprocessing(size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    own = Preprocessing(size=8, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.5))
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)

    def normalised(pre: Preprocessing) -> Tensor:
        return torch.stack([(pixels[:, c] - pre.mean[c]) / pre.std[c] for c in range(3)], 1)

    teacher = Teacher(Mean(), "mean", student, own)
    torch.testing.assert_close(
        teacher.logits(normalised(student)).double(), normalised(own).mean((2, 3)), rtol=1e-6, atol=1e-6
    )
    same = Teacher(Mean(), "mean", student, student)
    torch.testing.assert_close(
        same.logits(normalised(student)).double(), normalised(student).mean((2, 3)), rtol=1e-6, atol=1e-6
    )


def test_a_model_file_is_a_teacher(tiny: OdeResNet, images: Tensor, tmp_path: Path):
    path = tmp_path / "teacher.safetensors"
    model_file.save(tiny, path)
    torch.testing.assert_close(open_teacher(str(path), tiny).logits(images), tiny(images).detach())


def test_other_classes_are_refused(build_tiny, tiny_file: Path, tmp_path: Path):
    path = tmp_path / "teacher.safetensors"
    five = build_tiny()
    model_file.save(five, path)
    five.info = replace(five.info, num_classes=7)
    with pytest.raises(UsageError, match="tells 5 classes apart, the model 7"):
        open_teacher(str(path), five)


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_a_teacher_that_knows_no_numbers_is_refused(build_tiny, tiny: OdeResNet, tmp_path: Path):
    broken = build_tiny()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    model_file.save(broken, tmp_path / "teacher.safetensors")
    with pytest.raises(ResodeError, match="teacher .* holds NaN or infinity in .*: nothing can be learned from it"):
        open_teacher(str(tmp_path / "teacher.safetensors"), tiny)


@pytest.mark.parametrize("source", ["cifar:resnet20", "FILE:make"])
def test_a_source_without_weights_is_refused(tiny: OdeResNet, tiny_file: Path, source: str):
    with pytest.raises(UsageError, match="brings no weights; convert it with --weights"):
        open_teacher(source.replace("FILE", str(tiny_file)), tiny)


def test_a_source_without_logits_is_refused(tiny: OdeResNet, monkeypatch):
    from resode_cli.network.parts import Source, SourceSpec

    class Features(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    found = Source(SourceSpec("timm", "features"), Features(), tiny.info.preprocessing)
    monkeypatch.setattr("resode_cli.training.teacher.open_source", lambda *given, **more: found)
    with pytest.raises(ResodeError, match=r"teacher timm:features returns \(1, 3, 16, 16\)"):
        open_teacher("timm:features", tiny)
