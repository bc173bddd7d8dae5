"""`resode demo`: the whole flow on embedded real data."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption
from .output import Output, start

if TYPE_CHECKING:
    from ..model import OdeResNet

METHODS = ("backprop", "checkpoint", "euler", "heun", "pc")
BLOCKS = 24
TRAINING = ["--lr", "5e-3", "--clip-grad", "5", "--batch-size", "64", "--max-steps", "88"]


def demo_command(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Keep the model files in this folder; by default they are removed."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Convert, deepen, check gradients and fine-tune a small pretrained ResNet on handwritten digits. No network."""
    start()
    from ..atomic import check_output

    output = Output(json_mode=json)
    began = time.perf_counter()
    with ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resode-demo-")))
        else:
            folder = out
            folder.mkdir(parents=True, exist_ok=True)
            check_output(folder / "net.safetensors", force=False)
        document = _Demo(output, folder).run()
    seconds = time.perf_counter() - began
    kept = f"; files in {out}" if out is not None else "; --out DIR keeps the files"
    output.show(f"\ndone in {seconds:.0f} s{kept}")
    output.json({**document, "seconds": seconds})


class _Demo:
    """The steps, each announced by the command that does the same."""

    def __init__(self, output: Output, folder: Path) -> None:
        self.output, self.folder = output, folder

    def announce(self, what: str, command: str) -> None:
        self.output.show(f"\n{what}", style="bold")
        self.output.show(f"$ resode {command}", style="dim")

    def run(self) -> dict[str, Any]:
        from ..report import evaluation_json, evaluation_line, gradient_json
        from ..tables import finite

        source, converted = self.convert()
        self.output.show(f"on 360 test digits: {evaluation_line(source)}")
        deep = self.deepen(converted)
        before = self.evaluate(deep)
        self.output.show(f"on 360 test digits: {evaluation_line(before)}")
        gradients = self.check(deep)
        result = self.finetune(deep)
        document = {
            "source": evaluation_json(source),
            "deepened": evaluation_json(before),
            "gradients": gradient_json(gradients),
            "finetuned": evaluation_json(result.after),
        }
        return finite(document)

    def convert(self) -> Any:
        from .. import model_file
        from ..adapters.sources import open_source
        from ..conversion import convert
        from ..report import stage_rows, stage_table, verification_line

        self.announce(
            "1. A pretrained ResNet-20, written as residual steps x ← x + h r(x): the same function, to the last bit",
            "convert cifar:resnet20 --weights resnet20_digits.safetensors --input-size 8 -o net.safetensors",
        )
        packaged = resources.files("resode_cli.digits").joinpath("resnet20_digits.safetensors")
        with resources.as_file(packaged) as weights:
            exact, verification = convert(self._open(open_source, weights))
            model_file.save(exact, self.folder / "net.safetensors")
            self.output.show(stage_table(stage_rows(exact), title="cifar:resnet20"))
            self.output.show(verification_line(verification.record()))
            source = self.evaluate(exact)
            pre, _ = convert(self._open(open_source, weights), form="pre")
        return source, pre

    @staticmethod
    def _open(open_source: Any, weights: Path) -> Any:
        return open_source("cifar:resnet20", weights=weights, preprocessing={"size": 8})

    def deepen(self, pre: OdeResNet) -> OdeResNet:
        from .. import model_file
        from ..data import batches, open_data
        from ..recalibrate import recalibrate
        from ..report import stage_rows, stage_table
        from ..transfer import deepen, untie

        self.announce(
            f"2. The clip after each addition dropped, statistics re-estimated, every stage taken to {BLOCKS} steps",
            "convert … --form pre -o pre.safetensors; resode recalibrate pre.safetensors --data digits"
            f" -o pre2.safetensors; resode deepen pre2.safetensors --blocks {BLOCKS} -o deep.safetensors",
        )
        train = open_data("digits", pre.info.preprocessing, "train")
        recalibrate(pre, batches(train, 100))
        for name, stage in pre.stages.items():
            pre.replace_stage(name, untie(deepen(stage, BLOCKS)))
        model_file.save(pre, self.folder / "deep.safetensors")
        self.output.show(stage_table(stage_rows(pre), title="deep.safetensors, every step with weights of its own"))
        return pre

    def check(self, deep: OdeResNet) -> Any:
        from ..check_grad import check_gradients
        from ..data import batches, open_data
        from ..ode import Adjoint
        from ..report import gradient_table

        self.announce(
            "3. Gradients of every backward method against true backprop",
            f"check-grad deep.safetensors --data digits --adjoint {','.join(METHODS)}",
        )
        samples = open_data("digits", deep.info.preprocessing, "test", images=32)
        batch = next(batches(samples, 32))
        report = check_gradients(
            deep, batch.images, batch.labels, methods=[Adjoint(m) for m in METHODS], data="digits, test"
        )
        self.output.show(gradient_table(report))
        kept = {m.name: sum(s.bytes_kept or 0 for s in m.stages) for m in report.methods}
        from ..tables import size

        self.output.show(
            f"held between forward and backward, all stages: {size(kept['backprop'])} by backprop,"
            f" {size(kept['pc'])} by pc, at any depth"
        )
        return report

    def finetune(self, deep: OdeResNet) -> Any:
        from ..data import open_data
        from ..finetune import finetune
        from ..finetune_results import Callbacks
        from ..model import as_device
        from ..report import evaluation_line
        from ..settings import Settings
        from .progress import training

        self.announce(
            "4. Fine-tuned with the memory-free adjoint",
            "finetune deep.safetensors --data digits --adjoint pc -o run " + " ".join(TRAINING),
        )
        settings = Settings(adjoint="pc", lr=5e-3, clip_grad=5.0, batch_size=64, max_steps=88, eval_every=4)
        train = open_data("digits", deep.info.preprocessing, "train", augment=True)
        test = open_data("digits", deep.info.preprocessing, "test")
        with training(self.output, settings.steps(len(train)), 0) as on_step:
            result = finetune(
                deep,
                train,
                test,
                out=self.folder / "run",
                settings=settings,
                device=as_device("cpu"),
                callbacks=Callbacks(on_step=on_step, on_message=self.output.note),
            )
        assert result.before is not None and result.after is not None
        self.output.show(f"before: {evaluation_line(result.before)}")
        self.output.show(f"after:  {evaluation_line(result.after)}")
        return result

    def evaluate(self, model: OdeResNet) -> Any:
        from ..data import batches, open_data
        from ..evaluate import evaluate

        return evaluate(model, batches(open_data("digits", model.info.preprocessing, "test"), 100))
