"""A fit as `deepen` and `tie` ask for it, and what it says while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..fitting.settings import END_TO_END, TO_STATES, FitSettings
from ..options import flag_of, option, parameter_of
from .interrupt import working
from .output import Output
from .parameters import Fields, Given
from .progress import fitting

if TYPE_CHECKING:
    from ..fitting.results import FitCallbacks, PhaseCost
    from ..fitting.rewriting import FitPlan, RewriteResult
    from .rewrite import Rewrite

# What some phases alone read.
READ_BY = {
    "lr": TO_STATES,
    "logits_lr": END_TO_END,
    "states": END_TO_END,
    "refine_steps": ("refine",),
}


@dataclass(frozen=True)
class FitRequest:
    """On what to fit, to what, and in which form."""

    fit: str | None = option(
        None,
        "Fit to the source network on these images (a data set or a folder); no labels needed. `deepen` takes --data"
        " where this is left out.",
        group="Fit",
    )
    no_fit: bool = option(False, "Of `deepen`: measure on --data, and do not fit.", group="Fit")
    teacher: str | None = option(None, "Model file or SOURCE to learn from. Default: the model as it was.", group="Fit")
    form: str | None = option(
        None, "'exact' or 'pre'. Default: as it is; with --fit, 'pre' where blocks allow.", group="Fit"
    )

    def by_default(self, data: str | None, output: Output) -> FitRequest:
        """With the data known, a fit on its training images, which is said. Raises UsageError for one that is declined.

        What a rewrite costs in accuracy it costs on any data; a fit that is of no use is undone.
        """
        if self.no_fit:
            if self.fit is not None:
                raise UsageError("--fit asks for a fit, and --no-fit declines it: leave out one")
            return self
        if self.fit is not None or data is None:
            return self
        output.note(f"fitted to the source on the training images of {data}, without their labels; --no-fit declines")
        return replace(self, fit=data)

    def check(self, settings: FitSettings, offered: Fields, given: Given) -> FitSettings:
        """Raises UsageError for an option of a fit without one, and for a flag that none of its phases reads.

        offered: the settings that the command has. A recipe's value is no flag: flags may choose other phases than the
        recipe's, and --fit-minutes comes in place of its steps. Returns the settings that hold.
        """
        by_steps = {"fit_steps", "fit_refine_steps"}
        for named in (given.flags, given.all - given.flags):  # a flag beside a recipe's value is no contradiction
            if "fit_minutes" in named and (steps := sorted(by_steps & named)):
                raise UsageError(f"--fit-minutes and --{steps[0].replace('_', '-')} exclude each other")
        if "fit_minutes" in given.flags:
            settings = replace(settings, steps=None, refine_steps=None)
        for setting in offered.chosen():
            if self.fit is None and setting.name != "workers" and parameter_of(setting) in given.all:
                raise UsageError(f"{flag_of(setting)} is a setting of a fit; add --fit DATA")
            phases = READ_BY.get(setting.name)
            if phases and parameter_of(setting) in given.flags and not set(phases) & set(settings.phases):
                raise UsageError(
                    f"{flag_of(setting)} is read in {' and '.join(phases)}; --fit-phases has"
                    f" {','.join(settings.phases)}"
                )
        if self.fit is None and self.teacher is not None:
            raise UsageError("--teacher is a setting of a fit; add --fit DATA")
        if self.fit is None and self.form is not None:
            raise UsageError("--form changes the function; add --fit DATA, or use it with `resode convert`")
        return settings

    def plan(
        self, rewrite: Rewrite, settings: FitSettings, deepening: Mapping[str, Any] | None = None
    ) -> FitPlan | None:
        """The fit; None without --fit. Its teacher and images are opened."""
        if self.fit is None:
            return None
        from ..data import known_division, open_data
        from ..fitting.images import FitData
        from ..fitting.rewriting import FitPlan
        from ..network.residual import as_form
        from ..training.teacher import open_teacher, own_teacher

        named = self.fit
        form = as_form(self.form) if self.form is not None else None
        model, reading = rewrite.model, rewrite.reading
        teacher = (
            own_teacher(model, str(rewrite.path))
            if self.teacher is None
            else open_teacher(self.teacher, model, trust_source=rewrite.origin.trust_source)
        )

        def images(augment: bool) -> Any:
            return open_data(
                named,
                model.info.preprocessing,
                "train",
                augment=augment,
                seed=settings.seed,
                images=settings.images,
                skip_corrupt=reading.skip_corrupt,
                root=reading.data_root,
                labelled=False,
                val_split=reading.val_split,
                split_seed=reading.split_seed,
                known=known_division(model.info.history),
            )

        data = FitData(images(settings.augment), images(False))
        own = self.teacher is None
        plan = FitPlan(settings, teacher.to(rewrite.device), data, form, own, dict(deepening or {}))
        rewrite.settings["fit"] = plan.record(named)
        return plan


@contextmanager
def fit_callbacks(output: Output, plan: FitPlan) -> Iterator[FitCallbacks]:
    """A bar over the steps of a fit, and a line for each of its phases."""
    from ..fitting.costs import PREDICTED_ON
    from ..fitting.results import FitCallbacks
    from ..reports.fit import cost_table, phase_line

    with working() as stop, fitting(output) as bar:

        def begin(costs: Sequence[PhaseCost]) -> None:
            output.notes(plan.data.plain.notes)
            output.note(f"teacher: {plan.teacher.name}; {len(plan.data.plain):,} images of {plan.data.plain.name}")
            output.aside.print(cost_table(costs, images=PREDICTED_ON, minutes=plan.settings.minutes))

        yield FitCallbacks(
            on_step=bar,
            on_costs=begin,
            on_phase=lambda phase, model: output.note(phase_line(phase)),
            on_message=output.note,
            should_stop=stop,
            deferred=stop.deferred,
        )


def show_fit(output: Output, plan: FitPlan, result: RewriteResult) -> None:
    """What is left to say once a fit has ended."""
    from ..reports.fit import block_table

    plan.data.plain.skipped |= plan.data.train.skipped
    output.notes([plan.data.plain.skipped_note()])
    assert result.fit is not None
    if result.fit.phases and result.fit.phases[-1].after.states:
        output.show(block_table(result.fit.phases[-1]))
