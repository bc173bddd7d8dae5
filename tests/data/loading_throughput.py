"""How fast `finetune` feeds and trains a network, beside a bare loop of PyTorch. A program, not a test.

    python tests/data/loading_throughput.py MODEL.safetensors FOLDER [--workers 0 2] [--steps 60]

The bare loop has a DataLoader over torchvision's ImageFolder with the same transform, the same model, optimizer and
frozen BatchNorm, and nothing else: no log, no monitor, no look at the gradient. After each step of the one comes a step
of the other, in one process, since a machine is not equally fast at all times. Three epochs are run, so that their ends
are among the steps; the first ones are not counted. Printed are images per second by the mean step, the milliseconds of
this process's processor time in the median step, and the ratios.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from resode_cli.commands.output import Output
from resode_cli.commands.progress import training
from resode_cli.data import ImageData, open_labelled
from resode_cli.files import model_file
from resode_cli.machine.cores import available_cores
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.ode import Adjoint
from resode_cli.training.finetune import finetune
from resode_cli.training.optimization import create_optimizer
from resode_cli.training.results import Callbacks
from resode_cli.training.run_log import StepRecord
from resode_cli.training.settings import Settings

EPOCHS = 3
FIRST = 4  # steps that are not counted: workers start, and memory is asked for


Step = tuple[float, float]  # seconds, and seconds of processor time


def now() -> Step:
    return time.perf_counter(), time.process_time()


def since(begun: Step) -> Step:
    wall, used = now()
    return wall - begun[0], used - begun[1]


def bare(model: OdeResNet, folder: Path, train: ImageData, settings: Settings) -> Iterator[None]:
    """A loop as one writes it by hand, stopping after every step."""
    data = Subset(ImageFolder(str(folder / "train"), train.transform), list(train.indices))
    workers = int(settings.workers)
    loader = DataLoader(
        data,
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    model.use_adjoint(Adjoint("backprop"))
    optimizer = create_optimizer(model, settings)
    model.train()
    freeze_batch_norm(model)
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield


def side_by_side(model: OdeResNet, folder: Path, train: ImageData, settings: Settings) -> dict[str, list[Step]]:
    """What each step takes of a run of `finetune`, with its display, and of the bare loop."""
    others = bare(copy.deepcopy(model), folder, train, settings)
    found: dict[str, list[Step]] = {"bare": [], "finetune": []}
    with (
        tempfile.TemporaryDirectory() as out,
        training(Output(json_mode=True), settings.steps(len(train)), 0) as show,
    ):
        begun = now()

        def told(record: StepRecord) -> None:
            nonlocal begun
            show(record)
            found["finetune"].append(since(begun))
            begun = now()
            next(others)
            found["bare"].append(since(begun))
            begun = now()

        finetune(model, train, None, out=Path(out) / "run", settings=settings, callbacks=Callbacks(on_step=told))
    return {name: steps[FIRST:] for name, steps in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128)
    given = parser.parse_args()

    print(f"{available_cores()} cores, {torch.get_num_threads()} threads")
    model, size = model_file.load(given.model), given.batch_size
    many = given.steps // EPOCHS * size
    train = open_labelled(str(given.folder), model.info, "train", augment=True, seed=0, images=many)
    for workers in given.workers:
        settings = Settings(
            adjoint="backprop", epochs=EPOCHS, batch_size=size, lr=1e-4, save_every=10**6, workers=workers
        )
        found = side_by_side(model, given.folder, train, settings)
        wall = {name: fmean(step[0] for step in steps) for name, steps in found.items()}
        used = {name: median(step[1] for step in steps) for name, steps in found.items()}
        for name in found:
            print(
                f"workers {workers}  {name:8}  {size / wall[name]:7.1f} images/s  {1e3 * used[name]:7.1f} ms per step"
            )
        by_step = median(b[0] / o[0] for b, o in zip(found["bare"], found["finetune"], strict=True))
        print(
            f"workers {workers}  finetune / bare: {wall['bare'] / wall['finetune']:.3f} by the mean step,"
            f" {by_step:.3f} by the median of pairs, {used['bare'] / used['finetune']:.3f} by processor time"
        )


if __name__ == "__main__":
    main()
