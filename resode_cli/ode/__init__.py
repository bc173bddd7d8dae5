"""The numerics: schemes, backward plans and the one autograd.Function. Torch only; knows no ResNet."""

from .adjoint import solve
from .field import Evaluator, Field, Residual
from .generators import RandomState
from .memory import kept_bytes, peak_kept_bytes
from .methods import METHODS, REVERSALS, Adjoint, required_scheme, settings_of
from .monitor import Monitor
from .plans import Carry, Plan, Prediction, StepPlan
from .reentry import fixed_buffers, version
from .schemes import EULER, HEUN, SCHEMES, Scheme
from .sweep import trajectory

__all__ = [
    "EULER",
    "HEUN",
    "METHODS",
    "REVERSALS",
    "SCHEMES",
    "Adjoint",
    "Carry",
    "Evaluator",
    "Field",
    "Monitor",
    "Plan",
    "Prediction",
    "RandomState",
    "Residual",
    "Scheme",
    "StepPlan",
    "fixed_buffers",
    "kept_bytes",
    "peak_kept_bytes",
    "required_scheme",
    "settings_of",
    "solve",
    "trajectory",
    "version",
]
