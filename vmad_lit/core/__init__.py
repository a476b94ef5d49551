"""The engine: symbols, operators, models, tapes and their derivatives."""

from .model import Builder, Model

from .ownership import find_owners
from .specialise import fastest_step

from .copies import copy_graph

from .draw import to_dot

from .watching import watch_shapes

from .placement import Placement
