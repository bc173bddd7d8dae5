"""`resode demo`: the whole flow on embedded real data."""

from __future__ import annotations

import io
import os
import shlex
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..machine.atomic import atomic_path
from .options import ForceOption, JsonOption
from .output import Output, collecting, start

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NETWORK = "resnet20_digits.safetensors"
METHODS = "backprop,checkpoint,euler,heun,pc"
CONVERT = f"convert cifar:resnet20 --weights {NETWORK} --input-size 8"
TRAINING = "--data digits --lr 5e-3 --clip-grad 5 --batch-size 64 --max-steps 88 --eval-every 4"
# Name of a step, what it is for, and its command, which is what runs.
COMMANDS = (
    (
        "source",
        "1. A pretrained ResNet-20, written as residual steps x ← x + h r(x): the same function, to the last bit",
        f"{CONVERT} -o net.safetensors",
    ),
    ("source accuracy", "", "eval net.safetensors --data digits"),
    (
        "pre",
        "2. The clip after each addition dropped, statistics re-estimated",
        f"{CONVERT} --form pre -o pre.safetensors",
    ),
    ("recalibrated", "", "recalibrate pre.safetensors --data digits -o recalibrated.safetensors"),
    (
        "deepened",
        "3. Every stage taken to 24 steps, each with weights of its own",
        "deepen recalibrated.safetensors --blocks 24 --depth-weights free --data digits --no-fit -o deep.safetensors",
    ),
    (
        "gradients",
        "4. Gradients of every backward method against true backprop",
        f"check-grad deep.safetensors --data digits --images 32 --adjoint {METHODS}",
    ),
    (
        "pc",
        "5. Fine-tuned with an adjoint that holds no activations of a stage",
        f"finetune deep.safetensors --adjoint pc {TRAINING} -o run-pc",
    ),
    (
        "backprop",
        "6. The same with backprop",
        f"finetune deep.safetensors --adjoint backprop {TRAINING} -o run-backprop",
    ),
)


def demo_command(
    ctx: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Keep the files in this folder; by default they are removed."),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Convert, deepen, check gradients and fine-tune a small pretrained ResNet on handwritten digits. No network."""
    start()
    output = Output(json_mode=json)
    began = time.perf_counter()
    more = [*(["--force"] if force else []), *(["--json"] if json else [])]
    with ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resode-demo-")))
        else:
            folder = out
            _check_free(folder, force=force)
            folder.mkdir(parents=True, exist_ok=True)
        packaged = resources.files("resode_cli.data.digits").joinpath(NETWORK)
        content = packaged.read_bytes()
        with atomic_path(folder / NETWORK, need=len(content)) as temporary:
            temporary.write_bytes(content)
        stack.enter_context(_inside(folder))
        results = {name: _run(ctx, output, what, command, more, json_mode=json) for name, what, command in COMMANDS}
    seconds = time.perf_counter() - began
    kept = f"the files are in {out}, where these commands can be run again" if out else "--out DIR keeps the files"
    output.show(f"\ndone in {seconds:.0f} s; {kept}")
    output.show(proof(results), style="bold")
    output.json({**{name.replace(" ", "_"): result for name, result in results.items()}, "seconds": seconds})


def proof(results: dict[str, Any]) -> str:
    """What the run has shown, from what its commands measured."""
    from ..quantities import size

    after = {method: results[method]["after"] for method in ("pc", "backprop")}
    kept = {
        method["name"]: sum(stage["bytes_kept"] or 0 for stage in method["stages"])
        for method in results["gradients"]["methods"]
    }
    times = kept["backprop"] / kept["pc"]
    return (
        f"fine-tuned by pc: {after['pc']['top1']:.1%}, by backprop: {after['backprop']['top1']:.1%}"
        f" of {after['pc']['images']:,} test digits (one run each); between forward and backward the stages hold"
        f" {size(kept['pc'])} by pc, {size(kept['backprop'])} by backprop: {times:.0f} times less"
    )


def _run(
    ctx: typer.Context, output: Output, what: str, command: str, more: Sequence[str], *, json_mode: bool
) -> dict[str, Any]:
    """Run a command as its user would; what it prints under --json is returned."""
    if what:
        output.show(f"\n{what}", style="bold")
    output.show(f"$ resode {command}", style="dim")
    arguments = [*shlex.split(command), *(flag for flag in more if flag != "--force" or " -o " in command)]
    group: Any = ctx.find_root().command
    with collecting() as documents, redirect_stdout(io.StringIO()) if json_mode else nullcontext():
        code = group.main(arguments, prog_name="resode", standalone_mode=False)
    if code:
        raise typer.Exit(code)
    return dict(documents[-1])


def _check_free(folder: Path, *, force: bool) -> None:
    """Raises UsageError for files of an earlier demo, before any work."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {str(folder)!r} is not a folder")
    names = [NETWORK] + [shlex.split(command)[-1] for _, _, command in COMMANDS if " -o " in command]
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise UsageError(f"{folder} holds {there[0]}: choose another --out, or pass --force to replace it")


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
