"""`resode tie`, `untie`, `deepen` and `recalibrate`: rewrite a model file, and say what that did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DATA_ROOT,
    BatchSizeOption,
    DataOption,
    DataRootOption,
    DeviceOption,
    ForceOption,
    ImagesOption,
    JsonOption,
    ModelArgument,
    OptionalDataOption,
    OutputOption,
    RecipeOption,
    SkipCorruptOption,
    SourceOption,
    StageOption,
    WorkersOption,
    check_safetensors,
)
from .output import Output, start

if TYPE_CHECKING:
    from ..data import ImageData
    from ..model import OdeResNet
    from ..stage import OdeStage


def tie_command(
    model: ModelArgument,
    out: OutputOption,
    rule: Annotated[
        str, typer.Option("--rule", help="The shared block: 'mean' of the steps' weights, 'first', 'middle' or 'last'.")
    ] = "mean",
    stage: StageOption = None,
    data: OptionalDataOption = None,
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    source: SourceOption = None,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Share one block among all steps of a stage. Changes the function."""
    start()
    from ..transfer import tie

    rewrite = _Rewrite("tie", model, out, source, force, json, {"rule": rule})
    rewrite.measure_on(data, images, batch_size, device, workers, skip_corrupt, data_root)
    rewrite.stages(stage, lambda old: tie(old, rule=rule))


def untie_command(
    model: ModelArgument,
    out: OutputOption,
    stage: StageOption = None,
    data: OptionalDataOption = None,
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    source: SourceOption = None,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Give every step a block of its own. Keeps the function."""
    start()
    from ..transfer import untie

    rewrite = _Rewrite("untie", model, out, source, force, json, {})
    rewrite.measure_on(data, images, batch_size, device, workers, skip_corrupt, data_root)
    rewrite.stages(stage, untie)


def deepen_command(
    model: ModelArgument,
    blocks: Annotated[int, typer.Option("--blocks", help="Steps of each stage afterwards.")],
    out: OutputOption,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="'replicate': a finer discretisation of the same ODE; 'interpolate': weights linear in depth;"
            " 'identity': insert steps that do nothing yet (keeps the function).",
        ),
    ] = "replicate",
    stage: StageOption = None,
    data: OptionalDataOption = None,
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    source: SourceOption = None,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Take stages to more steps. Without --stage: all that have any."""
    start()
    from ..transfer import deepen

    rewrite = _Rewrite("deepen", model, out, source, force, json, {"blocks": blocks, "mode": mode})
    rewrite.measure_on(data, images, batch_size, device, workers, skip_corrupt, data_root)
    rewrite.stages(stage, lambda old: deepen(old, blocks, mode=mode))


def recalibrate_command(
    model: ModelArgument,
    data: DataOption,
    out: OutputOption,
    images: Annotated[int, typer.Option("--images", help="Training images to average over, evenly spaced.")] = 2000,
    test_images: Annotated[
        int | None, typer.Option("--test-images", help="Measure accuracy on this many test images; all by default.")
    ] = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    source: SourceOption = None,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Re-estimate BatchNorm statistics on training images, as after --form pre. Labels are not used."""
    start()
    from ..data import batches, open_data
    from ..recalibrate import recalibrate

    rewrite = _Rewrite("recalibrate", model, out, source, force, json, {"data": data, "images": images})
    train = open_data(
        data, rewrite.model.info.preprocessing, "train", images=images, skip_corrupt=skip_corrupt, root=data_root
    )
    # Consecutive images of a folder are of one class, and a batch of one class has its own statistics.
    order = [i for start in range(_STRIDE) for i in range(start, len(train), _STRIDE)]
    rewrite.measure_on(data, test_images, batch_size, device, workers, skip_corrupt, data_root)

    def change(loaded: OdeResNet) -> None:
        recalibrate(loaded, batches(train, batch_size, order=order, workers=workers), device=rewrite.device)

    rewrite.whole(change)


_STRIDE = 97


class _Rewrite:
    """Load, measure, change, measure again, save, print."""

    def __init__(
        self,
        command: str,
        model: Path,
        out: Path,
        source: str | None,
        force: bool,
        json: bool,
        settings: dict[str, Any],
    ) -> None:
        from .. import model_file
        from ..model import as_device

        self.command, self.path, self.out, self.settings = command, model, out, settings
        self.output = Output(json_mode=json)
        model_file.check_output(check_safetensors(out), force=force)
        self.model = model_file.load(model, source=source)
        self.data: ImageData | None = None
        self.device = as_device("cpu")

    def measure_on(
        self,
        data: str | None,
        images: int | None,
        batch_size: int,
        device: str,
        workers: int,
        skip_corrupt: bool,
        data_root: Path,
    ) -> None:
        """Measure on the test split of `data`; on fixed random images without any."""
        from ..data import check_classes, open_data
        from ..model import as_device

        self.device = as_device(device)
        self.model.to(self.device)
        self.batch_size, self.workers = batch_size, workers
        if data is not None:
            self.data = open_data(
                data, self.model.info.preprocessing, "test", images=images, skip_corrupt=skip_corrupt, root=data_root
            )
            check_classes(self.data, self.model.info.num_classes, self.model.info.class_names)

    def stages(self, names: list[str] | None, change: Callable[[OdeStage], OdeStage]) -> None:
        """Replace the stages called `names`, or all that have steps."""
        picked = self.model.pick(names)
        if not names:
            picked = {name: stage for name, stage in picked.items() if stage.spec.depth}
        self.settings["stages"] = list(picked)

        def change_all(model: OdeResNet) -> None:
            for name, stage in picked.items():
                model.replace_stage(name, change(stage))

        self.whole(change_all)

    def whole(self, change: Callable[[OdeResNet], None]) -> None:
        from .. import model_file
        from ..conversion import compare_logits, random_batch
        from ..data import batches
        from ..evaluate import evaluate
        from ..report import evaluation_json, evaluation_line, stage_rows, stage_table, verification_line
        from ..tables import finite
        import torch  # isort: skip

        batch = random_batch(self.model.info.preprocessing, 4).to(self.device)

        def logits() -> torch.Tensor:
            with torch.no_grad():
                return self.model(batch).cpu()

        def accuracy() -> Any:
            if self.data is None:
                return None
            self.output.note(f"evaluating on {len(self.data):,} images of {self.data.name}")
            return evaluate(self.model, batches(self.data, self.batch_size, workers=self.workers), device=self.device)

        rows_before, logits_before, before = stage_rows(self.model), logits(), accuracy()
        change(self.model)
        self.model.eval()
        rows, after = stage_rows(self.model), accuracy()
        logits_after = logits()
        same = torch.equal(logits_before, logits_after)
        verification = compare_logits(logits_before, logits_after, batch="random images", kept=same)
        verified = verification.record()
        self.model.info = self.model.info.with_command(self.command, **self.settings, verified=verified)
        model_file.save(self.model, self.out)

        self.output.show(stage_table(rows, title=f"{self.command}: {self.path} → {self.out}"))
        for old, new in zip(rows_before, rows, strict=True):
            if (old.steps, old.blocks) != (new.steps, new.blocks):
                self.output.show(
                    f"{new.stage}: {old.steps} → {new.steps} steps, {old.blocks} → {new.blocks} distinct blocks,"
                    f" h {old.step_size:.4g} → {new.step_size:.4g}, {old.parameters:,} → {new.parameters:,} parameters"
                )
        document: dict[str, Any] = {
            "out": str(self.out),
            "stages": [vars(row) for row in rows],
            "verified": verified,
        }
        if before is not None and after is not None:
            agreement = before.agreement(after)
            self.output.show(f"before: {evaluation_line(before)}")
            self.output.show(f"after:  {evaluation_line(after)}; top-1 agreement with before {agreement:.2%}")
            document |= {
                "before": evaluation_json(before),
                "after": evaluation_json(after),
                "top1_agreement": agreement,
            }
        else:
            self.output.show(f"verified {verification_line(verified)}")
        self.output.note(f"wrote {self.out}")
        self.output.json(finite(document))
