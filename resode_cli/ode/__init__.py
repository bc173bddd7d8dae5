"""The numerics: schemes, backward plans and the one autograd.Function. Torch only; knows no ResNet."""

from .adjoint import Monitor, solve
from .field import Field, Residual
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
    "Residual",
    "Scheme",
    "StepPlan",
    "required_scheme",
    "solve",
]
