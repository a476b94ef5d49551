"""The engine: symbols, operators, models, tapes and their derivatives."""

from .model import Builder, Model

from .watching import watch_shapes

from .specialise import fastest_step

from .ownership import find_owners

from .copies import copy_graph

from .draw import to_dot

from .placement import Placement

from .failing import abort_on_failure
from .meeting import watched

from .agreement import describe_model
