"""Forward rules, each in a file of its own. A new one is a file, and an entry here."""

from .euler import EULER
from .heun import HEUN
from .scheme import Scheme

SCHEMES = {scheme.name: scheme for scheme in (EULER, HEUN)}

__all__ = ["EULER", "HEUN", "SCHEMES", "Scheme"]
