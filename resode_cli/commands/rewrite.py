"""What the commands that rewrite a model file have in common: load, measure, change, save, measure again, print."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..machine.locks import file_lock, refuse_several_processes
from ..machine.signals import exit_code
from .fit_job import FitJob, FitRequest
from .interrupt import stop
from .options import check_safetensors
from .output import Output

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import ImageData
    from ..measuring.comparison import NetworkFigures
    from ..measuring.evaluate import Evaluation
    from ..network.model import OdeResNet
    from ..network.stage import OdeStage

RANDOM_IMAGES = 4


class Rewrite:
    """One run of such a command.

    settings: for the model's history. gradients: also measure gradient errors, before and after.
    """

    def __init__(
        self,
        command: str,
        model: Path,
        out: Path,
        *,
        source: str | None,
        trust_source: bool,
        force: bool,
        json: bool,
        settings: dict[str, Any],
        gradients: bool | None = None,
    ) -> None:
        from ..files import model_file
        from ..machine.atomic import check_output
        from ..network.model import as_device

        self.command, self.path, self.out, self.settings = command, model, out, settings
        self.gradients = bool(gradients)
        self.output = Output(json_mode=json)
        check_output(check_safetensors(out), force=force)
        self.unfinished = _unfinished(out) if _same(model, out) else out
        self.model = model_file.load(model, source=source, trust_source=trust_source)
        self.data: ImageData | None = None
        self.device = as_device("cpu")
        self.data_root = Path()
        self.skip_corrupt = False

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
        from ..data import open_labelled
        from ..network.model import as_device

        self.device = as_device(device)
        self.model.to(self.device)
        self.batch_size, self.workers = batch_size, workers
        self.data_root, self.skip_corrupt = data_root, skip_corrupt
        if data is not None:
            self.data = open_labelled(
                data, self.model.info, "test", images=images, skip_corrupt=skip_corrupt, root=data_root
            )
            self.output.notes(self.data.notes)

    def pick(self, names: list[str] | None) -> dict[str, OdeStage]:
        """The stages called `names`, or all that have steps."""
        picked = self.model.pick(names)
        if not names:
            picked = {name: stage for name, stage in picked.items() if stage.spec.depth}
        self.settings["stages"] = list(picked)
        return picked

    def stages(self, names: list[str] | None, change: Callable[[OdeStage], OdeStage]) -> None:
        """Replace the stages called `names`, or all that have steps."""
        picked = self.pick(names)

        def change_all(model: OdeResNet) -> None:
            before = {name: stage.spec for name, stage in picked.items()}
            for name, stage in picked.items():
                model.replace_stage(name, change(stage))
            if all(model.stages[name].spec == spec for name, spec in before.items()):
                self.output.note(f"nothing to {self.command}: {', '.join(before) or 'no stage'} stood so before")

        self.whole(change_all)

    def whole(self, change: Callable[[OdeResNet], None]) -> None:
        """Change the model, and compare it with what it was."""
        images, reference = self._random(), self._logits(self._random())
        before = self._figures("before", images, reference)
        change(self.model)
        verified = self._verified(reference)
        self._save(verified=verified)
        self._report([before, self._figures("after", images, reference)], str(self.path), verified, {})

    def fitted(
        self,
        request: FitRequest,
        names: list[str] | None,
        change: Callable[[OdeStage], OdeStage],
        *,
        deepening: Mapping[str, Any] | None = None,
    ) -> None:
        """Change stages, and fit the result to the network that they came from.

        deepening: `coarse`, `depths` and `depth_weights` of `fit`, which then takes stages to their depths
        by itself, and `change` makes the unfitted network to compare with.
        """
        refuse_several_processes()
        with file_lock(self.out, on_message=self.output.note):
            self._fitted(request, names, change, deepening)

    def _fitted(
        self,
        request: FitRequest,
        names: list[str] | None,
        change: Callable[[OdeStage], OdeStage],
        deepening: Mapping[str, Any] | None,
    ) -> None:
        from ..reports.fit import fit_json

        job = FitJob(request, self.model, self.path, self.device, root=self.data_root, skip_corrupt=self.skip_corrupt)
        picked = list(self.pick(names))
        images = job.images()
        reference = job.reference(images)
        random = self._logits(self._random())
        source = self._figures("source", images, reference, network=job.network())
        job.into_form(picked)
        unfitted = _changed(copy.deepcopy(self.model), picked, change)
        plain = self._figures("unfitted", images, reference, network=unfitted, accuracy=False)
        del unfitted
        if deepening is None:
            _changed(self.model, picked, change)
        self.settings["fit"] = job.record()
        result = job.run(self.output, deepening or {}, lambda model: self._save(model, to=self.unfinished))
        self.settings["fit"]["interrupted"] = result.interrupted
        verified = self._verified(random)
        self._save(verified=verified, to=self.unfinished if result.interrupted else None)
        if result.interrupted:
            kept = "" if self.unfinished == self.out else f"; {self.out} is as it was"
            self.output.note(f"interrupted; {self.unfinished} holds what was fitted so far{kept}")
            raise typer.Exit(exit_code(stop.number or signal.SIGINT))
        if self.unfinished != self.out:
            self.unfinished.unlink(missing_ok=True)
        fitted = self._figures("fitted", images, reference)
        self._report([source, plain, fitted], job.teacher.name, verified, {"fit": fit_json(result)})

    def _random(self) -> Tensor:
        from ..surgery.convert import random_batch

        return random_batch(self.model.info.preprocessing, RANDOM_IMAGES)

    def _logits(self, images: Tensor) -> Tensor:
        from ..measuring.comparison import logits_of

        return logits_of(self.model, images)

    def _figures(
        self,
        name: str,
        images: Tensor,
        reference: Tensor,
        *,
        network: OdeResNet | None = None,
        accuracy: bool = True,
    ) -> _Column:
        """Figures of the model, or of another network, with its accuracy where there is data."""
        from ..data import batches
        from ..measuring.comparison import network_figures
        from ..measuring.evaluate import evaluate

        model = (self.model if network is None else network).to(self.device)
        evaluation = None
        if self.data is not None and accuracy:
            self.output.note(f"{name}: evaluating on {len(self.data):,} images of {self.data.name}")
            evaluation = evaluate(model, batches(self.data, self.batch_size, workers=self.workers), device=self.device)
            self.output.notes([self.data.skipped_note()])
        figures = network_figures(
            name,
            model,
            images,
            reference,
            evaluation=evaluation,
            gradients=self.gradients and name != "source",
            on_method=lambda method: self.output.note(f"{name}: gradients of {method}"),
        )
        return _Column(figures, evaluation)

    def _verified(self, before: Tensor) -> dict[str, Any]:
        import torch

        from ..surgery.convert import compare_logits

        after = self._logits(self._random())
        return compare_logits(before, after, batch="random images", kept=torch.equal(before, after)).record()

    def _save(
        self, model: OdeResNet | None = None, *, verified: Mapping[str, Any] | None = None, to: Path | None = None
    ) -> None:
        """Write the model, or one that stands for it, with this command in its history."""
        from ..files import model_file

        model = self.model if model is None else model
        settings = self.settings if verified is None else {**self.settings, "verified": verified}
        info = self.model.info.with_command(self.command, **settings)
        model_file.save(model.with_info(info), self.out if to is None else to)

    def _remedy(self) -> str:
        fit = ", and mend it with --fit DATA (images, no labels)" if self.command in ("deepen", "tie") else ""
        return f": measure it with --data DATA{fit}" if "fit" not in self.settings else ": measure it with --data DATA"

    def _report(
        self, columns: Sequence[_Column], reference: str, verified: Mapping[str, Any], extra: dict[str, Any]
    ) -> None:
        from ..quantities import finite
        from ..reports.fit import figures_json, figures_table
        from ..reports.report import evaluation_json, evaluation_line, stage_rows, stage_table, verification_line

        rows = stage_rows(self.model)
        self.output.show(stage_table(rows, title=f"{self.command}: {self.path} → {self.out}"))
        figures = [column.figures for column in columns]
        self.output.show(figures_table(figures, reference=reference, noise="fit" not in self.settings))
        document: dict[str, Any] = {"out": str(self.out), "stages": [vars(row) for row in rows], "verified": verified}
        first, last = columns[0].evaluation, columns[-1].evaluation
        if first is not None and last is not None:
            agreement = first.agreement(last)
            self.output.show(f"before: {evaluation_line(first)}")
            self.output.show(f"after:  {evaluation_line(last)}; top-1 agreement with before {agreement:.2%}")
            document |= {
                "before": evaluation_json(first),
                "after": evaluation_json(last),
                "top1_agreement": agreement,
            }
        else:
            self.output.show(verification_line(verified) + ("" if verified["function_kept"] else self._remedy()))
        self.output.note(f"wrote {self.out}")
        self.output.json(finite({**document, "figures": figures_json(figures), **extra}))


@dataclass(frozen=True)
class _Column:
    figures: NetworkFigures
    evaluation: Evaluation | None


def _same(model: Path, out: Path) -> bool:
    return model.exists() and out.exists() and model.samefile(out)


def _unfinished(out: Path) -> Path:
    """Where the work on a file goes that is its own input, until it is done."""
    return out.with_name(f"{out.stem}.unfinished{out.suffix}")


def _changed(model: OdeResNet, names: Sequence[str], change: Callable[[OdeStage], OdeStage]) -> OdeResNet:
    for name in names:
        model.replace_stage(name, change(model.stages[name]))
    return model
