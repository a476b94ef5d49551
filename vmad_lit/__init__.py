"""vmad_lit: tape-based automatic differentiation for scientific models whose values are not just arrays.

The package is tangled from the chapters of a book, which explains it: see the folder book/.
"""

from .core.model import Builder
from .core.operator import operator
from .core.symbol import ListPlaceholder
from .core.valuetypes import VALUE_TYPES

VALUE_TYPES.elsewhere["pmesh.pm"] = "vmad_lit.lib.mesh"

__all__ = ["Builder", "ListPlaceholder", "operator"]
__version__ = "0.1.0"

from .core import stdlib  # symbols gain their arithmetic

__all__ += ["stdlib"]

from .core.autooperator import autooperator

__all__ += ["autooperator"]

from .lib import linalg  # noqa: F401  (symbols gain indexing, comparisons and the matrix product)

from .lib import numpy_names  # noqa: F401  (NumPy's functions answer to symbols)
