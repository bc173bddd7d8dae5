"""The numerics: schemes, backward plans and the one autograd.Function. Torch only; knows no ResNet."""

from .adjoint import Monitor, fixed_buffers, solve
from .field import Field, RandomState, Residual
from .plans import METHODS, Adjoint, Carry, Plan, Prediction, StepPlan, required_scheme
from .schemes import EULER, HEUN, SCHEMES, Scheme

__all__ = [
    "EULER",
    "HEUN",
    "METHODS",
    "SCHEMES",
    "Adjoint",
    "Carry",
    "Field",
    "Monitor",
    "Plan",
    "Prediction",
    "RandomState",
    "Residual",
    "Scheme",
    "StepPlan",
    "fixed_buffers",
    "required_scheme",
    "solve",
]
