"""Images of another size than the model was made for: what a command does with them, and which networks cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from resode_cli.files import model_file

TRAINING = "--adjoint backprop --max-steps 1 --batch-size 4 --no-augment --lr 1e-9 --device cpu --images 8".split()
NETS = """
from torch import nn
from resode_cli.sources.cifar import CifarResNet


def free(): return CifarResNet(1, num_classes=10, widths=(2, 4, 4))


class Fixed(CifarResNet):
    def forward(self, x):
        if x.shape[-1] != 8:
            raise AssertionError(f"width {x.shape[-1]} is not 8\\nat all")
        return super().forward(x)


def fixed(): return Fixed(1, num_classes=10, widths=(2, 4, 4))
"""


@pytest.fixture
def run(answer: Callable[..., tuple[dict, str]]) -> Callable[..., tuple[dict, str]]:
    """A command beside models free.safetensors and fixed.safetensors."""
    Path("nets.py").write_text(NETS)
    for name in ("free", "fixed"):
        answer("convert", f"nets.py:{name}", "--input-size", "8", "-o", f"{name}.safetensors")
    return answer


def preprocessing(path: str) -> dict:
    return model_file.read_metadata(Path(path))["preprocessing"]


def test_another_size_is_what_eval_and_predict_give_the_network(run, make_folder):
    own, said = run("eval", "free.safetensors", "--data", "digits", "--images", 20)
    assert "images are" not in said
    other, said = run("eval", "free.safetensors", "--data", "digits", "--images", 20, "--input-size", "16x12")
    assert "images are 16×12, crop 1; the model was made for 8×8, crop 1" in said
    cropped, _ = run("eval", "free.safetensors", "--data", "digits", "--images", 20, "--crop-pct", 0.5)
    assert len({own["loss"], other["loss"], cropped["loss"]}) == 3
    image = make_folder(each=1, size=8) / "train" / "cat" / "0.png"
    found = [run("predict", "free.safetensors", image, *more)[0] for more in ([], ["--crop-fraction", "0.5"])]
    assert found[0] != found[1]


def test_a_fine_tuned_model_has_the_preprocessing_that_it_was_trained_with(run):
    start = ["finetune", "free.safetensors", "--data", "digits", "--test-images", 20, "-o", "run", *TRAINING]
    found, _ = run(*start, "--input-size", "16", "--crop-fraction", 0.9)
    for name in ("best", "last"):
        saved = preprocessing(f"run/{name}.safetensors")
        assert (saved["size"], saved["crop_fraction"]) == (16, 0.9)
    again, _ = run("eval", "run/last.safetensors", "--data", "digits", "--images", 20)
    assert again["loss"] == pytest.approx(found["after"]["loss"])
    assert preprocessing("free.safetensors")["size"] == 8
    more = ["--resume", "--max-steps", 2]
    for flag, value in (("--input-size", "8"), ("--crop-pct", 0.5)):
        _, said = run(*start, *more, flag, value, code=2)
        assert "the run has images of 16×16, crop 0.9, and keeps them" in said
    run(*start, *more)
    assert preprocessing("run/last.safetensors")["size"] == 16
    run(*start, "--resume", "--max-steps", 3, "--input-size", 16, "--crop-fraction", 0.9)


@pytest.mark.parametrize(
    "command",
    [
        ["finetune", "fixed.safetensors", "--data", "digits", "-o", "run", *TRAINING],
        ["eval", "fixed.safetensors", "--data", "digits"],
        ["predict", "fixed.safetensors", "nets.py"],
    ],
)
def test_a_network_that_cannot_run_so_is_refused_in_one_line(command: list[str], run):
    _, said = run(*command, "--input-size", 16, code=1)
    assert "error: the network cannot run on images of 16×16: width 16 is not 8\n" in said and "Traceback" not in said
    assert not Path("run").exists()


@pytest.mark.parametrize("value", ["0", "x", "8x", "8x8x8"])
def test_a_size_that_is_none_is_refused(value: str, run):
    _, said = run("eval", "free.safetensors", "--data", "digits", "--input-size", value, code=2)
    assert f"--input-size {value}: must be 1 or more pixels" in said
