"""What a stage's passes did, for whoever asks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .repetition import Repetition


@dataclass
class Monitor:
    """What the last passes through a stage did. Written by the engine.

    Figures are 0-dim tensors on the state's device, so that writing them does not wait for a GPU;
    None where the sweep had nothing to tell: an exact plan reconstructs nothing.

    drift: ‖x̃ − x‖ / ‖x‖ of the reconstructed against the true states, at the stage's input and at
        every anchor: the largest.
    correction: ‖G(x̂_n) − x̂_n‖ / ‖x̂_n‖, what one more iterate of the reversal changes: a free local
        error estimate, the largest over the reconstructed steps, on the first images of the batch.
    contraction: h ‖Φ(a) − Φ(b)‖ / ‖a − b‖ for two states at which the sweep evaluated the same Φ: the
        largest, on the first images. From 1 on, the fixed-point iteration need not converge.
    evaluations: branch evaluations of the backward sweep.
    state_bytes: size of one state in the last forward pass.
    repetition: the last sweep's comparison of its evaluations with the forward pass; see `check`.
    kept: bytes that the graph holds for the backward pass, parameters aside; counted if `count_kept`.
    """

    drift: Tensor | None = None
    correction: Tensor | None = None
    contraction: Tensor | None = None
    evaluations: int = 0
    state_bytes: int = 0
    kept: int | None = None
    count_kept: bool = False
    repetition: Repetition | None = None

    def check(self, *, wait: bool = True) -> None:
        """Raises ResodeError if the last backward pass did not repeat its forward pass. On a CPU it did so itself."""
        repetition, self.repetition = self.repetition, None
        if repetition is not None:
            repetition.check(wait=wait)

    def clear(self) -> None:
        self.drift = self.correction = self.contraction = self.kept = None
        self.evaluations = 0
