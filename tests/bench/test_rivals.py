"""What people do to the source network instead, measured beside the methods: the same weights, the same gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resode_cli.app import main
from resode_cli.bench.rivals import RIVALS, NotAvailable, Rival, RivalTrial, read_any_method
from resode_cli.bench.run import bench
from resode_cli.bench.workload import BACKPROP, Trial, Workload, method_record
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.parts import PreprocessingChoice
from resode_cli.ode import Adjoint
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert
from resode_cli.surgery.rewrite import deepen

PLAIN, TIMM, PARTS = Rival("plain"), Rival("grad_checkpointing"), Rival("micro-batches", 2)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock network of timm in a model file, for small images."""
    path = tmp_path_factory.mktemp("stock") / "r18.safetensors"
    torch.manual_seed(0)
    small = PreprocessingChoice(size=32, crop_fraction=1.0)
    model, _ = convert(open_source("timm:resnet18", pretrained=False, num_classes=4, preprocessing=small))
    model_file.write(model, path)
    return path


def of(path: Path, **settings) -> Workload:
    return Workload(model=str(path), batch_size=4, **settings)


@pytest.mark.parametrize("rival", [PLAIN, TIMM, PARTS, Rival("compiled", 0.5)], ids=lambda rival: rival.label)
def test_a_rival_has_the_models_weights_and_backprops_gradient(rival: Rival, stock: Path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net: net)  # the compiler's own errors are not the matter
    workload = of(stock, bn="frozen")
    model = Trial(workload, None)
    model.use(BACKPROP)
    expected, found = model.counted_step(), RivalTrial(workload, rival).counted_step()
    assert len(expected.gradients) == len(found.gradients)
    for a, b in zip(expected.gradients, found.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert found.leaves_as(expected)


def test_checkpointing_moves_batch_norms_statistics_twice_and_the_row_says_so(stock: Path):
    workload = of(stock)
    model = Trial(workload, None)
    model.use(BACKPROP)
    expected = model.counted_step()
    model.use(Adjoint("checkpoint"))
    assert model.counted_step().leaves_as(expected)
    assert RivalTrial(workload, PLAIN).counted_step().leaves_as(expected)
    assert not RivalTrial(workload, TIMM).counted_step().leaves_as(expected)


def test_micro_batches_are_no_rival_where_images_mix(stock: Path):
    with pytest.raises(NotAvailable, match="mixes the images"):
        RivalTrial(of(stock), PARTS)


def test_what_a_library_or_a_machine_does_not_offer_is_a_row_that_says_why(stock: Path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr("resode_cli.bench.run.fresh_process_growth", lambda *_: 1000)
    report = bench(of(stock), [Adjoint("checkpoint")], depths=None, repeats=1, rivals=True)
    rows = {row.method: row for row in report.rows}
    assert set(rows) >= {rival.label for rival in RIVALS}
    assert "mixes the images" in rows["source, 4 micro-batches"].status
    assert "off a GPU" in rows["source, save_on_cpu()"].status and rows["source, save_on_cpu()"].seconds is None
    plain = rows["source, plain"]
    assert plain.status == "ok" and plain.relative_error is not None and plain.relative_error < 1e-4
    assert plain.leaves_as_backprop and not rows["source, set_grad_checkpointing()"].leaves_as_backprop


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.label)
def test_a_fresh_process_is_told_the_same(rival: Rival):
    assert read_any_method(json.loads(json.dumps(method_record(rival)))) == rival
    assert read_any_method(method_record(Adjoint("pc", 3))) == Adjoint("pc", 3)


def test_rivals_need_a_network_that_its_source_expresses(stock: Path, tmp_path: Path, capsys):
    with pytest.raises(UsageError, match="own depth"):
        bench(of(stock), [], depths=[4], rivals=True)
    model = model_file.load(stock)
    model.replace_stage("layer1", deepen(model.stages["layer1"], 6))
    model_file.write(model, tmp_path / "deep.safetensors")
    with pytest.raises(ResodeError, match="takes 6 steps instead of 2"):
        bench(of(tmp_path / "deep.safetensors"), [], depths=None, repeats=1, rivals=True)
    assert main(["bench", "--stage-shape", "4,8,8", "--rivals"]) == 2
    assert "--rivals goes with a model file" in capsys.readouterr().err
