"""What the commands that rewrite a model file have in common: load, rewrite, save, print."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ResodeError, UsageError
from ..machine.locks import file_lock
from ..machine.processes import refuse_several
from ..machine.signals import exit_code
from .interrupt import stop
from .options import Comparing, Origin, Reading, check_safetensors
from .output import Output
from .working_folder import remember

if TYPE_CHECKING:
    from ..fitting.rewriting import FitPlan, RewriteResult
    from ..network.model import OdeResNet
    from ..network.stage import OdeStage


@dataclass
class Rewrite:
    """One run of such a command. settings: for the model's history; horizon: what the stages' T becomes.

    fit: the data to fit to, if any. remembered: whether the data to compare on are this folder's, which nobody has
    asked for on this command line.
    """

    command: str
    path: Path
    out: Path
    comparing: Comparing
    reading: Reading
    origin: Origin
    settings: dict[str, Any]
    force: bool
    json: bool
    horizon: str | None = None
    fit: str | None = None
    remembered: bool = False

    def __post_init__(self) -> None:
        from ..machine.atomic import check_output
        from ..network.model import as_device, non_finite
        from ..network.specs import as_horizon

        self.time = None if self.horizon is None else as_horizon(self.horizon)
        if self.time is not None:
            self.settings["horizon"] = str(self.time)
        self.output = Output(json_mode=self.json)
        if self.comparing.data is None and self.reading.images is not None:
            raise UsageError("--images says how many images of --data to use; add --data")
        self.reading.check_used(self.comparing.data, self.fit)
        check_output(check_safetensors(self.out), force=self.force)
        own_input = self.path.exists() and self.out.exists() and self.path.samefile(self.out)
        # Where the work on a file goes that is its own input, until it is done.
        self.unfinished = self.out.with_name(f"{self.out.stem}.unfinished{self.out.suffix}") if own_input else self.out
        self.saved = False  # whether a fit that is not done has left a file
        self.left_unfinished = False  # whether it was beside the output
        self.model = self.origin.load(self.path)
        self.was_finite = not non_finite(self.model.net.state_dict())  # else loading has said so
        self.device = as_device(self.comparing.device)

    def pick(self, names: list[str] | None) -> list[str]:
        """The stages called `names`, or all that have steps."""
        picked = self.model.pick(names)
        chosen = [name for name, stage in picked.items() if names or stage.spec.depth]
        self.settings["stages"] = chosen
        return chosen

    def stages(
        self, names: list[str] | None, change: Callable[[OdeStage], OdeStage], plan: FitPlan | None = None
    ) -> None:
        """Change the stages called `names`, or all that have steps; with a plan, fit what comes of it."""
        from ..fitting.rewriting import change_stages, rewrite_and_fit

        picked = self.pick(names)

        def changed(old: OdeStage) -> OdeStage:
            new = change(old)
            if self.time is not None:
                new.use_horizon(self.time)
            return new

        if plan is None:
            result = self.whole(lambda model: change_stages(model, picked, changed))
            if not result.changed:
                self.output.note(f"nothing to {self.command}: {', '.join(picked) or 'no stage'} stood so before")
            return
        from .fitting import fit_callbacks, show_fit

        refuse_several("a fit")
        if self.unfinished != self.out and self.unfinished.exists():
            raise ResodeError(
                f"{self.unfinished} exists, where a fit of {self.out} in its own place would keep what is not done;"
                " move it, or choose another -o"
            )
        with file_lock(self.out, on_message=self.output.note), fit_callbacks(self.output, plan) as fit:
            try:
                result = rewrite_and_fit(self.model, picked, changed, plan, self._measuring(), self._callbacks(fit=fit))
            except BaseException:
                if self.saved:
                    self.output.note(f"{self.unfinished} holds what was fitted so far")
                raise
        show_fit(self.output, plan, result)
        if result.fit is not None and result.fit.interrupted:
            kept = "" if self.unfinished == self.out else f"; {self.out} is as it was"
            held = f"{self.unfinished} holds what was fitted so far{kept}" if self.saved else "nothing was fitted yet"
            self.output.note(f"interrupted; {held}")
            raise typer.Exit(exit_code(stop.number or signal.SIGINT))
        if stop.number is not None:  # it came while the last phase was judged and saved
            self.output.note(f"interrupted; {self.out} is whole, and was not measured")
            raise typer.Exit(exit_code(stop.number))
        self._report(result, plan.teacher.name, plan)

    def whole(self, change: Callable[[OdeResNet], None]) -> RewriteResult:
        """Change the model, and compare it with what it was."""
        from ..fitting.rewriting import rewrite

        result = rewrite(self.model, change, self._measuring(), self._callbacks())
        self._report(result, str(self.path))
        return result

    def _measuring(self) -> Any:
        from ..data import OtherClasses
        from ..fitting.rewriting import Measuring

        comparing, data = self.comparing, None
        if comparing.data is not None:
            try:
                data = self.reading.open(comparing.data, self.model, "test")
            except OtherClasses as error:
                if not self.remembered:
                    fits = (
                        f"; --fit {comparing.data} alone looks at no labels"
                        if self.command in ("deepen", "tie")
                        else ""
                    )
                    raise ResodeError(f"{error}{fits}") from error
                self.output.note(f"accuracy is not measured: {error}")
        if data is not None:
            self.output.notes(data.notes)
        return Measuring(self.device, data, comparing.batch_size, comparing.workers, bool(comparing.gradients))

    def _callbacks(self, **more: Any) -> Any:
        from ..fitting.rewriting import RewriteCallbacks

        return RewriteCallbacks(save=self._save, on_message=lambda text: self.output.notes([text]), **more)

    def _save(self, model: OdeResNet, verified: Mapping[str, Any], done: bool) -> None:
        """Write a model with this command in its history."""
        from ..files import model_file
        from ..network.model import check_finite

        settings = {**self.settings, "verified": dict(verified)} if verified else self.settings
        if "fit" in settings:
            settings = {**settings, "fit": {**settings["fit"], "interrupted": not done}}
        info = self.model.info.with_command(self.command, **settings)
        if self.was_finite:
            check_finite(model, f"{self.command} made weights that are no numbers ({{}}); they are not written")
        model_file.write(model.with_info(info), self.out if done else self.unfinished)
        self.saved = not done
        self.left_unfinished = self.left_unfinished or (self.saved and self.unfinished != self.out)
        if done:
            if self.left_unfinished:
                self.unfinished.unlink(missing_ok=True)
            self.model.record(self.command, **settings)
            self.output.note(f"wrote {self.out}")  # before it is measured, which may be interrupted
            remember(self.output, model=self.out, **({"data": self.comparing.data} if self.comparing.data else {}))

    def _report(self, result: RewriteResult, reference: str, plan: FitPlan | None = None) -> None:
        from ..measuring.evaluate import agreement
        from ..quantities import finite
        from ..reports.fit import figures_json, figures_table, fit_json
        from ..reports.report import evaluation_json, evaluation_line, stage_rows, stage_table, verification_line

        rows = stage_rows(self.model)
        self.output.show(stage_table(rows, title=f"{self.command}: {self.path} → {self.out}"))
        figures = [column.figures for column in result.columns]
        self.output.show(figures_table(figures, reference=reference, noise=result.fit is None))
        document: dict[str, Any] = {
            "out": str(self.out),
            "stages": [vars(row) for row in rows],
            "verified": result.verified,
            "figures": figures_json(figures),
        }
        first, last = result.columns[0].evaluation, result.columns[-1].evaluation
        if first is not None and last is not None:
            agreed, said = agreement(first, last), "top-1" if last.MAIN == "top1" else "labels'"
            self.output.show(f"before: {evaluation_line(first)}")
            self.output.show(f"after:  {evaluation_line(last)}; {said} agreement with before {agreed:.2%}")
            document |= {
                "before": evaluation_json(first),
                "after": evaluation_json(last),
                "top1_agreement" if last.MAIN == "top1" else "label_agreement": agreed,
            }
        elif plan is None:
            remedy = "" if result.verified["function_kept"] else self._remedy()
            self.output.show(verification_line(result.verified) + remedy)
        if plan is not None:
            from ..reports.outcome import outcome_line, points_lost

            assert result.fit is not None
            document |= {"fit": fit_json(result.fit), "points_lost": points_lost(result)}
            self.output.show(outcome_line(result, plan, self.model, source=self.path, out=self.out))
        self.output.json(finite(document))

    def _remedy(self) -> str:
        again = f"resode {self.command} {self.path}"
        again += f" --blocks {self.settings['blocks']}" if "blocks" in self.settings else ""
        mend = f", and mend it: `{again} --fit DATA` (images, no labels)" if self.command in ("deepen", "tie") else ""
        return f": measure it with --data DATA{mend}"
