"""vmad_lit: tape-based automatic differentiation for scientific models whose values are not just arrays.

The package is tangled from the chapters of a book, which explains it: see the folder book/.
"""

from .core import stdlib  # symbols gain their arithmetic
from .core.autooperator import autooperator
from .core.model import Builder
from .core.operator import operator
from .core.symbol import ListPlaceholder
from .core.valuetypes import VALUE_TYPES

VALUE_TYPES.elsewhere["pmesh.pm"] = "vmad_lit.lib.mesh"

__all__ = ["Builder", "ListPlaceholder", "autooperator", "operator", "stdlib"]
__version__ = "0.1.0"

from .lib import linalg, numpy_names  # noqa: E402, F401  (symbols gain indexing, the matrix product, and NumPy's functions)
