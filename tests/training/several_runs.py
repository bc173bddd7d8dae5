"""Runs that tests make twice: by one process, and by two; and the program that each of the two is.

python several_runs.py FOLDER      with RANK, WORLD_SIZE and so on, as torchrun sets them
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from resode_cli.data import ImageData, open_labelled
from resode_cli.errors import ResodeError
from resode_cli.files import model_file
from resode_cli.machine import processes as joining
from resode_cli.machine.processes import ALONE, Processes
from resode_cli.training.finetune import finetune
from resode_cli.training.results import Callbacks, FinetuneResult
from resode_cli.training.run_folder import load_state
from resode_cli.training.settings import Settings
from resode_cli.training.synced_norm import synchronise
from resode_cli.training.teacher import open_teacher

MODEL, TEACHER, DATA, CORRUPT = "tied.safetensors", "taught.safetensors", "digits", "corrupt"
STEPS = 4
BASE = Settings(
    adjoint="checkpoint", max_steps=STEPS, batch_size=8, lr=0.05, schedule="constant", log_every=1, workers=0
)
# Those that two processes do as one does, but for rounding.
SAME = {
    "frozen": replace(BASE, adjoint="pc"),
    "synchronised": replace(BASE, bn="sync", adjoint="pc"),
    "accumulated": replace(BASE, bn="sync", accumulate=2),
    "micro-batches": replace(BASE, micro_batches=2, accumulate=2),
    "chosen": replace(BASE, adjoint="auto", memory_budget="lean"),
    "drifting": replace(BASE, adjoint="pc", drift_tolerance=1e-12),
    "average": replace(
        BASE, ema=0.5, optimizer="adamw", lr=0.01, clip_grad=0.1, label_smoothing=0.1, channels_last=True
    ),
    "balanced": replace(BASE, sampler="balanced", class_weights="none", layer_decay=0.5, warmup=2, schedule="cosine"),
    "unfreezing": replace(BASE, unfreeze_every=1, bn="sync"),
    "one stage": replace(BASE, stages=("layer2",), bn="sync"),
    "skipping": replace(BASE, workers=1),
    "taught": replace(BASE, teacher=TEACHER, distill=0.3, teacher_states=0.5),
}
# Those in which parts of a batch know nothing of each other, or rounding decides.
OTHERS = {
    "apart": replace(BASE, bn="batch"),
    "mixed": replace(BASE, mixup=0.4, cutmix=0.4),
    "bf16": replace(BASE, weights_dtype="bf16"),
}


def train_data(folder: Path, name: str) -> ImageData:
    info = model_file.load(folder / MODEL, trust_source=True).info
    corrupt = name == "skipping"
    data = str(folder / CORRUPT) if corrupt else DATA
    return open_labelled(
        data, info, "train", augment=True, seed=0, images=None if corrupt else 40, skip_corrupt=corrupt
    )


def train(
    folder: Path,
    name: str,
    settings: Settings,
    processes: Processes = ALONE,
    *,
    out: str | None = None,
    resume: bool = False,
    callbacks: Callbacks | None = None,
    data: ImageData | None = None,
) -> tuple[FinetuneResult, nn.Module]:
    """One run, to FOLDER/one or FOLDER/two, and the network that it leaves in this process."""
    out = out or name
    to = folder / ("one" if processes.alone else "two") / out
    state = load_state(to, trust_source=True) if resume else None
    model = model_file.load(folder / MODEL, trust_source=True) if state is None else state.model
    test = open_labelled(DATA, model.info, "test", images=11)
    teacher = None
    if settings.teacher is not None:
        teacher = open_teacher(str(folder / settings.teacher), model, trust_source=True)
    result = finetune(
        model,
        data or train_data(folder, name),
        test,
        out=to,
        teacher=teacher,
        settings=settings,
        resume=state,
        processes=processes,
        callbacks=callbacks,
    )
    return result, model.net


NORMS = {
    "plain": lambda: nn.BatchNorm2d(5),
    "timm's": lambda: BatchNormAct2d(5),
    "mean": lambda: nn.BatchNorm2d(5, momentum=None),
}


def norm_case(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A BatchNorm with weights of its own, images of all processes, and a gradient of what comes out."""
    numbers = torch.Generator().manual_seed(3)
    norm = NORMS[kind]().double()
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.rand(5, generator=numbers, dtype=torch.float64) + 0.5)
    x, g = (torch.randn(8, 5, 3, 2, dtype=torch.float64, generator=numbers) for _ in range(2))
    return norm, x, g


def normalised(norm: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """What a BatchNorm makes of images in training, twice, the gradients, and its statistics afterwards."""
    x = x.clone().requires_grad_()
    norm(x + 1)
    y = norm(x)
    y.backward(g)
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in norm.named_parameters()}}
    return found | {name: b.double().reshape(-1) for name, b in norm.named_buffers()}


class _Broken(ImageData):
    """Whose images cannot be read any more after a while."""

    left = 10

    def __getitem__(self, key: Any) -> Any:
        _Broken.left -= 1
        if _Broken.left < 0:
            raise ResodeError("the disk is gone")
        return super().__getitem__(key)


def _cases(folder: Path, here: Processes) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, settings in {**SAME, **OTHERS}.items():
        _, net = train(folder, name, settings, here)
        yield name, {key: value.clone() for key, value in net.state_dict().items()}
    # One that is stopped by a signal to the last process alone, and goes on.
    settings = SAME["synchronised"]
    asked = iter([False, False, False] + [here.place == here.count - 1] * 20)
    stopped, _ = train(
        folder, "synchronised", settings, here, out="stopped", callbacks=Callbacks(should_stop=lambda: next(asked))
    )
    yield "stopped", {"step": torch.tensor(stopped.steps), "interrupted": torch.tensor(stopped.interrupted)}
    here.any(False)  # the first one has saved it
    result, net = train(folder, "synchronised", settings, here, out="stopped", resume=True)
    yield "resumed", {**net.state_dict(), "steps": torch.tensor(result.steps)}
    # One in which the last process cannot read on.
    data = train_data(folder, "broken")
    if not here.leads:
        data.__class__ = _Broken
    said = ""
    try:
        train(folder, "broken", BASE, here, data=data)
    except ResodeError as error:
        said = type(error).__name__
    yield "broken", {"said": torch.tensor(list(said.encode()))}
    for kind in NORMS:
        norm, x, g = norm_case(kind)
        synchronise(norm)
        part = slice(0, 3) if here.leads else slice(3, 8)
        yield f"norm {kind}", normalised(norm, x[part], g[part])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    here, _ = joining.join("cpu")
    for name, tensors in _cases(folder, here):
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / f"{name}-{here.place}")
    with suppress(Exception):
        here.any(False)  # the other one is done too
    joining.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
