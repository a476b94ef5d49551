"""The engine: symbols, operators, models, tapes and their derivatives."""

from .model import Builder, Model

from .ownership import find_owners
from .specialise import fastest_step

from .draw import to_dot

from .placement import Placement
