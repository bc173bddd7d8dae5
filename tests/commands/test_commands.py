"""The command line as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from resode_cli.app import main

Run = Callable[..., subprocess.CompletedProcess[str]]


def error(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of the error."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_blocks_that_stay_as_they_are_are_named(run: Run) -> None:
    command = ("convert", "net.py:partly", "--no-pretrained", "--input-size", 8, "-o", "p.safetensors")
    left = "3 (Writes), like 1 more, writes to its input"
    result = run(*command)
    assert f"left as it is: {left}" in result.stderr
    assert json.loads(run(*command, "--force", "--json").stdout)["left_out"] == [left]
    assert f"left as it is  {left}" in run("info", "p.safetensors").stdout


def test_the_whole_flow(run: Run, tmp_path: Path, assert_ran_by) -> None:
    converted = json.loads(
        run("convert", "net.py:small", "--no-pretrained", "--input-size", 8, "-o", "m.safetensors", "--json").stdout
    )
    assert converted["verified"]["identical"] and converted["verified"]["max_difference"] == 0
    assert [row["steps"] for row in converted["stages"]] == [2, 1, 1]
    deep = json.loads(run("deepen", "m.safetensors", "--blocks", 8, "-o", "d.safetensors", "--json").stdout)
    assert [(row["steps"], row["step_size"]) for row in deep["stages"]] == [(8, 0.25), (8, 0.125), (8, 0.125)]
    untied = json.loads(run("untie", "d.safetensors", "-o", "u.safetensors", "--json").stdout)
    assert untied["verified"]["identical"]
    info = json.loads(run("info", "u.safetensors", "--json").stdout)
    assert [entry["command"] for entry in info["history"]] == ["convert", "deepen", "untie"]
    checked = json.loads(
        run("check-grad", "u.safetensors", "--adjoint", "checkpoint,pc", "--images", 4, "--json").stdout
    )
    assert [m["name"] for m in checked["methods"]] == ["checkpoint", "pc"]
    assert {"stage", "relative_error", "cosine", "drift", "evaluations_per_step", "bytes_kept"} <= set(
        checked["methods"][1]["stages"][1]
    )
    run(
        *("finetune", "u.safetensors", "--data", "digits", "--adjoint", "pc", "--max-steps", 4, "--batch-size", 16),
        *("--test-images", 40, "-o", "run", "--log-every", 2),
    )
    # In exact form the steps of layer1 cannot be run backwards at this depth.
    assert_ran_by(tmp_path / "run", "pc", moved=["layer1"])
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "state.safetensors",
        "config.toml",
        "log.csv",
    }
    evaluated = json.loads(run("eval", "run/best.safetensors", "--data", "digits", "--images", 40, "--json").stdout)
    chosen_by = json.loads(run("info", "run/best.safetensors", "--json").stdout)["history"][-1]["measured"]
    assert chosen_by["split"] == "test" and chosen_by["images"] == 40 and chosen_by["top1"] == evaluated["top1"]
    assert evaluated["images"] == 40 and 0 <= evaluated["top1"] <= evaluated["top5"] <= 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_small_images_are_used_whole(run: Run, model: str) -> None:
    def crop(*arguments: object) -> float:
        run("convert", "net.py:small", *arguments, "-o", "c.safetensors", "--force")
        return json.loads(run("info", "c.safetensors", "--json").stdout)["preprocessing"]["crop_fraction"]

    assert crop("--input-size", 32) == 1.0
    assert crop("--input-size", 96) == 0.875
    assert crop("--input-size", 32, "--crop-fraction", 0.9) == 0.9


def test_a_network_of_ones_own_can_bring_its_preprocessing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        (tmp_path / "net.py").read_text()
        + """
def configured():
    net = small()
    net.default_cfg = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "crop_pct": 1.0}
    return net
"""
    )
    assert "--input-size" in run("convert", "own.py:small", "-o", "s.safetensors").stderr
    assert "--input-size" not in run("convert", "own.py:configured", "-o", "c.safetensors").stderr
    pre = json.loads(run("info", "c.safetensors", "--json").stdout)["preprocessing"]
    assert pre["size"] == 16 and pre["mean"] == [0.5, 0.4, 0.3] and pre["crop_fraction"] == 1.0


def test_people_read_tables_on_standard_output(run: Run, model: str) -> None:
    out = run("info", model).stdout
    assert "layer1" in out and "net.py:small" in out


def test_tie_and_recalibrate_say_what_they_did_to_accuracy(run: Run, model: str) -> None:
    out = run(
        "tie",
        model,
        "--rule",
        "first",
        "--stage",
        "1,layer2",
        "-o",
        "t.safetensors",
        "--data",
        "digits",
        "--images",
        30,
    )
    assert "before: top-1" in out.stdout and "top-1 agreement with before" in out.stdout
    document = json.loads(
        run(
            *("recalibrate", model, "--data", "digits", "--images", 64, "--test-images", 30),
            *("-o", "r.safetensors", "--json"),
        ).stdout
    )
    assert document["after"]["images"] == 30 and 0 <= document["top1_agreement"] <= 1


def test_check_grad_tolerance_sets_the_exit_code(run: Run, model: str) -> None:
    arguments = ("check-grad", model, "--images", 4, "--adjoint")
    run(*arguments, "checkpoint", "--tol", 1e-5)
    result = run(*arguments, "euler", "--tol", 1e-5, code=1)
    assert "above --tol" in result.stderr


def test_check_grad_over_batches_gives_the_median_and_the_range(run: Run, model: str) -> None:
    result = run(*("check-grad", model, "--data", "digits", "--images", 8, "--batches", 3, "--adjoint", "euler"))
    words = " ".join(result.stdout.split())
    assert "median of 3 batches of 8 images" in words and "\u2013" in words
    document = json.loads(
        run(*("check-grad", model, "--images", 8, "--batches", 3, "--adjoint", "euler", "--json")).stdout
    )
    for stage in document["methods"][0]["stages"]:
        assert stage["least_error"] <= stage["relative_error"] <= stage["largest_error"]
    assert document["batches"] == 3
    refused = run("check-grad", model, "--data", "digits", "--images", 100, "--batches", 4, code=2)
    assert "--batches 4 of 100 images need 400, but digits has 360 for testing" in refused.stderr


def test_check_grad_sweeps_depths_and_plots(run: Run, model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    document = json.loads(
        run(
            *("check-grad", model, "--images", 4, "--adjoint", "euler,pc", "--sweep", "8,16,32"),
            *("--plot", "errors.png", "--json"),
        ).stdout
    )
    rows = {(row["method"], row["stage"]): row for row in document["sweep"]}
    assert rows["euler", "layer2"]["depths"] == [8, 16, 32]
    assert -1.5 < rows["euler", "layer2"]["slope"] < -0.6
    assert rows["pc", "layer2"]["slope"] < rows["euler", "layer2"]["slope"]
    with Image.open(tmp_path / "errors.png") as image:
        assert image.width > 300


def test_heun_switches_the_forward_rule_and_says_so(run: Run, model: str, tmp_path: Path, assert_ran_by) -> None:
    run("deepen", model, "--blocks", 8, "-o", "deep.safetensors")  # so deep that it can be run backwards
    result = run(
        *("finetune", "deep.safetensors", "--data", "digits", "--adjoint", "heun", "--max-steps", 1),
        *("--batch-size", 8, "--test-images", 10, "-o", "run"),
    )
    assert "the forward rule is now heun" in result.stderr
    history = json.loads(run("info", "run/last.safetensors", "--json").stdout)["history"]
    switch = next(entry for entry in history if entry["command"] == "switch-scheme")
    assert switch["scheme"] == "heun" and switch["max_logit_difference"] > 0
    assert_ran_by(tmp_path / "run", "heun")


def test_an_existing_output_is_kept_without_force(run: Run, model: str, tmp_path: Path) -> None:
    before = (tmp_path / model).read_bytes()
    result = run("convert", "net.py:small", "--no-pretrained", "-o", model, code=1)
    assert "--force" in error(result)
    assert (tmp_path / model).read_bytes() == before
    run("convert", "net.py:small", "--no-pretrained", "--input-size", 8, "-o", model, "--force", "--seed", 1)
    assert (tmp_path / model).read_bytes() != before


def test_without_network_weights_of_torchvision_are_a_clear_error(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    # torchvision downloads to this folder, so an earlier download on this machine is not found.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    result = run("convert", "torchvision:resnet18", "-o", "x.safetensors", code=1)
    assert "cannot be fetched" in error(result)
    assert "--no-pretrained" in result.stderr and not (tmp_path / "x.safetensors").exists()


@pytest.mark.slow
def test_without_network_weights_of_timm_are_a_clear_error(tmp_path: Path) -> None:
    offline = {"HF_HOME": str(tmp_path / "empty"), "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "resode_cli", "convert", "timm:resnet18", "-o", "x.safetensors"]
    # These are read where the hub's library is imported.
    environment = {**os.environ, **offline}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "cannot be fetched" in error(result)
    assert "--no-pretrained" in result.stderr and not (tmp_path / "x.safetensors").exists()


MISTAKES = [
    (("convrt",), 2, "convert"),
    (("convert", "timm:resnet5o", "-o", "x.safetensors"), 2, "resnet50"),
    (("convert", "torchvision:resnet5", "-o", "x.safetensors"), 2, "resnet50"),
    (("convert", "timm:resnet50.a9_in1k", "-o", "x.safetensors"), 2, "a3_in1k"),
    (("convert", "torchvision:resnet50.IMAGENET1K_V9", "-o", "x.safetensors"), 2, "IMAGENET1K_V2"),
    (("convert", "timm:dla34", "--no-pretrained", "-o", "x.safetensors"), 1, "states are read by DlaRoot too"),
    (("convert", "local-dir:nowhere", "-o", "x.safetensors"), 2, "does not exist"),
    (("list", "resnat50"), 2, "resnet50"),
    (("export", "m.safetensors", "-o", "x.pth"), 2, ".onnx"),
    (("export", "m.safetensors", "-o", "m.safetensors"), 2, "the model itself"),
    (("export", "m.safetensors", "-o", "x.safetensors", "-b", "2"), 2, ".pt2 and .onnx"),
    (("export", "m.safetensors", "-o", "x.safetensors", "--dynamic-size"), 2, "--dynamic-size is of .pt2 and .onnx"),
    (("export", "m.safetensors", "-o", "x.pt2", "-b", "0"), 2, "1 or more"),
    (("convert", "cifar:resnet21", "--no-pretrained", "-o", "x.safetensors"), 2, "resnet20"),
    (("convert", "cifar:resnet20", "-o", "x.safetensors"), 2, "--weights"),
    (("convert", "cifar:resnet20", "--shortcut", "C", "--no-pretrained", "-o", "x.safetensors"), 2, "A, B"),
    (("convert", "keras:resnet20", "-o", "x.safetensors"), 2, "timm"),
    (("convert", "none.py:net", "--no-pretrained", "-o", "x.safetensors"), 2, "does not exist"),
    (("convert", "net.py", "--no-pretrained", "-o", "x.safetensors"), 2, "net.py:FUNCTION"),
    (("convert", "net.py:smal", "--no-pretrained", "-o", "x.safetensors"), 2, "small"),
    (("convert", "net.py:broken", "--no-pretrained", "-o", "x.safetensors"), 1, "no such luck"),
    (("convert", "net.py:plain", "--no-pretrained", "-o", "x.safetensors"), 1, "no residual steps"),
    (("convert", "net.py:small", "--weights", "none.pth", "-o", "x.safetensors"), 2, "does not exist"),
    (("convert", "net.py:small", "--no-pretrained", "--scheme", "rk5", "-o", "x.safetensors"), 2, "heun"),
    (("convert", "net.py:small", "--no-pretrained", "--form", "post", "-o", "x.safetensors"), 2, "pre"),
    (("convert", "net.py:small", "--no-pretrained", "--mean", "1,2", "-o", "x.safetensors"), 2, "three numbers"),
    (("convert", "net.py:small", "--no-pretrained", "--num-classes", "0", "-o", "x.safetensors"), 2, "1 or more"),
    (("convert", "net.py:small", "--no-pretrained", "-o", "x.pt"), 2, ".safetensors"),
    (("convert", "net.py:small", "--no-pretrained", "-o", "none/x.safetensors"), 2, "does not exist"),
    (("convert", "net.py:small", "--no-pretrianed", "-o", "x.safetensors"), 2, "--no-pretrained"),
    (("info", "none.safetensors"), 2, "does not exist"),
    (("deepen", "m.safetensors", "--blocks", "0", "-o", "x.safetensors"), 2, "from 1 to 100000"),
    (("deepen", "m.safetensors", "--blocks", "many", "-o", "x.safetensors"), 2, "--blocks"),
    (("deepen", "m.safetensors", "--blocks", "1", "-o", "x.safetensors"), 2, "has 2 steps already"),
    (("deepen", "m.safetensors", "--blocks", "9", "--stage", "layer7", "-o", "x.safetensors"), 2, "layer1"),
    (("deepen", "m.safetensors", "--blocks", "9", "--mode", "copy", "-o", "x.safetensors"), 2, "replicate"),
    (("tie", "m.safetensors", "--rule", "median", "-o", "x.safetensors"), 2, "mean"),
    (("eval", "m.safetensors", "--data", "digts"), 2, "digits"),
    (("eval", "m.safetensors", "--data", "no/such/folder"), 2, "does not exist"),
    (("eval", "m.safetensors", "--data", "."), 1, "holds no images; image folders are laid out as"),
    (("eval", "m.safetensors", "--data", "digits", "--device", "cuda:99"), 2, "not available"),
    (("check-grad", "m.safetensors", "--adjoint", "eulr"), 2, "euler"),
    (("check-grad", "m.safetensors", "--sweep", "8"), 2, "two or more"),
    (("check-grad", "m.safetensors", "--bn", "eval"), 2, "frozen"),
    (("check-grad", "m.safetensors", "--anchors", "0"), 2, "1 or more"),
    (("finetune", "m.safetensors", "--data", "digits", "-o", "out", "--adjoint", "hen"), 2, "heun"),
    (("finetune", "m.safetensors", "--data", "digits", "-o", "out", "--epochs", "0"), 2, "1 or more"),
    (("finetune", "m.safetensors", "--data", "digits", "-o", "out", "--stage", "9"), 2, "layer3"),
    (("finetune", "m.safetensors", "--data", "digits", "-o", "out", "--optimizer", "sgdd"), 2, "optimizer"),
    (("finetune", "m.safetensors", "--data", "digits", "-o", "out", "--resume"), 2, "nothing to resume"),
    (("finetune", "m.safetensors", "--data", "digits", "-o", "out", "--recipe", "none.toml"), 2, "does not exist"),
]


def test_each_mistake_gets_one_line_that_helps(run: Run, model: str, tmp_path: Path, capsys, monkeypatch) -> None:
    # In this process, because starting Python for each of them would take minutes.

    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, code, helps in MISTAKES:
        assert main(list(arguments)) == code, arguments
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        assert stderr.splitlines()[-1].startswith("error: "), stderr
        assert helps in stderr.splitlines()[-1], (arguments, stderr)
    leftovers = {p.name for p in tmp_path.iterdir()} - set(before) - {"__pycache__"}
    assert not leftovers


def test_ctrl_c_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text('print("started", flush=True)\nimport time\ntime.sleep(60)\n')
    with subprocess.Popen(
        [sys.executable, "-m", "resode_cli", "convert", "net.py:net", "--no-pretrained", "-o", "x.safetensors"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what runs in the background
    ) as process:
        assert process.stdout is not None
        assert any("started" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "error: interrupted\n"
        assert process.wait(60) == 130
    assert not (tmp_path / "x.safetensors").exists()


def test_export_needs_no_word_in_a_folder_with_a_model(run: Run, model: str, tmp_path: Path) -> None:
    result = run("export", "--json")
    assert "from resode.toml: model m.safetensors" in result.stderr
    assert json.loads(result.stdout)["out"] == "m.pt2" and "wrote m.pt2" in result.stderr
    for name in ("m-plain.safetensors", "m-plain-2.safetensors"):
        assert json.loads(run("export", "--format", "safetensors", "--json").stdout)["out"] == name
    assert "is no network of timm" in error(run("export", "-o", "out/", code=1))
    assert "unknown format" in error(run("export", "--format", "tflite", code=2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "out exists, with files in it; pass --force" in error(run("export", "-o", "out", code=1))
    assert "is named as one of timm" in error(run("export", "-o", "out", "--format", "onnx", code=2))
    assert "is a file; name a folder" in error(run("export", "-o", "m.pt2/", code=2))


def test_export_says_what_was_read_back(run: Run, model: str, tmp_path: Path) -> None:
    for name in ("plain.safetensors", "m.pt2"):
        result = json.loads(run("export", model, "-o", name, "--json").stdout)
        assert result["verified"]["max_difference"] < 1e-6 and result["bytes"] == (tmp_path / name).stat().st_size
    assert "exists; pass --force" in error(run("export", model, "-o", "m.pt2", code=1))
    run("deepen", model, "--blocks", 6, "-o", "deep.safetensors")
    assert "export to .pt2 or .onnx" in error(run("export", "deep.safetensors", "-o", "p.safetensors", code=1))
    assert not (tmp_path / "p.safetensors").exists()
    (tmp_path / "net.py").rename(tmp_path / "moved.py")
    assert "pass --source" in error(run("export", model, "-o", "p.safetensors", code=1))
    run("export", model, "-o", "p.safetensors", "--source", "moved.py:small")


def test_debug_shows_the_traceback(run: Run, tmp_path: Path, capsys, monkeypatch) -> None:

    monkeypatch.chdir(tmp_path)
    assert main(["info", "none.safetensors", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_another_head_starts_at_random_and_is_announced(run: Run, model: str, tmp_path: Path) -> None:
    result = run(
        *(
            "convert",
            "net.py:small",
            "--weights",
            model,
            "--num-classes",
            3,
            "--input-size",
            8,
            "-o",
            "three.safetensors",
        )
    )
    assert "starts at random" in result.stderr
    old, new = load_file(tmp_path / model), load_file(tmp_path / "three.safetensors")
    assert new["linear.weight"].shape[0] == 3
    assert all((old[k] == new[k]).all() for k in old if not k.startswith("linear"))


def test_corrupt_images_are_named_and_skipped_on_request(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / "data" / "test" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    (tmp_path / "data" / "test" / "b" / "2.png").write_bytes(b"not an image")
    run("convert", "net.py:small", "--no-pretrained", "--num-classes", 2, "--input-size", 8, "-o", "two.safetensors")
    assert "2.png" in error(run("eval", "two.safetensors", "--data", "data", code=1))
    document = json.loads(run("eval", "two.safetensors", "--data", "data", "--skip-corrupt", "--json").stdout)
    assert document["images"] == 5 and len(document["skipped"]) == 1
