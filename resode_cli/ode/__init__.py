"""The numerics: schemes, backward plans and the one autograd.Function. Torch only; knows no ResNet."""

from .adjoint import Begun, solve
from .field import Evaluator, Field, Residual
from .generators import RandomState
from .memory import kept_bytes, peak_kept_bytes
from .methods import METHODS, REVERSALS, Adjoint, required_scheme, settings_of
from .monitor import Monitor
from .plans import Carry, Plan, Prediction, StepPlan
from .reentry import fixed_buffers, version
from .schemes import EULER, HEUN, MAPPING, SCHEMES, Scheme, composed_euler
from .signs import is_positive
from .steps import trajectory

__all__ = [
    "EULER",
    "HEUN",
    "MAPPING",
    "METHODS",
    "REVERSALS",
    "SCHEMES",
    "Adjoint",
    "Begun",
    "Carry",
    "Evaluator",
    "Field",
    "Monitor",
    "Plan",
    "Prediction",
    "RandomState",
    "Residual",
    "Scheme",
    "composed_euler",
    "StepPlan",
    "fixed_buffers",
    "is_positive",
    "kept_bytes",
    "peak_kept_bytes",
    "required_scheme",
    "settings_of",
    "solve",
    "trajectory",
    "version",
]
