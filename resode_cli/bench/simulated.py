"""What methods would hold on a device, simulated: nothing is run, and the device need not be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..files import model_file
from ..network.mixing import check_apart
from ..network.model import OdeResNet, freeze_batch_norm
from ..ode import Adjoint
from ..simulation.step import Simulation
from ..surgery.convert import random_batch
from ..surgery.steps import deepened
from .workload import BACKPROP, Workload, check_depth

PROBED = 2  # images, to see whether they mix


@dataclass(frozen=True)
class SimulatedRow:
    """One method at one depth. peak_bytes: of a step, with weights and gradients. growth: of it, what is not weights,
    buffers or images. bytes_kept: by all pieces between the passes. time: against backprop's, by the roofline model.
    """

    method: str
    depth: int
    peak_bytes: int
    growth: int
    bytes_kept: int
    time: float


@dataclass(frozen=True)
class SimulatedReport:
    """Every method at every depth, on a device that was simulated."""

    what: str
    device: str
    batch_size: int
    batch_norm: str
    amp: str
    channels_last: bool
    rows: tuple[SimulatedRow, ...]


def simulate(
    workload: Workload,
    methods: Sequence[Adjoint],
    *,
    device: str,
    depths: Sequence[int] | None,
    on_progress: Callable[[str], None] = lambda what: None,
) -> SimulatedReport:
    """Plain backprop and `methods` at every depth, without what an optimizer keeps.

    workload: of a model. Raises UsageError for a method or depth that does not suit the network.
    """
    assert workload.model is not None
    rows: list[SimulatedRow] = []
    what = ""
    for depth in depths or (None,):
        model = model_file.load(Path(workload.model), source=workload.source, trust_source=workload.trust_source)
        if depth is not None:
            check_depth(model, depth)
            for name, stage in model.stages.items():
                if stage.spec.depth:
                    model.replace_stage(name, deepened(stage, depth))
        model.train()
        if workload.bn == "frozen":
            freeze_batch_norm(model)
        own = model.info.preprocessing
        images = replace(own, size=workload.input_size or own.size)
        what = f"{Path(workload.model).name} ({model.info.source}), {images.size_text}"
        probe = random_batch(images, PROBED)
        if any(method.slices > 1 for method in methods):
            check_apart("the network", model.net, model, probe)
        simulation = Simulation(model, device, channels_last=workload.channels_last)
        shape = (workload.batch_size, *probe.shape[1:])
        chosen = [BACKPROP, *(m for m in methods if m != BACKPROP)]
        rows += _rows(model, simulation, chosen, shape, workload, on_progress)
    return SimulatedReport(
        what, device, workload.batch_size, workload.bn, workload.amp, workload.channels_last, tuple(rows)
    )


def _rows(
    model: OdeResNet,
    simulation: Simulation,
    methods: Sequence[Adjoint],
    shape: tuple[int, ...],
    workload: Workload,
    on_progress: Callable[[str], None],
) -> list[SimulatedRow]:
    depth = max((stage.spec.depth for stage in model.stages.values()), default=0)
    rows: list[SimulatedRow] = []
    seconds = 0.0
    for method in methods:
        on_progress(f"{method.label} at {depth} steps")
        for stage in model.stages.values():
            method.plan(stage.spec.depth, stage.spec.scheme)  # or it is a mistake
        found = simulation.step(method, shape, amp=workload.amp, optimizer_slots=0)
        seconds = seconds or found.seconds
        kept = sum(piece.kept for piece in found.pieces.values())
        rows.append(
            SimulatedRow(method.label, depth, found.peak, found.peak - found.fixed, kept, found.seconds / seconds)
        )
    return rows
