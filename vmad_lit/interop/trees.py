"""Parameters that another library keeps in trees or by dotted names, as arguments of an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vmad_lit.core.arguments import one_of
from vmad_lit.core.error import BadArgument, did_you_mean
from vmad_lit.core.stdlib.operators import Array


class Leaves:
    """An argument of a foreign function that holds many arrays: here one flat array, or an argument for each.

    Parameters
    ----------
    argument : str
        The name of the argument.
    paths : list of str
        The name of each array within it.
    tree :
        An example of what the function takes.
    take, make :
        Functions from a tree to the list of its arrays, and back.
    form : str
        "flat" or "named".
    """

    def __init__(
        self,
        argument: str,
        paths: Sequence[str],
        tree: Any,
        take: Callable[[Any], list[Any]],
        make: Callable[[list[Any]], Any],
        form: str,
    ) -> None:
        one_of("parameters", form, ("flat", "named"))
        self.argument, self.flat, self.take, self.make = argument, form == "flat", take, make
        self.names = [identifier(f"{argument}_{path}" if path else argument) for path in paths]
        if len(set(self.names)) < len(self.names):
            raise BadArgument(f"two of the arrays in '{argument}' have one name: {', '.join(self.names)}")
        arrays = [np.asarray(array) for array in take(tree)]
        self.shapes = [array.shape for array in arrays]
        self.dtype = np.result_type(np.float32, *(array.dtype for array in arrays))

    @property
    def inputs(self) -> list[str]:
        """The arguments of the operator that hold the arrays."""
        return [self.argument] if self.flat else self.names

    def pack(self, tree: Any) -> Any:
        """The value of the argument: a flat array, or a dictionary of arrays by name."""
        arrays = [np.asarray(array) for array in self.take(tree)]
        if [a.shape for a in arrays] != self.shapes:
            raise ValueError(f"'{self.argument}' holds arrays of shapes {self.shapes}, not {[a.shape for a in arrays]}")
        if not self.flat:
            return dict(zip(self.names, arrays))
        return np.concatenate([np.zeros(0, self.dtype), *(a.ravel() for a in arrays)]).astype(self.dtype)

    def unpack(self, value: Any) -> Any:
        """The tree of what `pack` has made, with arrays of whatever library."""
        if not self.flat:
            return self.make([value[name] for name in self.names])
        size = sum(int(np.prod(shape)) for shape in self.shapes)
        if tuple(value.shape) != (size,):
            raise ValueError(f"'{self.argument}' has to be an array of {size} numbers, not of shape {tuple(value.shape)}")
        arrays, begin = [], 0
        for shape in self.shapes:
            end = begin + int(np.prod(shape))
            arrays.append(value[begin:end].reshape(shape))
            begin = end
        return self.make(arrays)


def identifier(name: str) -> str:
    """A name in the form in which an argument can have it."""
    return "".join(c if c.isalnum() else "_" for c in name)


class Trees(dict[str, Leaves]):
    """The arguments of a function that are trees, by name."""

    def inputs(self, names: Sequence[str]) -> list[str]:
        """The arguments of the operator that stand for those of the function."""
        return [x for name in names for x in (self[name].inputs if name in self else [name])]

    def arguments(self, names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the function, of those of the operator."""
        given = {}
        for name in names:
            leaves = self.get(name)
            held = values[name] if leaves is None or leaves.flat else {i: values[i] for i in leaves.inputs}
            given[name] = held if leaves is None else leaves.unpack(held)
        return given

    def find(self, name: str | None) -> Leaves:
        """The only tree, or the one of a name."""
        if name is None and len(self) == 1:
            return next(iter(self.values()))
        if name not in self:
            raise BadArgument(f"there is no tree '{name}'" + did_you_mean(str(name), self))
        return self[name]

    def helpers(self) -> dict[str, Callable[..., Any]]:
        """The functions by which the user of an operator packs and unpacks trees."""

        def flatten(tree: Any, name: str | None = None) -> Any:
            """The flat array of a tree, or the dictionary of its arrays."""
            return self.find(name).pack(tree)

        def unflatten(value: Any, name: str | None = None) -> Any:
            """The tree."""
            return self.find(name).unpack(value)

        return dict(flatten=flatten, unflatten=unflatten)
