"""Forward rules, each in a file of its own. A new one is a file, and an entry here."""

from .composed import composed_euler
from .euler import EULER
from .heun import HEUN
from .heunnet import HEUNNET
from .mapping import MAPPING
from .midpoint import MIDPOINT
from .rk4 import RK4
from .scheme import Scheme

SCHEMES = {scheme.name: scheme for scheme in (EULER, HEUN, HEUNNET, MIDPOINT, RK4)}

__all__ = ["EULER", "HEUN", "HEUNNET", "MAPPING", "MIDPOINT", "RK4", "SCHEMES", "Scheme", "composed_euler"]
