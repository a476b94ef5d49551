"""PyTorch: its modules as operators, and our models as its functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from vmad_lit.core.error import needed_for
from vmad_lit.core.operator import Operator
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.interop.foreign import Arrays, Foreign, MaybeArrays, Others, name_of, operator_of, read_signature
from vmad_lit.interop.host import host_of
from vmad_lit.interop.trees import Leaves, Trees


def to_tensor(array: Array) -> Any:
    """A tensor in the memory of an array, or of a copy where PyTorch cannot use it."""
    import torch

    plain = array.flags.writeable and all(step >= 0 for step in array.strides) and array.dtype.isnative
    return torch.from_numpy(array if plain else np.array(array, dtype=array.dtype.newbyteorder("=")))


def to_array(tensor: Any, given: Sequence[Array] = ()) -> Array:
    """An array in the memory of a tensor, but not in that of one of the arrays that were `given`."""
    array = tensor.detach().resolve_conj().resolve_neg().cpu().numpy()
    return array.copy() if any(np.may_share_memory(array, other) for other in given) else array


class TorchFunction(Foreign):
    """A function of PyTorch, with its derivatives."""

    def __init__(self, f: Callable[..., Any], ain: Sequence[str], aout: Sequence[str], trees: Trees, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.f, self.arguments, self.aout, self.trees = f, ain, aout, trees
        self.ain, self.replicated = trees.inputs(ain), trees.inputs(list(trees))
        self.fixed = fixed  # parameters of a module that stay as they are
        self.both_ways = True

    def run(self, others: Others) -> Callable[..., Any]:
        """The function from tensors to a tuple of tensors, all in the precision of the widest."""
        import torch

        def function(*x: Any) -> tuple[Any, ...]:
            wide = max((t.real.dtype for t in x), key=lambda dtype: torch.finfo(dtype).bits)
            values = dict(zip(self.ain, (t.to(torch.promote_types(t.dtype, wide)) for t in x)))
            given = self.trees.arguments(self.arguments, values)
            tensors = {name: to_tensor(v) if isinstance(v, np.ndarray) else v for name, v in others.items()}
            y = self.f(wide, given, tensors)
            several = tuple(y) if isinstance(y, (tuple, list)) else (y,)
            if len(several) != len(self.aout) or not all(isinstance(part, torch.Tensor) for part in several):
                found = ", ".join(type(part).__name__ for part in several)
                raise TypeError(f"{self.name} has to return tensors for {', '.join(self.aout)}, and returned {found}")
            return several

        return function
