"""The engine: symbols, operators, models, tapes and their derivatives."""

from . import model

from . import ownership, specialise

from . import draw
