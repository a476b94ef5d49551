"""Functions of other libraries as operators: what they have in common.

Arguments and results are given to such a function as lists of plain arrays, and derivatives are asked for in the same
way. What a value of a model is besides its array, such as a field on a mesh, is taken off before and put on again afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vmad_lit import operator
from vmad_lit.core.error import BadArgument
from vmad_lit.core.operator import Operator, ZeroGradient
from vmad_lit.core.placement import Placement, Site, elementwise
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Value
from vmad_lit.core.together import any_rank, raise_together
from vmad_lit.core.valuetypes import value_type

Arrays = list[Array]
MaybeArrays = list[Any]  # arrays, or None for what is known to be zero
Others = dict[str, Any]  # hyper-parameters, by name
ENOUGH = 1e3  # times the rounding, for two ways to compute the same


class Foreign:
    """A function of arrays with its derivatives, in the hands of another library.

    Attributes
    ----------
    name : str
    ain, aout : list of str
        The names of the arguments that have derivatives, and of the results.
    replicated : list of str
        Arguments that are the same on all ranks wherever the others live: parameters.
    """

    name = "function"
    ain: Sequence[str]
    aout: Sequence[str]
    replicated: Sequence[str] = ()

    def __init__(self) -> None:
        self.seen: set[Any] = set()  # shapes of meshes for which it was looked at

    # What is asked of a foreign function
    def value(self, x: Arrays, others: Others) -> Arrays:
        """The results."""
        raise NotImplementedError

    def pull(self, x: Arrays, others: Others, cotangents: MaybeArrays) -> Arrays:
        """The cotangents of all arguments, in the convention ``dL = sum Re(conj(_x) dx)``."""
        raise NotImplementedError

    def push(self, x: Arrays, others: Others, tangents: MaybeArrays) -> Arrays:
        """The tangents of the results."""
        raise NotImplementedError

    def bend(self, x: Arrays, others: Others, cotangents: MaybeArrays, tangents: MaybeArrays) -> Arrays:
        """The derivative of `pull` along tangents of the arguments."""
        raise NotImplementedError

    # Say where the results live
    def where(self, site: Site) -> Placement | None:
        """Where the results live: where the arguments do. Beside these, parameters are the same on all ranks."""
        spread = [place for place in site.placed if place.kind == "partitioned"]
        for name in self.ain if spread else ():
            parameter = name in self.replicated
            if site.given.get(name) is None and (parameter or any(place.field for place in spread)):
                site.implied[name] = "replicated" if parameter else None
        return elementwise(site)


def read_signature(
    function: Callable[..., Any], signature: str | None
) -> tuple[list[str], list[str], dict[str, inspect.Parameter]]:
    """Names of arguments, names of results, and hyper-parameters: what is left of the function's own parameters.

    The `signature` is of the form ``"x, params -> y"``; without it all parameters that have no default are
    arguments, and the result is ``y``.
    """
    # Ask the function for its parameters
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise BadArgument(
            f"{function!r} does not tell its parameters; wrap it into a def that names them"
        ) from None
    if isinstance(function, np.ufunc):
        parameters = {name: p for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY}
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    fixed = {name: p for name, p in parameters.items() if p.kind not in variable}
    left, arrow, right = ("", "", "y") if signature is None else signature.partition("->")
    if signature is not None and not (left.strip() and right.strip()):
        raise BadArgument(f'a signature looks like "x, y -> z", not {signature!r}')
    ain = names_of(left) if arrow else [name for name, p in fixed.items() if p.default is p.empty]
    for name in ain:
        if name not in parameters and len(fixed) == len(parameters):
            raise BadArgument(
                f"{name_of(function)} has no parameter {name!r}; it has {', '.join(parameters)}"
            )
    # One without a default comes first
    hyper = sorted((p for p in fixed.values() if p.name not in ain), key=lambda p: p.default is not p.empty)
    return ain, names_of(right), {p.name: p for p in hyper}


def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which takes all its arguments by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]

    def call(**given: Any) -> Any:
        return function(*[given.pop(name) for name in positional if name in given], **given)

    return call if positional else function


def names_of(spec: str | Iterable[str]) -> list[str]:
    """Names from a list, or from a string with commas."""
    return [name.strip() for name in spec.split(",")] if isinstance(spec, str) else list(spec)


def name_of(function: Any) -> str:
    """What a function, or a module, is called."""
    name = str(getattr(function, "__name__", type(function).__name__))
    return name if name.isidentifier() else "function"


def bare(name: str, x: Value) -> Array:
    """The array of numbers of a value, floating-point or complex."""
    apart = None if isinstance(x, (list, tuple)) else value_type(x).take_apart(x)
    if apart is not None and len(apart[1]) == 1:
        x = apart[1][0]
    elif apart is not None or not isinstance(x, (int, float, complex, np.ndarray, np.generic)):
        raise TypeError(f"{name} has to be a number, an array or a field, not a {type(x).__name__}")
    array = np.asarray(x)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{name} has to be an array of numbers, not of {array.dtype}")
    return native(array) if array.dtype.kind in "fc" else array.astype(float)


def native(array: Array) -> Array:
    """The array with its bytes in the order of this machine."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def like(field: Value, array: Array) -> Value:
    """A field like another one, with these numbers."""
    apart: Any = value_type(field).take_apart(field)
    return apart[0]([array])


class Dressed:
    """Values of a model as arrays, and the way back.

    Attributes
    ----------
    arrays : list of array
        The numbers of each value.
    field : value or None
        The first value that is partitioned and knows it: results become values like it.
    """

    def __init__(self, name: str, names: Sequence[str], values: Sequence[Value]) -> None:
        self.name, self.values = name, values
        self.arrays = [bare(f"'{n}' of {name}", x) for n, x in zip(names, values)]
        self.spread = [value_type(x).whole(x) is not None for x in values]
        self.field = next((x for x, spread in zip(values, self.spread) if spread), None)

    def results(self, names: Sequence[str], arrays: Arrays) -> dict[str, Value]:
        """Results by name; beside a field they are fields like it."""
        if self.field is None:
            return {name: array[()] if array.ndim == 0 else array for name, array in zip(names, arrays)}
        shape = bare("a field", self.field).shape
        for name, array in zip(names, arrays):
            if array.shape != shape:
                raise ValueError(
                    f"{self.name} is given fields, of which this rank has {shape}, and returns '{name}' of shape "
                    f"{array.shape}: it has to return a number for each point"
                )
        return {name: like(self.field, array) for name, array in zip(names, arrays)}

    def weighted(self, cotangents: MaybeArrays) -> MaybeArrays:
        """Cotangents of results, as those of plain arrays would be."""
        w = None if self.field is None else weights_of(self.field)
        return cotangents if w is None else [None if a is None else a * w for a in cotangents]

    def derivatives(self, arrays: Arrays) -> list[Value]:
        """Cotangents of plain arrays as those of the values, each of the type of its value."""
        w = None if self.field is None else weights_of(self.field)
        return [
            like(x, a if w is None else a / w) if spread else a[()] if a.ndim == 0 else a
            for x, spread, a in zip(self.values, self.spread, arrays)
        ]


def weights_of(x: Value) -> Any:
    """What the inner product gives to the numbers of a field of half-stored modes; None where all count once."""
    array = bare("a field", x)
    if array.dtype.kind != "c" or value_type(x).whole(x) is None:
        return None
    ones = like(x, np.ones_like(array))
    return value_type(x).weighted_parts(ones)[0].real


def check_points(foreign: Foreign, x: Dressed, others: Others, y: dict[str, Value]) -> None:
    """Raise ValueError on all ranks if a function of fields mixes their points. Looked at once for each mesh. Collective."""
    if x.field is None or value_type(x.field).whole(x.field) in foreign.seen:
        return
    kept = np.random.default_rng(0).random(bare("a field", x.field).shape) < 0.5
    changed = [
        np.where(kept, array, array.flat[0]) if spread and array.size else array
        for array, spread in zip(x.arrays, x.spread)
    ]
    differs, error = not all(map(np.array_equal, changed, x.arrays)), None
    for name, again in zip(y, foreign.value(changed, others) if differs else []):
        before = bare("a field", y[name])
        tolerance = ENOUGH * float(np.finfo(before.dtype).eps)
        # Complain about mixed points
        if not np.allclose(again[kept], before[kept], tolerance, tolerance, equal_nan=True):
            error = ValueError(
                f"{foreign.name} is given fields, and its result at a point depends on other points; what mixes points, "
                "such as a mean or a convolution, needs those on other ranks too: see vmad_lit.lib.fastpm"
            )
    comm = value_type(x.field).comm(x.field)
    raise_together(comm, error)
    if any_rank(comm, differs):
        foreign.seen.add(value_type(x.field).whole(x.field))


def operator_of(
    foreign: Foreign,
    hyper: Mapping[str, inspect.Parameter],
    helpers: Mapping[str, Callable[..., Any]] | None = None,
    second: bool = True,
    **attributes: Any,
) -> Operator:
    """The operator of a foreign function, with its `hyper`-parameters.

    `helpers` become attributes of the operator, `attributes` those of its class. It has second derivatives if `second`.
    """
    ain, aout = list(foreign.ain), list(foreign.aout)
    n, m = len(ain), len(aout)

    def meet(given: Sequence[Value]) -> tuple[Dressed, Others]:
        return Dressed(foreign.name, ain, given[:n]), dict(zip(hyper, given[n:]))

    # Compute, and pull, push and bend
    def apl(node: Any, *given: Value) -> dict[str, Value]:
        x, others = meet(given)
        y = x.results(aout, foreign.value(x.arrays, others))
        check_points(foreign, x, others, y)
        return y

    def vjp(node: Any, *given: Value) -> dict[str, Value]:
        x, others = meet(given[m:])
        _y = x.weighted(bare_derivatives(x, given[:m]))
        _x = x.derivatives(foreign.pull(x.arrays, others, _y))
        return dict(zip(("_" + name for name in ain), _x))

    def jvp(node: Any, *given: Value) -> dict[str, Value]:
        x, others = meet(given[n:])
        y_ = foreign.push(x.arrays, others, bare_derivatives(x, given[:n]))
        return x.results([name + "_" for name in aout], y_)

    def hvp(node: Any, *given: Value) -> dict[str, Value]:
        x, others = meet(given[m + n :])
        _y = x.weighted(bare_derivatives(x, given[:m]))
        x_ = bare_derivatives(x, given[m : m + n])
        _x_ = x.derivatives(foreign.bend(x.arrays, others, _y, x_))
        return dict(zip((f"_{name}_" for name in ain), _x_))

    # Declare the class
    cotangents, tangents = ["_" + name for name in aout], [name + "_" for name in ain]
    functions: dict[str, Any] = {}
    for function, names in (apl, []), (vjp, cotangents), (jvp, tangents), (hvp, cotangents + tangents):
        function.__signature__ = signature_of([*names, *ain], hyper)  # type: ignore[attr-defined]
        functions[function.__name__] = function
    if not second:
        functions["hvp"] = None
    attributes = dict(ain=ain, aout=aout, placements=foreign.where, __doc__=foreign.__doc__) | attributes
    attributes |= functions | {name: staticmethod(helper) for name, helper in (helpers or {}).items()}
    return operator(type(foreign.name, (), attributes))


def signature_of(names: Iterable[str], hyper: Mapping[str, inspect.Parameter]) -> inspect.Signature:
    """The signature of a function of an operator: the node, names, and hyper-parameters with their defaults."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("node", *names)]
    return inspect.Signature(
        [*parameters, *(p.replace(kind=kind, annotation=p.empty) for p in hyper.values())]
    )


def bare_derivatives(dressed: Dressed, values: Iterable[Value]) -> MaybeArrays:
    """Tangents or cotangents as arrays; None for those that are zero."""
    return [None if x is ZeroGradient else bare(f"a derivative of {dressed.name}", x) for x in values]
