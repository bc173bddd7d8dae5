"""How fast `finetune` feeds and trains a network, beside a bare loop of PyTorch. A program, not a test.

    python tests/data/loading_throughput.py MODEL.safetensors FOLDER [--workers 0 2] [--turns 5] [--steps 30]

The bare loop has a DataLoader over torchvision's ImageFolder with the same transform, the same model, optimizer and
frozen BatchNorm, and nothing else: no log, no monitor, no look at the gradient. The two take turns, since a machine is
not equally fast at all times; a turn is two epochs, so that the end of one lies within it. Printed are the medians of
images per second and of the milliseconds of processor time per step (of this process and its workers), and the medians
of the turns' own ratios.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from resode_cli.commands.output import Output
from resode_cli.commands.progress import training
from resode_cli.data import ImageData, open_labelled
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.ode import Adjoint
from resode_cli.training.finetune import finetune
from resode_cli.training.optimization import create_optimizer
from resode_cli.training.results import Callbacks
from resode_cli.training.run_folder import StepRecord
from resode_cli.training.settings import Settings

FIRST = 2  # steps that are not counted: workers start, and memory is asked for


class Clock:
    """Wall and processor time between the step `FIRST` and the last one told of."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def per_step(self) -> tuple[float, float]:
        """Seconds of both."""
        (began, used), (ended, spent) = self.at[FIRST - 1], self.at[-1]
        steps = len(self.at) - FIRST
        return (ended - began) / steps, (spent - used) / steps


def ours(model: OdeResNet, train: ImageData, settings: Settings) -> tuple[float, float]:
    """Seconds per step of `finetune`, with its display."""
    clock = Clock()
    with (
        tempfile.TemporaryDirectory() as folder,
        training(Output(json_mode=True), settings.steps(len(train)), 0) as show,
    ):

        def told(record: StepRecord) -> None:
            show(record)
            clock.tick()

        finetune(model, train, None, out=Path(folder) / "run", settings=settings, callbacks=Callbacks(on_step=told))
    return clock.per_step()


def bare(model: OdeResNet, folder: Path, train: ImageData, settings: Settings) -> tuple[float, float]:
    """Seconds per step of a loop as one writes it by hand."""
    clock = Clock()
    data = Subset(ImageFolder(str(folder / "train"), train.transform), list(train.indices))
    loader = DataLoader(
        data,
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=int(settings.workers),
        persistent_workers=bool(settings.workers),
    )
    model.use_adjoint(Adjoint("backprop"))
    optimizer = create_optimizer(model, settings)
    model.train()
    freeze_batch_norm(model)
    for _ in range(settings.epochs or 1):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            clock.tick()
    return clock.per_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="Of an epoch.")
    parser.add_argument("--batch-size", type=int, default=128)
    given = parser.parse_args()

    model = model_file.load(given.model)
    many = given.steps * given.batch_size
    train = open_labelled(str(given.folder), model.info, "train", augment=True, seed=0, images=many)
    for workers in given.workers:
        settings = Settings(
            adjoint="backprop", epochs=2, batch_size=given.batch_size, lr=1e-4, save_every=10**6, workers=workers
        )
        turns: dict[str, Callable[[], tuple[float, float]]] = {
            "bare": lambda settings=settings: bare(model, given.folder, train, settings),  # type: ignore[misc]
            "finetune": lambda settings=settings: ours(model, train, settings),  # type: ignore[misc]
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
        for turn in range(given.turns):
            for name in sorted(turns, reverse=bool(turn % 2)):  # who goes first meets the colder machine
                found[name].append(turns[name]())
        for name, times in found.items():
            wall, used = (median(column) for column in zip(*times, strict=True))
            speed, cpu = given.batch_size / wall, 1e3 * used
            print(f"workers {workers}  {name:8}  {speed:7.0f} images/s  {cpu:7.1f} ms of this process per step")
        by_turn = [(b[0] / o[0], b[1] / o[1]) for b, o in zip(found["bare"], found["finetune"], strict=True)]
        wall, used = (median(column) for column in zip(*by_turn, strict=True))
        print(f"workers {workers}  finetune / bare  {wall:.3f} (by processor time of this process {used:.3f})")


if __name__ == "__main__":
    print(f"{os.cpu_count()} processors, {torch.get_num_threads()} threads")
    main()
