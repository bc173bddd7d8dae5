"""A run with all of the training options on, killed at any moment, repeats the uninterrupted one to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run

from resode_cli.app import main

EVERYTHING = (
    "--ema 0.9 --ema-warmup --mixup 0.4 --cutmix 1 --mixup-prob 0.8 --label-smoothing 0.1 --accumulate 2 --aug"
    " trivialaugment --random-erasing 0.3 --color-jitter 0.2 --clip-grad 0.1 --clip-mode agc --layer-decay 0.8"
    " --optimizer adamw --opt-betas 0.9,0.95 --schedule linear --warmup 3 --min-lr 1e-5 --keep-best 2 --best-by loss"
    " --bn batch --freeze conv1 --unfreeze-every 7 --save-every 3 --log-every 2 --batch-size 4"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_killed_run_repeats_the_uninterrupted_one(seconds: float, here: Path) -> None:
    steps = 40
    assert main(run("-o", "whole", *EVERYTHING, "--epochs", "100", steps=steps)) == 0
    command = [sys.executable, "-m", "resode_cli", *run("-o", "parts", *EVERYTHING, "--epochs", "100", steps=steps)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not Path("parts/state.safetensors").exists():
        time.sleep(0.005)
    time.sleep(seconds)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert main(run("-o", "parts", "--resume", "--batch-size", "4", steps=steps)) == 0
    for name in ("state", "last"):
        one, other = (load_file(f"{folder}/{name}.safetensors") for folder in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    assert Path("whole/log.csv").read_text().count("\n") == Path("parts/log.csv").read_text().count("\n")
