"""How much of its source's accuracy a fitted network has kept, and what to do where it is too little."""

from __future__ import annotations

from pathlib import Path

from ..fitting.rewriting import FitPlan, RewriteResult
from ..network.model import OdeResNet
from ..quantities import counted

MUCH = 1.0  # points of accuracy, whose loss calls for advice
LITTLE = 0.95  # agreement with the source, below which advice is given where no labels are known


def points_lost(result: RewriteResult) -> float | None:
    """Source less fitted, in points of the figure by which networks are compared. None where it was not measured."""
    source, fitted = result.columns[0].evaluation, result.columns[-1].evaluation
    if source is None or fitted is None:
        return None
    return round(100 * (source.figures[source.MAIN] - fitted.figures[fitted.MAIN]), 6)


def outcome_line(result: RewriteResult, plan: FitPlan, model: OdeResNet, *, source: Path, out: Path) -> str:
    """How the fit of a model ended, and what may make it better where it lost much."""

    def advice() -> str:
        teacher = "" if out.exists() and source.exists() and out.samefile(source) else f" --teacher {source}"
        return _advice(result, plan, model, labels=f"resode finetune {out} --data DIR{teacher}")

    lost = points_lost(result)
    figures = result.columns[-1].figures
    if lost is None:
        line = (
            f"{out} agrees with {plan.teacher.name} on {figures.agreement:.1%} of"
            f" {counted(figures.images, 'image')} held out of the fit; measure its accuracy with --data DATA (labels)"
        )
        return line if figures.agreement >= LITTLE else f"{line}. {advice()}"
    if lost <= 0:
        return f"{out} ends {-lost:.2f} points above its source" if lost else f"{out} ends where its source is"
    line = f"{out} ends {lost:.2f} points below its source"
    return line if lost <= MUCH else f"{line}. {advice()}"


def _advice(result: RewriteResult, plan: FitPlan, model: OdeResNet, *, labels: str) -> str:
    settings, ways = plan.settings, list[str]()
    specs = [stage.spec for stage in model.stages.values() if stage.spec.depth]
    assert result.fit is not None
    if result.fit.out_of_time:
        ways.append(f"more time (--fit-minutes {2 * settings.minutes:g}: it still gained when its time was over)")
    elif settings.steps:
        ways.append(f"more steps (--fit-steps {2 * settings.steps}, or --fit-minutes in its place)")
    if any(spec.kind in ("tied", "tied+stats") for spec in specs):
        ways.append("norms of each step's own (--depth-weights tied+norms)")
    elif plan.form is None and any(spec.form == "pre" for spec in specs):
        ways.append("the blocks' own form (--form exact)")
    ways.append(f"labels ({labels})")
    return "What may help: " + ", ".join(ways[:-1]) + (" or " if len(ways) > 1 else "") + ways[-1]
