"""One fit, as `deepen` and `tie` run it: its teacher, its images, its progress."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .interrupt import working
from .output import Output
from .progress import fitting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..fitting.results import FitResult, FitStep
    from ..fitting.settings import FitSettings
    from ..network.model import OdeResNet
    from ..network.residual import Form

FIGURES_IMAGES = 256  # held out of the fit, on which networks are compared


@dataclass(frozen=True)
class FitRequest:
    """What to fit on, to what, and how. form: of the fitted stages; None: `pre` where that can be, else as it is."""

    data: str
    teacher: str | None
    form: Form | None
    settings: FitSettings
    trust_source: bool = False


class FitJob:
    def __init__(
        self,
        request: FitRequest,
        model: OdeResNet,
        path: Path,
        device: torch.device,
        *,
        root: Path,
        skip_corrupt: bool,
    ) -> None:
        from ..data import open_data
        from ..fitting.fit import FitData
        from ..training.teacher import open_teacher, own_teacher

        self.request, self.model, self.device = request, model, device
        settings, pre = request.settings, model.info.preprocessing
        given = request.teacher
        teacher = (
            own_teacher(model, str(path))
            if given is None
            else open_teacher(given, model, trust_source=request.trust_source)
        )
        self.teacher = teacher.to(device)

        def images(augment: bool) -> Any:
            return open_data(
                request.data,
                pre,
                "train",
                augment=augment,
                seed=settings.seed,
                images=settings.images,
                skip_corrupt=skip_corrupt,
                root=root,
                labelled=False,
            )

        self.data = FitData(images(settings.augment), images(False))

    def images(self) -> Tensor:
        """Images that are held out of the fit."""
        import torch

        from ..data import batches
        from ..fitting.fit import held_out
        from ..measuring.comparison import spread

        order = spread(held_out(len(self.data.plain)), FIGURES_IMAGES)
        found = [b.images for b in batches(self.data.plain, 64, order=order) if len(b.labels)]
        return torch.cat(found)

    def reference(self, images: Tensor) -> Tensor:
        import torch

        return torch.cat([self.teacher.logits(part.to(self.device)).cpu() for part in torch.split(images, 64)])

    def network(self) -> OdeResNet:
        """What the student is compared with: the teacher, or else the model as it was."""
        from ..network.model import OdeResNet

        net = self.teacher.net
        return net if isinstance(net, OdeResNet) else copy.deepcopy(self.model)

    def into_form(self, names: Sequence[str]) -> None:
        """Bring stages into the form that was asked for."""
        from ..network.residual import ACTIVATIONS, check_form

        for name in names:
            stage = self.model.stages[name]
            form = self.request.form or ("pre" if stage.activation in ACTIVATIONS else stage.spec.form)
            check_form(form, stage.activation, name)
            stage.spec = replace(stage.spec, form=form)

    def record(self) -> dict[str, Any]:
        """For the model's history."""
        return {"data": self.request.data, "teacher": self.teacher.name, **asdict(self.request.settings)}

    def run(self, output: Output, deepening: Mapping[str, Any], save: Callable[[OdeResNet], None]) -> FitResult:
        """Fit, with a bar; `save` gets the model after every phase."""
        from ..fitting.fit import PROBED, fit
        from ..fitting.results import FitCallbacks
        from ..reports.fit import block_table, cost_table, phase_line

        output.notes(self.data.plain.notes)
        output.note(f"teacher: {self.teacher.name}; {len(self.data.plain):,} images of {self.request.data}")
        with ExitStack() as stack:
            stop = stack.enter_context(working())
            bar = stack.enter_context(fitting(output))

            def step(done: FitStep) -> None:
                stop.hold()  # from here on there is something to save
                bar(done)

            def ended(phase: Any, model: OdeResNet) -> None:
                output.note(phase_line(phase))
                save(model)

            callbacks = FitCallbacks(
                on_step=step,
                on_costs=lambda costs: output.aside.print(cost_table(costs, images=PROBED)),
                on_phase=ended,
                on_message=output.note,
                should_stop=stop,
            )
            result = fit(
                self.model,
                self.teacher,
                self.data,
                settings=self.request.settings,
                device=self.device,
                callbacks=callbacks,
                **deepening,
            )
        self.data.plain.skipped |= self.data.train.skipped
        output.notes([self.data.plain.skipped_note()])
        if result.phases and result.phases[-1].after.states:
            output.show(block_table(result.phases[-1]))
        return result
