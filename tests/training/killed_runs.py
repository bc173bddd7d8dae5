"""A program, not a test: runs that are killed at random moments, and resumed until done, against uninterrupted ones.

    python tests/training/killed_runs.py --kills 50 --seed 0 [--only CASE] [--keep FOLDER]

Each case draws options of a run. The run is killed by SIGKILL, so are the runs that resume it, each at a moment
drawn from the time that the uninterrupted run took. `resode finetune --resume --trust-source` is all that a resumed one
is told. In the end state, last and best models, and the log have to be those of the uninterrupted run, to the last bit.

A run is a fork of this process, which has imported everything, so that most of its time is training.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import resode_cli.commands.finetune
import resode_cli.training.finetune  # noqa: F401  # what a run imports when it begins
from resode_cli.app import main
from resode_cli.files.model_file import CHECKSUM, read_metadata
from resode_cli.training.run_folder import BEST

NETS = """
from timm.models.resnet import BasicBlock, ResNet
from resode_cli.sources.cifar import CifarResNet
def small(num_classes=10):
    return CifarResNet(1, widths=(2, 4, 4), num_classes=num_classes)
def drops(num_classes=10):
    return ResNet(BasicBlock, [2, 2, 2, 2], channels=(4, 4, 8, 8), num_classes=num_classes)
"""
FRESH = ["--no-pretrained", "--num-classes", "10", "--seed", "0"]
MADE = [
    ["convert", "nets.py:small", *FRESH, "--input-size", "8", "-o", "plain.safetensors"],
    ["convert", "nets.py:drops", *FRESH, "--input-size", "32", "-o", "drops.safetensors"],
    ["convert", "nets.py:small", *FRESH, "--input-size", "8", "--form", "pre", "-o", "pre.safetensors"],
    ["deepen", "pre.safetensors", "--blocks", "6", "--trust-source", "--depth-weights", "free", "-o"]
    + ["deep.safetensors"],
]
DATA = ["--data", "digits", "--images", "48", "--test-images", "16", "--device", "cpu", "--batch-size", "8"]
RESUME = ["finetune", "--resume", "--trust-source"]
MOST_RESUMED = 12  # times, after which a run is let be to its end
MEASURED = ("images_per_second", "peak_bytes")  # columns of a log that no two runs share


def options(draw: random.Random) -> list[str]:
    """Those of one case, the model first."""

    def maybe(share: float, *words: str) -> list[str]:
        return list(words) if draw.random() < share else []

    def one(*choices: str) -> list[str]:
        return draw.choice(choices).split()

    model = draw.choice(["plain", "deep", "deep", "drops"])
    adjoints = {
        "plain": ["backprop", "checkpoint", "auto"],
        "deep": ["backprop", "checkpoint", "pc", "auto", "multistep", "pc,layer3=checkpoint", "auto --grad-tol 0.5"],
        "drops": ["backprop", "checkpoint", "auto"],
    }
    chosen = ["finetune", f"{model}.safetensors", "--trust-source", *DATA, "--adjoint", *one(*adjoints[model])]
    frozen = draw.random() < 0.6
    chosen += ["--bn", "frozen" if frozen else "batch"]
    chosen += maybe(0.2, "--memory-budget", "lean") if "auto" in chosen else []
    chosen += maybe(0.3, "--micro-batches", "2") if frozen and "multistep" not in chosen else []
    chosen += maybe(0.4, "--accumulate", "2") + maybe(0.3, "--amp", "bf16")
    chosen += (["--ema", "0.8", *maybe(0.5, "--ema-warmup")]) if draw.random() < 0.5 else []
    chosen += maybe(0.3, "--mixup", "0.4") + maybe(0.3, "--cutmix", "1") + maybe(0.3, "--label-smoothing", "0.1")
    chosen += one("", "--clip-grad 0.5", "--clip-grad 0.01 --clip-mode value", "--clip-grad 0.1 --clip-mode agc")
    chosen += one(
        "",
        "--schedule linear",
        "--schedule step",
        "--schedule plateau --plateau-evaluations 1",
        "--schedule poly --min-lr 1e-4",
        "--schedule tanh",
    )
    chosen += one("", "--optimizer adamw --opt-betas 0.9,0.95", "--optimizer lamb", "--optimizer lion")
    lowered = "--weights-dtype bf16-master" if "lamb" in chosen else "--weights-dtype bf16"
    chosen += one("", "", lowered, "--weights-dtype bf16-master")
    chosen += one("", "--sampler balanced", "--class-weights balanced") + maybe(0.3, "--warmup", "3")
    chosen += one("", "--aug trivialaugment", "--random-erasing 0.4", "--no-augment")
    chosen += maybe(0.3, "--layer-decay", "0.7") + maybe(0.15, "--freeze", "layer2")
    chosen += one("", "", "", "--stage layer3", "--unfreeze-every 3", "--unfreeze-every 5")
    chosen += [*maybe(0.6, "--drop-path", "0.3"), *maybe(0.3, "--dropout", "0.3")] if model == "drops" else []
    chosen += maybe(0.3, "--patience", str(draw.randint(2, 6))) + maybe(0.5, "--keep-best", str(draw.randint(2, 4)))
    chosen += ["--best-by", *one("top1", "loss", "top5"), "--workers", *one("0", "0", "1", "2")]
    chosen += ["--lr", *one("0.001", "0.02", "0.1"), "--seed", str(draw.randint(0, 99))]
    chosen += ["--save-every", str(draw.randint(1, 9)), "--log-every", str(draw.randint(1, 5))]
    return [*chosen, "--epochs", "1000", "--max-steps", str(draw.randint(20, 60) // (2 if model == "drops" else 1))]


def begun(arguments: Sequence[str], folder: Path, told: str) -> int:
    """The process of a command that runs in a folder and tells a file there what it prints."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        print(f"$ resode {' '.join(arguments)}", flush=True)
        code = main(list(arguments))
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(process: int, seconds: float | None) -> int | None:
    """The exit code of a process; None where it was killed, after so many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(process, signal.SIGKILL)
            deadline = None
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        time.sleep(0.002)


def case(number: int, seed: int, made: Path, folder: Path) -> tuple[int, list[str], str]:
    """Kills of one case, what differs, and a line about it."""
    draw = random.Random(f"{seed}/{number}")
    arguments = options(draw)
    for name in ("whole", "parts"):
        shutil.copytree(made, folder / name)
    started = time.monotonic()
    code = ended(begun([*arguments, "-o", "run"], folder / "whole", "said"), None)
    took = time.monotonic() - started
    line = " ".join(arguments[1:])
    if code != 0:
        return 0, [f"the uninterrupted run ended with {code}: {last_line(folder / 'whole')}"], line
    kills, command, anew = 0, [*arguments, "-o", "run"], 0
    while True:
        # One that was killed before it saved anything, again and again, would be no case of resuming.
        seconds = draw.uniform(0.05 if anew < 2 else 0.5, 1.0) * took if kills < MOST_RESUMED else None
        code = ended(begun(command, folder / "parts", "said"), seconds)
        if code == 0:
            break
        if code is not None:
            return kills, [f"{' '.join(command)} ended with {code}: {last_line(folder / 'parts')}"], line
        kills += 1
        run = folder / "parts" / "run"
        if (run / "state.safetensors").exists():
            command = RESUME
        else:  # it saved nothing to go on from, and is begun anew, in place of models that it may have left
            anew += 1
            command = [*arguments, "-o", "run", *(["--force"] if any(run.glob("best*")) else [])]
    return kills, differences(folder / "whole" / "run", folder / "parts" / "run"), f"({anew} anew) {line}"


def last_line(folder: Path) -> str:
    return ((folder / "said").read_text().strip().splitlines() or [""])[-1]


def differences(whole: Path, parts: Path) -> list[str]:
    """What of a run is not as in the other."""
    found = []
    names = [sorted(p.name for p in run.iterdir() if p.name != "config.toml") for run in (whole, parts)]
    if names[0] != names[1]:
        found.append(f"files: {names[0]} and {names[1]}")
    for name in sorted({*names[0]} & {*names[1]}):
        if name.endswith(".safetensors"):
            found += _of_models(whole / name, parts / name)
    rows = [_rows(run / "log.csv") for run in (whole, parts)]
    if rows[0] != rows[1]:
        odd = [row for row in rows[0] if row not in rows[1]] + [row for row in rows[1] if row not in rows[0]]
        found.append(f"log.csv: {len(rows[0])} and {len(rows[1])} rows, {odd[:2]}")
    return found


def _of_models(one: Path, other: Path) -> list[str]:
    a, b = load_file(one), load_file(other)
    if a.keys() != b.keys():
        return [f"{one.name}: other tensors"]
    odd = [key for key in a if not torch.equal(a[key].nan_to_num(), b[key].nan_to_num())]
    found = [f"{one.name}: {', '.join(odd[:3])} of {len(odd)}"] if odd else []
    x, y = read_metadata(one), read_metadata(other)
    for key in ("info", "stages"):
        if _known(x.get(key)) != _known(y.get(key)):
            found.append(f"{one.name}: its {key}")
    if "run" in x:
        was, now = x["run"]["progress"], y["run"]["progress"]
        found += [
            f"{one.name}: {key} {str(was.get(key))[:150]} and {str(now.get(key))[:150]}"
            for key in sorted((was.keys() | now.keys()) - {"best_file"})
            if was.get(key) != now.get(key)
        ]
        for run, best in ((one.parent, was["best_file"]), (other.parent, now["best_file"])):
            if best != read_metadata(run / BEST).get(CHECKSUM):
                found.append(f"{run / BEST} is not the one that the state knows")
    return found


def _known(value: Any) -> Any:
    """Without what a choice measured: it is of its moment."""
    if isinstance(value, dict):
        return {k: _known(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_known(v) for v in value if not (isinstance(v, dict) and v.get("command") == "calibrate")]
    return value


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def run(kills: int, seed: int, only: int | None, keep: Path | None) -> int:
    """How many cases differed."""
    torch.set_num_threads(1)
    total = wrong = number = 0
    with tempfile.TemporaryDirectory() as name:
        base = keep or Path(name)
        made = base / "made"
        made.mkdir(parents=True)
        (made / "nets.py").write_text(NETS)
        for arguments in MADE:
            if ended(begun(arguments, made, "said"), None) != 0:
                raise SystemExit(f"{' '.join(arguments)}: {last_line(made)}")
        while total < kills:
            number = number + 1 if only is None else only
            folder = base / str(number)
            killed, found, line = case(number, seed, made, folder)
            total, wrong = total + killed, wrong + bool(found)
            print(f"case {number}: {killed} kills, {'; '.join(found) or 'the same'}: {line}", flush=True)
            if keep is None:
                shutil.rmtree(folder)
            if only is not None:
                break
    print(f"{total} kills, seed {seed}: {wrong} of the cases up to {number} differ")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--keep", type=Path, help="a new folder that keeps what the runs leave")
    chosen = parser.parse_args()
    sys.exit(bool(run(chosen.kills, chosen.seed, chosen.only, chosen.keep)))
