"""Functions of arrays and of trees of arrays, such as the parameters of a network, as another library takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vmad_lit.core.arguments import one_of
from vmad_lit.core.error import BadArgument, did_you_mean
from vmad_lit.interop.foreign import Foreign, by_name, name_of


class Tree:
    """An argument that holds many arrays: for us one flat array, or an argument for each.

    Parameters
    ----------
    argument : str
        The name of the argument.
    paths : list of str
        The name of each array within it.
    example :
        What the function takes.
    take, make :
        Functions from such a thing to the list of its arrays, and back.
    form : str
        "flat" or "named".
    """

    # Take note of the arrays
    def __init__(
        self,
        argument: str,
        paths: Sequence[str],
        example: Any,
        take: Callable[[Any], list[Any]],
        make: Callable[[list[Any]], Any],
        form: str,
    ) -> None:
        one_of("parameters", form, ("flat", "named"))
        self.argument, self.flat, self.take, self.make = argument, form == "flat", take, make
        names = [f"{argument}_{path}" if path else argument for path in paths]
        self.names = ["".join(c if c.isalnum() else "_" for c in name) for name in names]
        if len(set(self.names)) < len(self.names):
            raise BadArgument(f"two of the arrays in '{argument}' have one name: {', '.join(self.names)}")
        arrays = [np.asarray(array) for array in take(example)]
        self.shapes = [array.shape for array in arrays]
        self.dtype = np.result_type(np.float32, *(array.dtype for array in arrays))

    # Pack and unpack
    @property
    def inputs(self) -> list[str]:
        """The arguments of the operator that hold the arrays."""
        return [self.argument] if self.flat else self.names

    def pack(self, tree: Any) -> Any:
        """The value of the argument: a flat array, or a dictionary of arrays by name."""
        arrays = [np.asarray(array) for array in self.take(tree)]
        shapes = [array.shape for array in arrays]
        if shapes != self.shapes:
            raise ValueError(f"'{self.argument}' holds arrays of shapes {self.shapes}, not {shapes}")
        if not self.flat:
            return dict(zip(self.names, arrays))
        return np.concatenate([np.zeros(0, self.dtype), *(a.ravel() for a in arrays)]).astype(self.dtype)

    def unpack(self, value: Any) -> Any:
        """The inverse of `pack`, for arrays of whatever library."""
        if not self.flat:
            return self.make([value[name] for name in self.names])
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        if tuple(value.shape) != (sum(sizes),):
            raise ValueError(
                f"'{self.argument}' has to be {sum(sizes)} numbers, not of shape {tuple(value.shape)}"
            )
        ends = np.cumsum(sizes)
        pieces = zip(sizes, ends, self.shapes)
        return self.make([value[end - size : end].reshape(shape) for size, end, shape in pieces])


class TreeFunction(Foreign):
    """A function whose arguments are arrays, or trees of them.

    Attributes
    ----------
    f : callable
    arguments : list of str
        The arguments of the function that have derivatives; `ain` are those of the operator.
    trees : dict
        A `Tree` for each argument that is one.
    both_ways : bool
        Whether the library has forward derivatives of this function, as far as is known.
    """

    def __init__(
        self, f: Callable[..., Any], arguments: Sequence[str], aout: Sequence[str], trees: Mapping[str, Tree]
    ) -> None:
        super().__init__()
        self.f, self.arguments, self.aout, self.trees = by_name(f), arguments, aout, trees
        self.ain = [x for name in arguments for x in (trees[name].inputs if name in trees else [name])]
        self.replicated = [x for tree in trees.values() for x in tree.inputs]
        self.name, self.__doc__, self.both_ways = name_of(f), f.__doc__, True

    # Call the function
    def call(self, x: Sequence[Any], others: Mapping[str, Any]) -> tuple[Any, ...]:
        """The results of the function, of arrays of its library in the order of `ain`."""
        values, given = dict(zip(self.ain, x)), {}
        for name in self.arguments:
            tree = self.trees.get(name)
            held = values[name] if tree is None or tree.flat else values
            given[name] = held if tree is None else tree.unpack(held)
        y = self.f(**given, **others)
        # Look at what it has returned
        several = [y.get(name) for name in self.aout] if isinstance(y, dict) else y
        several = tuple(several) if isinstance(several, (tuple, list)) else (several,)
        if len(several) != len(self.aout) or not all(hasattr(part, "dtype") for part in several):
            found = ", ".join(type(part).__name__ for part in several)
            raise TypeError(
                f"{self.name} has to return arrays for {', '.join(self.aout)}, and returned {found}"
            )
        return several

    # Offer to pack and unpack
    def helpers(self) -> dict[str, Callable[..., Any]]:
        """The functions with which the user of an operator packs and unpacks trees."""

        def find(name: str | None) -> Tree:
            wanted = next(iter(self.trees)) if name is None and len(self.trees) == 1 else str(name)
            if wanted not in self.trees:
                raise BadArgument(f"{self.name} has no tree {name!r}" + did_you_mean(wanted, self.trees))
            return self.trees[wanted]

        def flatten(tree: Any, name: str | None = None) -> Any:
            """The flat array of a tree, or the dictionary of its arrays. The name is needed if there are several trees."""
            return find(name).pack(tree)

        def unflatten(value: Any, name: str | None = None) -> Any:
            """The tree of a flat array, or of a dictionary of arrays."""
            return find(name).unpack(value)

        return dict(flatten=flatten, unflatten=unflatten) if self.trees else {}
