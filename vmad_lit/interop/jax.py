"""JAX: its functions as operators, and our models as its functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from vmad_lit.core.error import BadArgument, did_you_mean, needed_for
from vmad_lit.core.operator import Operator
from vmad_lit.interop.foreign import (
    Arrays,
    MaybeArrays,
    Others,
    name_of,
    native,
    operator_of,
    read_signature,
)
from vmad_lit.interop.trees import Tree, TreeFunction


def library() -> Any:
    """JAX, or an error that says how to install it."""
    with needed_for("functions of JAX", extra="interop"):
        import jax
    return jax


def double_precision(arrays: Iterable[Any]) -> AbstractContextManager[Any]:
    """A context in which JAX computes in double precision if one of the arrays is of it; else it is left as it is set."""
    jax = library()
    if not any(array is not None and array.dtype.char in "dD" for array in arrays):
        return nullcontext()
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return import_module("jax.experimental").enable_x64(True)


def conjugated(arrays: Iterable[Any]) -> list[Any]:
    """Cotangents in the other convention: JAX's pair with tangents as ``Re sum _x dx``, ours as ``Re sum conj(_x) dx``."""
    return [None if a is None else a.conj() if a.dtype.kind == "c" else a for a in arrays]


class Fixed(NamedTuple):
    """What a compiled function has been compiled for, besides shapes: hyper-parameters, and whether there are forward derivatives."""

    others: tuple[tuple[str, Any], ...]
    both_ways: bool


class JaxFunction(TreeFunction):
    """A function of JAX, with its derivatives, compiled once for each shape."""

    def __init__(
        self, f: Callable[..., Any], arguments: Sequence[str], aout: Sequence[str], trees: Mapping[str, Tree]
    ) -> None:
        jax = library()
        super().__init__(f, arguments, aout, trees)
        functions = dict(value=self.run, pull=self.run_pull, push=self.run_push, bend=self.run_bend)
        self.compiled = {kind: jax.jit(f, static_argnums=0) for kind, f in functions.items()}

    # Write the derivatives for JAX
    def run(self, fixed: Fixed, arrays: Any, x: Sequence[Any]) -> tuple[Any, ...]:
        """The results, as JAX traces them."""
        return self.call(x, dict(fixed.others) | arrays)

    def run_pull(self, fixed: Fixed, arrays: Any, x: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        """The cotangents of the arguments, in JAX's convention."""
        jax = library()
        y, back = jax.vjp(lambda *x: self.run(fixed, arrays, x), *x)
        return back(tuple(as_derivative(c, part) for c, part in zip(cotangents, y)))

    def run_push(self, fixed: Fixed, arrays: Any, x: Sequence[Any], tangents: Sequence[Any]) -> Any:
        """The tangents of the results."""
        jax = library()
        tangents = tuple(as_derivative(t, part) for t, part in zip(tangents, x))
        if fixed.both_ways:
            return jax.jvp(lambda *x: self.run(fixed, arrays, x), tuple(x), tangents)[1]
        y = jax.eval_shape(lambda *x: self.run(fixed, arrays, x), *x)
        zeros = [jax.numpy.zeros(part.shape, part.dtype) for part in y]
        return jax.vjp(lambda *c: self.run_pull(fixed, arrays, x, c), *zeros)[1](tangents)

    def run_bend(self, fixed: Fixed, arrays: Any, x: Sequence[Any], cotangents: Any, tangents: Any) -> Any:
        """The derivative of `run_pull` along tangents."""
        jax = library()
        tangents = tuple(as_derivative(t, part) for t, part in zip(tangents, x))
        pull = lambda *x: self.run_pull(fixed, arrays, x, cotangents)  # noqa: E731
        if fixed.both_ways:
            return jax.jvp(pull, tuple(x), tangents)[1]
        return jax.vjp(pull, *x)[1](tangents)

    # Answer the engine
    def compute(self, kind: str, x: Arrays, others: Others, *derivatives: Sequence[Any]) -> Arrays:
        """Call a compiled function. What it returns is read-only, and shares its memory with nobody."""
        arrays = {
            n: native(v) if isinstance(v, np.ndarray) else v for n, v in others.items() if hasattr(v, "dtype")
        }
        refuse_long(self.name, [*x, *arrays.values()])
        fixed = Fixed(
            tuple((name, value) for name, value in others.items() if name not in arrays), self.both_ways
        )
        # Refuse what cannot be a key
        try:
            hash(fixed)
        except TypeError:
            raise TypeError(
                f"a hyper-parameter of {self.name} is neither an array nor hashable: {fixed.others!r}"
            ) from None
        with double_precision(x):
            results = self.compiled[kind](fixed, arrays, tuple(x), *map(tuple, derivatives))
            results = [np.asarray(array) for array in results]
        # JAX may hand an argument through as a result
        return [y.copy() if any(np.may_share_memory(y, a) for a in x) else y for y in results]

    def value(self, x: Arrays, others: Others) -> Arrays:
        """The results."""
        return self.compute("value", x, others)

    def pull(self, x: Arrays, others: Others, cotangents: MaybeArrays) -> Arrays:
        """The cotangents of the arguments."""
        return conjugated(self.compute("pull", x, others, conjugated(cotangents)))

    def push(self, x: Arrays, others: Others, tangents: MaybeArrays) -> Arrays:
        """The tangents of the results."""
        return self.forwards("push", x, others, tangents)

    def bend(self, x: Arrays, others: Others, cotangents: MaybeArrays, tangents: MaybeArrays) -> Arrays:
        """The derivative of `pull` along tangents."""
        return conjugated(self.forwards("bend", x, others, conjugated(cotangents), tangents))

    def forwards(self, kind: str, x: Arrays, others: Others, *derivatives: Sequence[Any]) -> Arrays:
        """Call a function that has forward derivatives, or find another way if it has none."""
        try:
            return self.compute(kind, x, others, *derivatives)
        except TypeError as error:
            if not self.both_ways or "custom_vjp" not in str(error):
                raise
        self.both_ways = False
        return self.compute(kind, x, others, *derivatives)


def as_derivative(derivative: Any, value: Any) -> Any:
    """A tangent or cotangent of the type of its value, zeros for None."""
    return library().numpy.zeros_like(value) if derivative is None else derivative.astype(value.dtype)


def refuse_long(name: str, arrays: Iterable[Any]) -> None:
    """Raise TypeError if one of the arrays is of more than double precision."""
    for array in arrays:
        if array.dtype.char in ("g", "G"):
            raise TypeError(
                f"JAX has no numbers of more than double precision, and {name} is given {array.dtype}"
            )


def word(key: Any) -> str:
    """One step of the path to an array in a tree of JAX."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name", "__class__") if hasattr(key, name)))


def from_jax(
    f: Callable[..., Any],
    signature: str | None = None,
    like: Mapping[str, Any] | None = None,
    parameters: str = "flat",
) -> Operator:
    """An operator of a function of JAX arrays, with first derivatives in both modes and second ones.

    Parameters
    ----------
    f :
        function that JAX can trace, of arrays and of trees of arrays, that returns an array, or a tuple or
        dictionary of them.
    signature : str
        names of the arguments that have derivatives, and of the results, ``"x, params -> y"``. What is left of the
        parameters of f are hyper-parameters: arrays, or hashable values. By default all parameters without a
        default, and ``y``.
    like : dict
        for each argument that holds parameters, one that looks like it: an array, or a tree (nested dictionaries, lists,
        tuples of arrays). Only what is named here is known to be the same on all ranks.
    parameters : str
        "flat" if such a tree is one flat array, "named" if each of its arrays is an argument of the operator,
        named by its path.

    Returns
    -------
    Operator
        Its `flatten(tree)` makes the value of a tree (or dictionary of values), `unflatten` the tree. Values keep
        their precision. Fields are taken point by point, trees are the same on all ranks.
    """
    jax = library()
    ain, aout, hyper = read_signature(f, signature)
    # Look at the trees
    trees = {}
    for name, example in (like or {}).items():
        if name not in ain:
            raise BadArgument(f"{name_of(f)} has no argument '{name}'" + did_you_mean(name, ain))
        pairs, structure = jax.tree_util.tree_flatten_with_path(example)
        paths = ["_".join(map(word, path)) for path, _ in pairs]
        make = partial(jax.tree_util.tree_unflatten, structure)
        trees[name] = Tree(name, paths, example, jax.tree_util.tree_leaves, make, parameters)
    function = JaxFunction(f, ain, aout, trees)
    return operator_of(function, hyper, helpers=function.helpers())


import warnings
from collections.abc import Collection

from vmad_lit.core.stdlib.operators import Array
from vmad_lit.interop.host import Host, host_of


def with_derivatives(host: Host) -> Callable[..., Any]:
    """A function of JAX that calls a host for its value and its derivatives."""
    jax = library()

    # Call a host from a program of JAX
    def ask(kind: str, looks: Arrays, run: Any, *lists: Any) -> tuple[tuple[Any, ...], Any]:
        """A node of JAX that calls the host, and what it returns: arrays that look like these, and the number of the run."""
        dtypes = [jax.dtypes.canonicalize_dtype(array.dtype) for array in looks]
        shapes = tuple(jax.ShapeDtypeStruct(array.shape, dtype) for array, dtype in zip(looks, dtypes))

        # Call back
        def call(run: Any, *lists: Any) -> tuple[tuple[Array, ...], Any]:
            if kind == "forward":
                arrays, run = host.start(*lists)
            else:
                arrays = host.ask(kind, *lists, run=run)
            return tuple(np.asarray(a, dtype) for a, dtype in zip(arrays, dtypes)), np.int32(run)

        number = jax.ShapeDtypeStruct((), np.int32)
        return jax.pure_callback(call, (shapes, number), run, *lists, vmap_method="sequential")

    # Differentiate once
    function: Any = jax.custom_vjp(lambda x: ask("value", host.outputs, np.int32(0), x)[0])
    recorded: Any = jax.custom_vjp(lambda x: ask("forward", host.outputs, np.int32(0), x))

    def forward(x: Any) -> Any:
        y, run = recorded(x)
        return y, (x, jax.lax.stop_gradient(run))

    def recorded_forward(x: Any) -> Any:
        y, run = recorded(x)
        return (y, run), (x, run)

    def backward(kept: Any, cotangents: Any) -> Any:
        x, run = kept
        return (pull(x, run, tuple(conjugated(cotangents)))[0],)

    function.defvjp(forward, backward)
    recorded.defvjp(recorded_forward, lambda kept, cotangents: backward(kept, cotangents[0]))

    # Differentiate twice
    def pulled(x: Any, run: Any, cotangents: Any) -> Any:
        _x, run = ask("pull", host.inputs, run, x, cotangents)
        return tuple(conjugated(_x)), run

    pull: Any = jax.custom_vjp(pulled)

    def pull_forward(x: Any, run: Any, cotangents: Any) -> Any:
        _x, run = pull(x, run, cotangents)
        return (_x, run), (x, run, cotangents)

    def pull_backward(kept: Any, tangents: Any) -> Any:
        x, run, cotangents = kept
        bent, run = ask("bend", host.inputs, run, x, cotangents, tangents[0])
        pushed, _ = ask("push", host.outputs, run, x, tangents[0])
        return tuple(conjugated(bent)), None, tuple(conjugated(pushed))

    pull.defvjp(pull_forward, pull_backward)

    # Take arguments by position and by name
    def call(*args: Any, **kwargs: Any) -> Any:
        given = host.arrange(args, kwargs)
        x = [jax.numpy.asarray(native(a) if isinstance(a, np.ndarray) else a) for a in given]
        host.check([a.shape for a in x])
        kinds = [jax.dtypes.canonicalize_dtype(array.dtype) for array in host.inputs]
        y = function(tuple(a.astype(kind) for a, kind in zip(x, kinds)))
        return y[0] if len(y) == 1 else y

    call.host, call.flat = host, getattr(host, "flat", None)  # type: ignore[attr-defined]
    return call


def to_jax(
    subject: Any,
    like: Any,
    inputs: Collection[str] | None = None,
    outputs: Collection[str] | None = None,
    gather: bool = True,
    tapes: int = 4,
) -> Callable[..., Any]:
    """A function of JAX of a model, an operator, or the objective of a problem of ours.

    It can be compiled, mapped, and differentiated in reverse mode, twice (``jax.jacrev(jax.jacrev(f))``): JAX calls us
    back for values and derivatives.

    Parameters
    ----------
    subject :
        a problem, a model, or an operator.
    like :
        of a problem, the vector to begin with; of others a dictionary with a value of the right shape and type for
        each input, and values of hyper-parameters. What are fields among them are given by JAX as this rank's array.
    inputs, outputs :
        names of the inputs that become arguments (the others stay as in `like`), by default all that can vary, and of the
        outputs; of a model or an operator.
    gather :
        of a problem on many ranks, whether each rank has the whole flat array, see
        :class:`~vmad_lit.contrib.optimize.FlatProblem`, which is the attribute `flat` of the function.
    tapes :
        how many runs are kept whose derivatives have not been asked for yet, such as those of a batch. A tape is as large
        as all that the model computes. What is asked of a run that was given up runs the model again.

    Returns
    -------
    function
        of arrays, by position or by name, that returns an array, or a tuple if there are several outputs. In double
        precision only where JAX is told so (``jax.config.update("jax_enable_x64", True)``); else it warns.
        On many ranks all have to call it, and one at a time.
    """
    jax = library()
    host = host_of(subject, like, inputs, outputs, gather, tapes)
    refuse_long("the model", [*host.inputs, *host.outputs])
    # Warn of single precision
    doubles = any(array.dtype.char in "dD" for array in (*host.inputs, *host.outputs))
    if doubles and not jax.config.jax_enable_x64:
        warnings.warn(
            'JAX rounds to single precision, and this is a model in double: jax.config.update("jax_enable_x64", True) '
            "at the start of the program keeps it",
            stacklevel=2,
        )
    return with_derivatives(host)
