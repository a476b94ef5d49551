"""Tests of derivatives, in one line each: the dot-product test, the Taylor test, and a test of
independence of the number of ranks.

`check` verifies an operator (or a model, or a function that builds one) at given inputs.
`BaseScalarTest` and `BaseVectorTest` are bases for test classes, which compare with finite
differences.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray

from .core.error import BadArgument, BrokenPrimitive, ExecutionError, did_you_mean, needed_for
from .core.execution import Plan, Slots, Step, collect, describe
from .core.graph import Graph, Node
from .core.model import Builder, Model, Monitor
from .core.operator import InstanceOperator, Operator, Primitive, ZeroGradient, operator
from .core.symbol import BaseSymbol, List, Value, leaves
from .core.tape import Tape
from .core.valuetypes import ValueType, value_type

# Import what the other tests look into
from .core import declaration
from .core.branches import Branches, UntakenBranch, codes_of, describe_branch
from .core.handover import duplicate
from .core.ownership import with_steps
from .core.runs import Run, current_run

Array = NDArray[Any]
Values = dict[str, Value]  # by the names of variables
Names = str | Collection[str]
Comm = Any  # a communicator of MPI, or None


def inner(a: Value, b: Value, comm: Comm = None) -> float:
    """The real inner product Re sum conj(a) b of two values of a kind, summed in double precision.

    Parameters
    ----------
    a, b : numbers, arrays, lists of these, or values with parts, such as fields; ZeroGradient is
        orthogonal to all
    comm : MPI communicator, optional
        Arrays with axes are partitioned over its ranks: sum over them. Numbers are the same on all
        ranks. A value that knows its own communicator is summed over that one.
    """
    if a is ZeroGradient or b is ZeroGradient:
        return 0.0
    if isinstance(a, (list, tuple)) or isinstance(b, (list, tuple)):
        return sum((inner(p, q, comm) for p, q in zip(a, b, strict=True)), 0.0)
    values = value_type(a)
    # Sum the inner product over the ranks that share the value
    total, own = values.inner(a, b), values.comm(a)
    if own is not None:
        return own.allreduce(total)
    return comm.allreduce(total) if comm is not None and (has_axes(a) or has_axes(b)) else total


def has_axes(x: Value) -> bool:
    return any(numpy.ndim(item) > 0 for item in items_of(x))


def items_of(x: Value) -> Iterator[Value]:
    """Iterate over the numbers and arrays that a value consists of."""
    apart = value_type(x).take_apart(x)
    if apart is None:
        yield x
    else:
        for part in apart[1]:
            yield from items_of(part)


def step(x: Value, h: float, v: Value) -> Value:
    """x + h v"""
    if v is ZeroGradient:
        return x
    if isinstance(x, (list, tuple)):
        return [step(item, h, direction) for item, direction in zip(x, v, strict=True)]
    return value_type(x).step(x, h, v)


def same(x: Value, y: Value) -> bool:
    """Whether two values are equal element by element."""
    x, y = list(items_of(x)), list(items_of(y))
    return len(x) == len(y) and all(map(equal, x, y))


def equal(x: Value, y: Value) -> bool:
    return numpy.array_equal(x, y, equal_nan=numpy.asarray(x).dtype.kind in "fc")


def is_differentiable(x: Value) -> bool:
    return value_type(x).varies(x)


def precisions(*values: Value) -> set[float]:
    """The set of the machine epsilons of the floating point arrays and fields among the values."""
    dtypes = (numpy.dtype(item.dtype) for item in items_of(values) if hasattr(item, "dtype"))
    return {float(numpy.finfo(dtype).eps) for dtype in dtypes if dtype.kind in "fc"}


class Trial:
    """A model that contains the subject, together with values for its inputs.

    Attributes
    ----------
    model : Model
    init : dict
        The values of the inputs.
    given : dict
        The arguments of the subject.
    varied : list of str
        The names of the inputs with respect to which derivatives are tested.
    """

    model: Any
    init: Values
    given: Values
    varied: list[str]

    def __init__(
        self,
        subject: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        comm: Comm = None,
        replicated: Names = (),
        constant: Names = (),
        seed: int = 20,
    ) -> None:
        self.name = getattr(subject, "__name__", None) or repr(subject)
        self.comm, self.seed = comm, seed
        self.replicated, constant = set_of(replicated), set_of(constant)
        # Put the subject into a model
        if isinstance(subject, Graph):
            self.model, self.init = subject, dict(*args, **kwargs)
            check_known(self.name, "input", self.init, subject._inputs)
            self.given = {name: self.init.get(name) for name in subject._inputs}
        else:
            self.init, self.given = {}, {}
            self.model = self._build(subject, args, kwargs, constant)
        names = dict.fromkeys([*self.given, *self.init])
        check_known(self.name, "argument", constant, names)
        check_known(self.name, "argument or result", self.replicated, [*names, *self.model._outputs])
        self.varied = self._varied(constant)
        # Run the model with a tape
        vout = list(self.model._outputs)
        self.out, self.tape = self.model.compute(vout, self.init, return_tape=True, return_dict=True)
        self.results = [name for name in vout if is_differentiable(self.out[name])]
        known = precisions(
            [self.init[name] for name in self.varied], [self.out[name] for name in self.results]
        )
        self.eps = max(known, default=EPS)
        self.uniform = len(known) == 1

    def _build(
        self, subject: Any, args: tuple[Any, ...], kwargs: dict[str, Any], constant: set[str]
    ) -> Builder:
        with Builder() as m:
            # Replace the arguments that vary by inputs
            if isinstance(subject, (Operator, InstanceOperator)):
                if isinstance(subject, InstanceOperator):
                    args = (subject.instance, *args)
                    subject = subject.base
                arguments, places = subject._bind(args, kwargs)
                self.given = dict(arguments)
                for name in subject.ain:
                    if is_differentiable(arguments[name]) and name not in constant:
                        arguments[name] = self._symbols(m, name, arguments[name])
                result = subject(**arguments, **places)
            else:
                bound = bind(self.name, subject, args, kwargs)
                self.given = {**bound.arguments, **bound.kwargs}
                for name, x in bound.arguments.items():
                    if is_differentiable(x) and name not in constant:
                        bound.arguments[name] = self._symbols(m, name, x)
                result = subject(*bound.args, **bound.kwargs)
            if isinstance(result, dict):
                m.output(**result)
            elif isinstance(result, (tuple, list)):
                names = getattr(subject, "aout", [f"y{i}" for i in range(len(result))])
                m.output(**dict(zip(names, result)))
            else:
                m.output(**{next(iter(getattr(subject, "aout", "y"))): result})
        return m

    def _symbols(self, m: Builder, name: str, x: Value) -> BaseSymbol:
        """Inputs of the model `m` in the place of a value: a symbol, or a List of them."""
        if isinstance(x, (list, tuple)):
            return List([self._symbols(m, f"{name}[{i}]", item) for i, item in enumerate(x)])
        self.init[name] = x
        return m.input(name)

    def _varied(self, constant: set[str]) -> list[str]:
        """The names of the inputs that vary; BadArgument, if there are none."""
        varied = [name for name, x in self.init.items() if is_differentiable(x) and name not in constant]
        if not varied:
            given = ", ".join(describe_fixed(name, x, name in constant) for name, x in self.given.items())
            raise BadArgument(
                f"{self.name} has no input that could be varied; expected was a number, an array of numbers, a list "
                f"of these, or a value that consists of such parts, and given was {given or 'nothing'}"
            )
        return varied

    def _direction(self, name: str, x: Value) -> Value:
        partitioned = self.comm is not None and name.strip("_").split("[")[0] not in self.replicated
        rank = 1 + self.comm.rank if partitioned and has_axes(x) else 0
        rng = numpy.random.default_rng([self.seed, rank, *name.encode()])
        return value_type(x).random_like(x, rng)

    def inner(self, name: str, a: Value, b: Value) -> float:
        """The inner product of two derivatives of the variable `name`."""
        return inner(a, b, self.comm_of(name))

    def comm_of(self, name: str) -> Comm:
        """Over which ranks the variable `name` is partitioned, if it has axes."""
        return None if name.split("[")[0] in self.replicated else self.comm

    def norm(self, values: Values) -> float:
        """The norm of a dict of values by the names of their variables."""
        return max(sum(self.inner(name, x, x) for name, x in values.items()), 0.0) ** 0.5

    def tangents(self, mark: str = "_") -> Values:
        """A random tangent for each input that varies, of the size of the value but not larger than one;
        others for another mark."""
        tangents = {}
        for name in self.varied:
            x, v = self.init[name], self._direction(name + mark, self.init[name])
            ratio = self.norm({name: x}) / (self.norm({name: v}) or 1.0)
            tangents[name] = step(v, (min(ratio, 1.0) or 1.0) - 1.0, v)
        return tangents

    def cotangents(self) -> Values:
        return {name: self._direction("_" + name, self.out[name]) for name in self.results}

    def value(self, init: Values, look: Monitor | None = None) -> Values:
        return self.model.compute(self.results, init, return_dict=True, monitor=look)

    def jvp(self, tangents: Values, look: Monitor | None = None) -> Values:
        """Tangents of the results, from tangents of some of the inputs."""
        return self._push(self.tape, tangents, look)

    def _push(self, tape: Tape, tangents: Values, look: Monitor | None = None) -> Values:
        init = {name + "_": tangents.get(name, ZeroGradient) for name in self.model._inputs}
        vout = [name + "_" for name in self.results]
        out = tape.get_jvp().compute(vout, init, return_dict=True, monitor=look)
        return {name: out[name + "_"] for name in self.results}

    def vjp(self, cotangents: Values, look: Monitor | None = None) -> Values:
        """Cotangents of the inputs, from cotangents of some of the results."""
        return self._pull(self.tape, cotangents, look)

    def _pull(self, tape: Tape, cotangents: Values, look: Monitor | None = None) -> Values:
        init = {"_" + name: cotangents.get(name, ZeroGradient) for name in self.model._outputs}
        vout = ["_" + name for name in self.varied]
        out = tape.get_vjp().compute(vout, init, return_dict=True, monitor=look)
        return {name: out["_" + name] for name in self.varied}

    def vjp_at(self, init: Values, cotangents: Values) -> Values:
        """Cotangents of the inputs in another run of the model."""
        _, tape = self.model.compute(list(self.model._outputs), init, return_tape=True)
        return self._pull(tape, cotangents)

    def hvp(self, cotangents: Values, tangents: Values, look: Monitor | None = None) -> Values:
        """The change of the cotangents of the inputs along tangents, at fixed cotangents of the results."""
        init = {name + "_": tangents.get(name, ZeroGradient) for name in self.model._inputs}
        init.update({"_" + name: cotangents.get(name, ZeroGradient) for name in self.model._outputs})
        vout = [f"_{name}_" for name in self.varied]
        out = self.tape.get_hvp().compute(vout, init, return_dict=True, monitor=look)
        return {name: out[f"_{name}_"] for name in self.varied}


EPS = float(numpy.finfo("f8").eps)


def set_of(names: Names) -> set[str]:
    return {names} if isinstance(names, str) else set(names)


def describe_fixed(name: str, x: Value, constant: bool) -> str:
    """An argument that does not vary, and why, if it is not plain to see."""
    kind = type(x)
    known = kind.__module__ in ("builtins", "numpy") or type(value_type(x)) is not ValueType
    if constant:
        why = " (held constant)"
    elif known:
        why = ""
    else:
        why = (
            f", a type whose parts are not known; make them known by a ValueType with a method take_apart, "
            f"which is registered by vmad_lit.core.valuetypes.register({kind.__name__})"
        )
    return f"'{name}': {describe(x)}{why}"


def check_known(subject: str, what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that nobody has."""
    for name in names:
        if name not in known:
            raise BadArgument(f"{subject} has no {what} '{name}'" + did_you_mean(name, known))


def bind(name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a function that builds a model, by name."""
    try:
        return inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise BadArgument(f"{name}: {error}; options of the test are {', '.join(OPTIONS)}") from None


OPTIONS = "truth", "comm", "replicated", "constant", "seed", "rtol", "steps", "allow_zero"


def odd_numbers(x: Value) -> int:
    """How many of the numbers in a value are infinite or NaN, on this rank."""
    floats = [item for item in map(numpy.asarray, items_of(x)) if item.dtype.kind in "fc"]
    return sum(int(numpy.count_nonzero(~numpy.isfinite(item))) for item in floats)


def is_finite(x: Value, comm: Comm = None) -> bool:
    """Whether all numbers in a value are finite, on all ranks that share it; `comm` is as for `inner`."""
    if isinstance(x, (list, tuple)):
        return all([is_finite(item, comm) for item in x])
    own = value_type(x).comm(x) or comm
    odd = odd_numbers(x)
    return (odd if own is None else own.allreduce(odd)) == 0


def first_odd_node(run: Callable[[Monitor], object]) -> str:
    """Words about the first node of a run with a result that is not finite on this rank; none if there is no such node."""
    found = ""

    def look(node: Node, _: Any, varout: Any, context: Any) -> None:
        nonlocal found
        names = [getattr(symbol, "_name", "") for result in varout.values() for symbol in leaves(result)]
        if not found and any(odd_numbers(context.get(name)) for name in names):
            filename, line = node.place
            where = f", built at {filename}:{line}" if filename != __file__ else ""
            found = f", first after {node.name}{where}"

    run(look)
    return found


def assert_finite(
    trial: Trial, Jv: Values | None = None, JTw: Values | None = None, Hv: Values | None = None
) -> None:
    """Assert that results and derivatives at the point of a trial are finite. Collective.

    `Jv`, `JTw` and `Hv` are derivatives along `trial.tangents()` and `trial.cotangents()`, as far as they are known.
    """
    v, w = trial.tangents(), trial.cotangents()
    questions: list[tuple[str, Values | None, Callable[[Monitor], object]]] = [
        (
            "value of",
            {name: trial.out[name] for name in trial.results},
            lambda look: trial.value(trial.init, look),
        ),
        ("tangent of the result", Jv, lambda look: trial.jvp(v, look)),
        ("cotangent of the input", JTw, lambda look: trial.vjp(w, look)),
        ("change of the cotangent of the input", Hv, lambda look: trial.hvp(w, v, look)),
    ]
    for what, values, run in questions:
        for name, x in (values or {}).items():
            if not is_finite(x, trial.comm_of(name)):
                # Say that there is nothing to test
                odd = [name for name in trial.varied if not is_finite(trial.init[name], trial.comm_of(name))]
                where = f", as is the input '{odd[0]}'" if odd else first_odd_node(run)
                raise AssertionError(
                    f"{trial.name}: the {what} '{name}' is not finite at this point{where}; it can be tested only where values and "
                    "derivatives are finite"
                )


def assert_finite_nearby(trial: Trial, r: Remainders) -> None:
    """Assert that the steps of an expansion lead to finite values."""
    odd = r.steps[~numpy.isfinite(r.first)]
    if len(odd):
        raise beyond(trial, max(odd))


def beyond(trial: Trial, h: float) -> AssertionError:
    """The error of a test that has come to the end of where its subject is defined."""
    return AssertionError(
        f"{trial.name}: at x + h v, with h={h:.1e}, values or derivatives are not finite, or too large to be squared; "
        "it can be tested only at a distance from such points (or with smaller steps=)"
    )


def check_dot_product(
    subject: Any,
    *args: Any,
    comm: Comm = None,
    replicated: Names = (),
    constant: Names = (),
    seed: int = 20,
    rtol: float | None = None,
    allow_zero: bool = False,
    **kwargs: Any,
) -> tuple[float, float]:
    """Assert that jvp and vjp multiply with the same Jacobian: <w, J v> = <J^T w, v> for random v and w.

    Parameters
    ----------
    subject : operator, function that builds a model out of symbols, or model
    *args, **kwargs
        The arguments with which the subject is called, at which it is tested. For a model: a dict of
        its inputs.
    comm : MPI communicator, optional
        Arrays with axes are partitioned over its ranks.
    replicated : str or tuple of str
        Names of array variables that, in spite of `comm`, are the same on all ranks.
    constant : str or tuple of str
        Names of inputs that shall not vary.
    rtol : float, optional
        The default depends on the precision of the inputs: 4e-10 for double, 7e-5 for single.
    allow_zero : bool
        Whether a derivative may vanish altogether, which otherwise means that the test has no power.

    Returns
    -------
    tuple of float
        The two sides, for all inputs and results together.
    """
    trial = Trial(subject, args, kwargs, comm, replicated, constant, seed)
    return dot_products(trial, rtol, allow_zero)


def check_rtol(rtol: Any) -> None:
    """Refuse a tolerance with which everything or nothing passes."""
    if rtol is not None and not 0 < rtol < 1:
        raise BadArgument(f"rtol is a number between 0 and 1, got {rtol!r}")


def dot_products(trial: Trial, rtol: float | None = None, allow_zero: bool = False) -> tuple[float, float]:
    check_rtol(rtol)
    v, w = trial.tangents(), trial.cotangents()
    rtol = trial.eps**0.6 if rtol is None else rtol
    Jv, JTw = trial.jvp(v), trial.vjp(w)
    assert_finite(trial, Jv, JTw)
    left, right, scale = both_sides(trial, v, w, Jv, JTw)
    # Compare the two sides for each input and each result
    pushed = {name: trial.jvp({name: v[name]}) for name in trial.varied}
    pulled = {name: trial.vjp({name: w[name]}) for name in trial.results}
    for x in trial.varied:
        for y in trial.results:
            bound = max(
                trial.norm({y: w[y]}) * trial.norm({y: pushed[x][y]}),
                trial.norm({x: pulled[y][x]}) * trial.norm({x: v[x]}),
            )
            there = trial.inner(y, w[y], pushed[x][y])
            back = trial.inner(x, pulled[y][x], v[x])
            assert_equal_products(trial, x, y, there, back, rtol * bound + trial.eps * scale)
    assert_equal_products(trial, "all inputs", "all results", left, right, rtol * scale)
    if scale == 0 and not allow_zero:
        raise AssertionError(f"{trial.name}: all derivatives vanish here, so that this test proves nothing")
    return left, right


def both_sides(trial: Trial, v: Values, w: Values, Jv: Values, JTw: Values) -> tuple[float, float, float]:
    """<w, J v> and <J^T w, v>, and how large they could be."""
    left = sum(trial.inner(y, w[y], Jv[y]) for y in trial.results)
    right = sum(trial.inner(x, JTw[x], v[x]) for x in trial.varied)
    return left, right, max(trial.norm(w) * trial.norm(Jv), trial.norm(JTw) * trial.norm(v))


def assert_equal_products(trial: Trial, x: str, y: str, left: float, right: float, allowed: float) -> None:
    if not abs(left - right) <= allowed:
        raise AssertionError(
            f"{trial.name}: jvp and vjp disagree on d({y})/d({x}): "
            f"<w, J v> = {left:.12g} and <J^T w, v> = {right:.12g}; "
            f"they differ by {abs(left - right):.3g}, expected at most {allowed:.3g}"
        )


Remainders = namedtuple("Remainders", "steps, zeroth, first, floor")

Remainders.__doc__ = """Remainders of Taylor's expansion, |f(x + h v) - f(x)| and
|f(x + h v) - f(x) - h J v| for steps h, and their rounding errors."""


def taylor_remainders(
    subject: Any,
    *args: Any,
    steps: Sequence[float] | Array | None = None,
    comm: Comm = None,
    replicated: Names = (),
    constant: Names = (),
    seed: int = 20,
    **kwargs: Any,
) -> Remainders:
    """Compute the remainders of Taylor's expansion in a random direction, for `check_taylor` and for
    plotting."""
    return remainders(Trial(subject, args, kwargs, comm, replicated, constant, seed), steps)


def remainders(
    trial: Trial, steps: Sequence[float] | Array | None = None, only: str | None = None
) -> Remainders:
    v = {name: v for name, v in trial.tangents().items() if only in (None, name)}
    return expand(trial, trial.value, trial.out, trial.jvp(v), trial.init, v, steps)


def expand(
    space: Trial,
    function: Callable[[Values], Values],
    y: Values,
    Jv: Values,
    x: Values,
    v: Values,
    steps: Sequence[float] | Array | None = None,
) -> Remainders:
    """Remainders of `function` at the dict of values `x` in the direction `v`; `space` knows norms
    and rounding."""
    if steps is not None:
        check_steps(steps)
    else:
        steps = (1e-2 * 0.25 ** numpy.arange(6)) if space.eps < 1e-10 else 0.1 * 0.5 ** numpy.arange(5)
    # Take smaller and smaller steps
    stretched = sensitivity(space, x, v, Jv)
    zeroth, first, floor = [], [], []
    for h in map(float, steps):
        shifted = function({**x, **{name: step(x[name], h, direction) for name, direction in v.items()}})
        change = {name: step(shifted[name], -1.0, y[name]) for name in Jv}
        rest = {name: step(change[name], -h, Jv[name]) for name in Jv}
        zeroth.append(space.norm(change))
        first.append(space.norm(rest))
        floor.append(32 * space.eps * (space.norm(shifted) + stretched))
    return Remainders(numpy.asarray(steps), numpy.array(zeroth), numpy.array(first), numpy.array(floor))


def sensitivity(space: Trial, x: Values, v: Values, Jv: Values) -> float:
    """The norm of the change of a result for a change of inputs as large as these are (or as v, if that is larger)."""
    relative = space.norm({name: x[name] for name in v}) / (space.norm(v) or 1.0)
    return space.norm(Jv) * max(1.0, relative)


def check_steps(steps: Any) -> None:
    """Refuse steps from which no slope can be read: it takes two slopes, and smaller and smaller steps."""
    h = numpy.asarray(steps)
    if h.ndim != 1 or h.dtype.kind not in "iuf" or len(h) < 3:
        raise BadArgument(f"steps are at least three numbers, so that there are two slopes; got {steps!r}")
    if not (numpy.isfinite(h).all() and (h > 0).all() and (numpy.diff(h) < 0).all()):
        raise BadArgument(f"steps are positive, and each is smaller than the one before; got {steps!r}")


def rates_of(r: Remainders, which: str = "first") -> Array:
    """The slopes between successive steps; infinite where the remainder is mere rounding."""
    R = getattr(r, which)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        rates = numpy.log(R[:-1] / R[1:]) / numpy.log(r.steps[:-1] / r.steps[1:])
    return numpy.where(R[1:] <= r.floor[1:], numpy.inf, rates)


def converges(r: Remainders, order: float) -> bool:
    """Whether the remainder falls at the rate `order`, as far as two rates can be told from rounding."""
    if not numpy.isfinite(r.first).all():
        return False
    above = r.first[1:] > r.floor[1:]
    ratios = (r.first[:-1] + r.floor[:-1])[above] / (r.first[1:] - r.floor[1:])[above]
    rates = numpy.log(ratios) / numpy.log(r.steps[:-1] / r.steps[1:])[above]
    return len(rates) < 2 or bool(rates[-1] > order - 0.25) or bool(numpy.median(rates) > order - 0.1)


def describe_slopes(r: Remainders, order: float, remainder: str = "|f(x + h v) - f(x) - h J v|") -> str:
    rows = ", ".join(f"h={h:.1e}: {R:.3e}" for h, R in zip(r.steps, r.first))
    slopes = ", ".join(f"{rate:.2f}" for rate in rates_of(r))
    return f"the remainder {remainder} falls with slopes {slopes}, expected {order} ({rows})"


def check_taylor(
    subject: Any,
    *args: Any,
    steps: Sequence[float] | Array | None = None,
    comm: Comm = None,
    replicated: Names = (),
    constant: Names = (),
    seed: int = 20,
    order: float = 2,
    allow_zero: bool = False,
    **kwargs: Any,
) -> Array:
    """Assert that the tangent is the derivative: |f(x + h v) - f(x) - h J v| falls as h squared.

    Parameters are those of `check_dot_product`, and

    steps : sequence of float, optional
        Decreasing step sizes, relative to a direction that is about as large as the inputs, but not
        larger than one.
    order : float
        The slope that is expected.

    Returns
    -------
    array
        The slopes between successive steps; infinite where the remainder is mere rounding.
    """
    trial = Trial(subject, args, kwargs, comm, replicated, constant, seed)
    return taylor_rates(trial, steps, order, allow_zero)


def taylor_rates(
    trial: Trial, steps: Sequence[float] | Array | None = None, order: float = 2, allow_zero: bool = False
) -> Array:
    v = trial.tangents()
    Jv = trial.jvp(v)
    assert_finite(trial, Jv)
    r = expand(trial, trial.value, trial.out, Jv, trial.init, v, steps)
    assert_finite_nearby(trial, r)
    if not converges(r, order):
        # Find the inputs whose tangents are wrong
        wrong = [name for name in trial.varied if not converges(remainders(trial, steps, only=name), order)]
        raise AssertionError(
            f"{trial.name}: the jvp is not the derivative with respect to "
            f"{', '.join(wrong or trial.varied)}; " + describe_slopes(r, order)
        )
    # Refuse to pass a test without power
    if not allow_zero and trial.norm(Jv) == 0:
        raise AssertionError(f"{trial.name}: all derivatives vanish here, so that this test proves nothing")
    check_power(trial, r, v, Jv)
    return rates_of(r)


def check_power(trial: Trial, r: Remainders, v: Values, Jv: Values) -> None:
    """Refuse a test in which all changes are lost in rounding, unless the derivative is mere rounding, too."""
    value = trial.norm({name: trial.out[name] for name in Jv})
    if sensitivity(trial, trial.init, v, Jv) > 1000 * trial.eps * value and not (r.zeroth > r.floor).any():
        raise AssertionError(
            f"{trial.name}: the steps are so small that all changes are lost in rounding, and this test proves "
            "nothing; larger ones can be given as steps="
        )


def check_gradient(
    objective: Any,
    *args: Any,
    gradient: Callable[..., Any] | None = None,
    steps: Sequence[float] | Array | None = None,
    comm: Comm = None,
    replicated: Names = (),
    constant: Names = (),
    seed: int = 20,
    order: float = 2,
    **kwargs: Any,
) -> Array:
    """Assert that a gradient is the derivative of a real scalar objective, by the Taylor test.

    Parameters are those of `check_taylor`, and

    gradient : callable, optional
        If given, objective and gradient are plain functions of numbers; the gradient takes the same
        arguments, and returns the cotangent of the only argument, or a sequence of those of all
        arguments. Otherwise the gradient is the vjp of a model.

    Returns
    -------
    array
        The slopes between successive steps; infinite where the remainder is mere rounding.
    """
    # Find the objective and its gradient
    if gradient is None:
        trial = Trial(objective, args, kwargs, comm, replicated, constant, seed)
        (y,) = trial.results
        g = trial.vjp({y: 1.0})
    else:
        y = "y"
        trial = Numeric(objective, args, kwargs, comm, replicated, constant, seed)
        g = trial.gradient(gradient)
    # Refuse an objective that is no real number
    value = trial.out[y]
    if numpy.ndim(value) != 0 or isinstance(value, complex):
        raise BadArgument(
            f"the objective is not a real number but {type(value).__name__} of shape {numpy.shape(value)}"
        )
    # Expand the objective along a direction
    assert_finite(trial, JTw=g)
    v = trial.tangents()
    slope = sum(trial.inner(name, g[name], v[name]) for name in v)
    r = expand(trial, trial.value, trial.out, {y: slope}, trial.init, v, steps)
    assert_finite_nearby(trial, r)
    if not converges(r, order):
        raise AssertionError(
            f"{trial.name}: the gradient is not the derivative of the objective; " + describe_slopes(r, order)
        )
    check_power(trial, r, v, {y: slope})
    return rates_of(r)


class Numeric(Trial):
    """A plain function of numbers on trial."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        comm: Comm,
        replicated: Names,
        constant: Names,
        seed: int,
    ) -> None:
        self.name = getattr(function, "__name__", None) or repr(function)
        self.comm, self.seed, self.replicated = comm, seed, set_of(replicated)
        self.function, self.kwargs = function, kwargs
        self.init = self.given = {f"x{i}": x for i, x in enumerate(args)}
        self.varied = self._varied(set_of(constant))
        self.out, self.results = self.value(self.init), ["y"]
        self.eps = max(precisions(list(self.init.values())), default=EPS)

    def value(self, init: Values, look: Monitor | None = None) -> Values:
        return {"y": self.function(*init.values(), **self.kwargs)}

    def gradient(self, gradient: Callable[..., Any]) -> Values:
        g = gradient(*self.init.values(), **self.kwargs)
        return dict(zip(self.init, [g] if len(self.init) == 1 else g, strict=True))

    def vjp(self, cotangents: Values, look: Monitor | None = None) -> Values:
        """Nothing: there are no nodes to look at."""
        return {}


def check_second_order(
    subject: Any,
    *args: Any,
    steps: Sequence[float] | Array | None = None,
    comm: Comm = None,
    replicated: Names = (),
    constant: Names = (),
    seed: int = 20,
    rtol: float | None = None,
    **kwargs: Any,
) -> Array:
    """Assert that hvp is the derivative of vjp: |g(x + h v) - g(x) - h H v| falls as h squared, and
    <u, H v> = <H u, v>, for the gradient g at a fixed random cotangent and random u and v.

    Parameters are those of `check_dot_product` and `check_taylor`.

    Returns
    -------
    array
        The slopes between successive steps; infinite where the remainder is mere rounding, as for a
        subject that is linear.

    Raises
    ------
    BrokenPrimitive
        An operator of the subject offers no hvp.
    """
    return second_order_rates(Trial(subject, args, kwargs, comm, replicated, constant, seed), steps, rtol)


def second_order_rates(
    trial: Trial, steps: Sequence[float] | Array | None = None, rtol: float | None = None
) -> Array:
    u, v, w = trial.tangents("__"), trial.tangents(), trial.cotangents()
    g, Hu, Hv = trial.vjp(w), trial.hvp(w, u), trial.hvp(w, v)
    for name in trial.varied:
        check_fits(trial, f"change of the cotangent of the input '{name}'", Hv[name], trial.init[name])
    assert_finite(trial, JTw=g, Hv=Hv)
    r = expand(trial, lambda init: trial.vjp_at(init, w), g, Hv, trial.init, v, steps)
    assert_finite_nearby(trial, r)
    if not converges(r, 2):
        raise AssertionError(
            f"{trial.name}: the hvp is not the derivative of the vjp; "
            + describe_slopes(r, 2, "|g(x + h v) - g(x) - h H v|")
        )
    # Look whether the Hessian is symmetric
    left = sum(trial.inner(x, u[x], Hv[x]) for x in trial.varied)
    right = sum(trial.inner(x, Hu[x], v[x]) for x in trial.varied)
    rtol = trial.eps**0.6 if rtol is None else rtol
    rounding = 32 * trial.eps * trial.norm(g)
    scale = max(trial.norm(u) * trial.norm(Hv), trial.norm(Hu) * trial.norm(v))
    allowed = rtol * scale + rounding * trial.norm(u)
    if not abs(left - right) <= allowed:
        raise AssertionError(
            f"{trial.name}: the hvp is not symmetric: <u, H v> = {left:.12g} and <H u, v> = {right:.12g}; "
            f"they differ by {abs(left - right):.3g}, expected at most {allowed:.3g}"
        )
    # Look whether parts of the Hessian make up the whole
    by_input = [trial.hvp(w, {name: v[name]}) for name in trial.varied]
    by_result = [trial.hvp({name: w[name]}, v) for name in trial.results]
    for parts, what in (by_input, "tangent"), (by_result, "cotangent"):
        rest = dict(Hv)
        for part in parts:
            rest = {name: step(rest[name], -1.0, part[name]) for name in rest}
        if len(parts) > 1 and not trial.norm(rest) <= rtol * sum(map(trial.norm, parts)) + rounding:
            raise AssertionError(f"{trial.name}: the hvp of one {what} at a time does not sum to that of all")
    return rates_of(r)


def offered_second_order_rates(
    trial: Trial, steps: Sequence[float] | Array | None = None, rtol: float | None = None
) -> Array | None:
    """The slopes of the second-order test, or None if an operator does not offer its hvp."""
    try:
        return second_order_rates(trial, steps, rtol)
    except BrokenPrimitive as error:
        if "has no hvp" not in str(error):
            raise
        return None


@contextmanager
def other_steps(change: Callable[[Step, Plan], Step]) -> Iterator[None]:
    """A context in which models run with `change(step, plan)` in the place of each step of a node."""
    before = Model.runner

    def run(plan: Plan, *args: Any) -> Any:
        def wrap(step: Step) -> Step:
            return step if step[1] is None else change(step, plan)

        return before(with_steps(plan, wrap), *args)

    Model.runner = staticmethod(run)
    try:
        yield
    finally:
        Model.runner = staticmethod(before)


def disown(step: Step, plan: Plan) -> Step:
    """The same step, with a node that owns nothing."""
    function, node, *others = step
    return (function, node.stand_in(node.used), *others) if node.donated else step


Made = list[tuple[Operator, Array]]
Described = list[tuple[str, Array]]  # arrays, and what they are


class Onlooker:
    """Watches whether the results of nodes are whose they are said to be.

    Parameters
    ----------
    name : str
        Of the subject, for messages.
    earlier : list of (operator, array)
        Fresh results of an earlier run, which nobody but us has now; those of this one go into `made`.
    """

    def __init__(self, name: str, earlier: Sequence[tuple[Operator, Array]] = ()) -> None:
        self.name, self.earlier = name, earlier
        self.made: Made = []

    def watch(self, step: Step, plan: Plan) -> Step:
        operator, kind = step[1].operator, step[1].primitive.kind
        promises = operator.fresh and kind in ("apl", "vjp") or hands_on(step[1])
        return (look, step[1], step, self, plan) if promises else step

    # Compare a result with other arrays
    def compare(self, node: Node, what: str, array: Array, others: Described) -> None:
        """Assert that a result is what its operator declares."""
        operator = node.operator
        earlier = [("what another run got", x) for other, x in self.earlier if other is operator]
        for whose, other in others if hands_on(node) else [*others, *earlier]:
            if numpy.shares_memory(array, other):
                word = "an alias of a cotangent" if hands_on(node) else "fresh"
                raise AssertionError(
                    f"{self.name}: {what} of {node.primitive.name} is declared to be {word}, "
                    f"and shares memory with {whose}"
                )
        if not hands_on(node):
            self.made.append((operator, array))


def hands_on(node: Node) -> bool:
    """Whether a node may return its cotangent as the only one that is wanted."""
    return node.operator.alias and node.primitive.kind == "vjp" and len(node.used) == 1


def look(slots: Slots, step: Step) -> None:
    """The step that runs another one, and looks whose the results are."""
    _, node, inner, onlooker, plan = step
    others = [] if hands_on(node) else arrays_given(node, plan, slots)
    others += arrays_recorded(node, plan.base, slots)
    inner[0](slots, inner)
    if node.primitive.kind == "apl":
        others += arrays_recorded(node, plan, slots)
    for name, symbol in node.varout.items():
        for array in arrays_in(slots[plan._slots[symbol]]) if symbol in plan._slots else ():
            onlooker.compare(node, f"the result '{name}'", array, others)
            others.append((f"the result '{name}'", array))


def arrays_in(x: Value) -> list[Array]:
    """The arrays in a value: itself, that of a field, or those of the items of a list."""
    items = (getattr(item, "value", item) for item in items_of(x))
    return [item for item in items if isinstance(item, numpy.ndarray)]


def arrays_given(node: Node, plan: Plan, slots: Slots) -> Described:
    """The arrays that go into a node and are not its own, with what they are."""
    return [
        (f"the argument '{name}'", array)
        for name, symbol in node.varin.items()
        if not node.owns(name)
        for array in arrays_in(plan._value(symbol, slots))
    ]


def arrays_recorded(node: Node, plan: Plan | None, slots: Slots) -> Described:
    """The arrays on a tape that belong to a node, or to the original of a derived one, with what they are."""
    records: dict[Any, Any] = plan.records if plan else {}
    record = records.get(node, records.get(node.forward, {}))
    if type(record) is int:
        values = slots[record] or {}
    else:
        extras = node.operator.extras if node.primitive.kind == "apl" else record
        values = {name: collect(slots, record[name]) for name in extras if name in record}
    return [
        (f"'{name}' of the record", array)
        for name, value in values.items()
        if not node.owns(name)
        for array in arrays_in(value)
    ]


def prove_ownership(trial: Trial) -> None:
    """Assert that operators keep what they declare about arrays, see `check_ownership`."""
    operators = [node.operator for node in trial.model]
    if not any(operator.fresh or operator.alias or operator.inplace for operator in operators):
        return
    with other_steps(disown):
        truth = run_and_sweep(trial)
    earlier: Made = []
    for give in False, True:
        onlooker = Onlooker(trial.name, earlier)
        with other_steps(onlooker.watch):
            found = run_and_sweep(trial, give)
        for what, got, expected in zip(("result", "result", "cotangent"), found, truth):
            assert_unchanged(trial, what, got, expected)
        earlier = onlooker.made


def run_and_sweep(trial: Trial, give: bool = False) -> tuple[Values, Values, Values]:
    """The results of a run, those of one with a tape, and the cotangents of the inputs by a sweep that is the last.

    All that goes in is given away, or else asserted to be left alone.
    """
    names, w = list(trial.model._outputs), trial.cotangents()
    init, given = copies(trial.init), copies(trial.init)
    out, _ = trial.model._run(names, init, donated=tuple(init) if give else ())
    recorded, tape = trial.model._run(names, given, record=True, donated=tuple(given) if give else ())
    # Sweep over a tape that is consumed
    before = copies(recorded)
    tape.consume()
    cotangents = copies({name: w.get(name, ZeroGradient) for name in names}, "_")
    pulled, _ = tape.get_vjp()._run(
        ["_" + name for name in trial.varied], cotangents, donated=tuple(cotangents) if give else ()
    )
    if not give:
        assert_same(trial, "one of its cotangents", {name: cotangents["_" + name] for name in w}, w)
    assert_same(trial, "one of its results in the sweep", recorded, before)
    if not give:
        assert_same(trial, "one of its inputs", init, trial.init)
        assert_same(trial, "one of its inputs", given, trial.init)
    return tuple({name: y[name] for name in trial.results} for y in (out, recorded)) + (pulled,)


def copies(values: Values, prefix: str = "") -> Values:
    return {prefix + name: value_type(x).copy(x) for name, x in values.items()}


def assert_same(trial: Trial, what: str, now: Values, before: Values) -> None:
    if not same(list(now.values()), list(before.values())):
        raise AssertionError(f"{trial.name} changed {what} in place")


def assert_unchanged(trial: Trial, what: str, got: Values, expected: Values) -> None:
    """Assert that values are what they are when nothing is overwritten."""
    scale = trial.norm({name.removeprefix("_"): x for name, x in expected.items()})
    for name, x in expected.items():
        rest = trial.norm({name.removeprefix("_"): step(got[name], -1.0, x)})
        if not rest <= trial.eps**0.8 * scale:
            raise AssertionError(
                f"{trial.name}: the {what} '{name}' is another one when arrays are given away: "
                "an operator overwrites what is still needed"
            )


def check_ownership(
    subject: Any,
    *args: Any,
    comm: Comm = None,
    replicated: Names = (),
    constant: Names = (),
    seed: int = 20,
    **kwargs: Any,
) -> None:
    """Assert that operators keep what they declare about arrays: `fresh`, `alias` and `inplace`.

    A fresh result shares memory with no argument, no record and no other result; a cotangent that is an
    alias with nothing but the cotangent that came in; and results and cotangents are the same whether
    arguments are given away or not. What declares nothing passes.

    Parameters are those of `check_dot_product`.
    """
    with blaming(getattr(subject, "__name__", None) or repr(subject)):
        prove_ownership(Trial(subject, args, kwargs, comm, replicated, constant, seed))


def primitives_of(graph: Graph) -> Iterator[Primitive]:
    """The functions of the operators in a model that nobody vouches for, also of those inside of other operators."""
    for node in graph:
        operator, inside = node.operator, node.operator.model_of(node)
        if inside is not None:
            yield from primitives_of(inside)
        if not operator.trusted:
            yield from (
                p
                for p in (operator.apl, operator.vjp, operator.jvp, operator.hvp)
                if isinstance(p, Primitive)
            )


def tell_branches(trial: Trial, branches: Branches) -> None:
    """Warn about decisions in the functions of operators that went only one way."""
    for code, line in branches.untaken():
        message = f"{trial.name}: this test saw only one side of {describe_branch(code, line)}; check the other side, too"
        warnings.warn(message, UntakenBranch, stacklevel=3)


def prove_tapes(trial: Trial, v: Values, w: Values) -> None:
    """Assert that a sweep needs nothing but its tape: two tapes give what each gives alone."""
    points = [trial.init, nearby(trial, v)]
    alone = [trial._pull(tape_of(trial, init), w) for init in points]
    if not all([is_finite(x, trial.comm_of(name)) for name, x in alone[1].items()]):
        raise beyond(trial, NEARBY)
    for tape, expected in zip([tape_of(trial, init) for init in points], alone):
        # Compare the cotangents of this tape with those expected
        got, scale = trial._pull(tape, w), trial.norm(expected)
        rest = trial.norm({name: step(got[name], -1.0, x) for name, x in expected.items()})
        if not rest <= trial.eps**0.8 * scale:
            raise AssertionError(
                f"{trial.name}: the vjp of one run is another one after a second run; something that the derivative "
                "needs is kept outside of the tape"
            )


NEARBY = 1e-3


def nearby(trial: Trial, v: Values) -> Values:
    """Values of the inputs that are a little away from those of the trial."""
    return trial.init | {name: step(trial.init[name], NEARBY, x) for name, x in v.items()}


def tape_of(trial: Trial, init: Values) -> Tape:
    """The tape of a run of its own."""
    tape: Tape = trial.model.compute(list(trial.model._outputs), init, return_tape=True)[1]
    return tape


def prove_second_run(trial: Trial, v: Values, w: Values, rtol: float | None) -> None:
    """Assert that jvp and vjp agree after a second run as well, elsewhere, where no value of the first helps."""
    tape = tape_of(trial, nearby(trial, v))
    Jv, JTw = trial._push(tape, v), trial._pull(tape, w)
    left, right, scale = both_sides(trial, v, w, Jv, JTw)
    if not abs(left - right) <= (trial.eps**0.6 if rtol is None else rtol) * scale:
        raise AssertionError(
            f"{trial.name}: jvp and vjp agree in the first run and not in a second one, at other values; "
            "something that a derivative needs is kept from the first"
        )


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """A context in which an operator that does what it must not fails its test."""
    before, declaration.FIRST_CALLS = declaration.FIRST_CALLS, sys.maxsize
    try:
        yield
    except ExecutionError as error:
        raise AssertionError(f"{name}: {error}") from error
    finally:
        declaration.FIRST_CALLS = before


def same_as_before(given: Iterable[Value]) -> Callable[[], bool]:
    """A function that tells whether some values are still what they are now."""
    now = [(x, value_type(x).copy(x)) for x in given if is_differentiable(x)]
    return lambda: all(same(x, copy) for x, copy in now)


@contextmanager
def check_recomputation(comm: Comm = None, rtol: float | None = None) -> Iterator[None]:
    """A context in which what is computed again, in `forgetful` operators and chains, is compared with the first time.

    Parameters
    ----------
    comm : MPI communicator, optional
        Of the ranks that run the models together: if it happens on one of them, all raise the error.
    rtol : float, optional
        The largest difference, relative to the largest element; by default 1000 times the rounding error.

    Raises
    ------
    AssertionError
        An operator did something else the second time; names the first one that did.
    """
    memory = Memory(rtol)
    with other_steps(memory.watch):
        yield
    # Raise the same error on all ranks
    found = [memory.found] if comm is None else comm.allgather(memory.found)
    for rank, message in enumerate(found):
        if message:
            raise AssertionError(message if len(found) == 1 else f"on rank {rank}: {message}")


class Memory:
    """Remembers the results of nodes, by the places of their runs, and finds one that is not the same again."""

    def __init__(self, rtol: float | None) -> None:
        self.rtol = rtol
        self.found = ""
        self._results: dict[Any, Value] = {}

    def watch(self, step: Step, plan: Plan) -> Step:
        return step if plan.base else (run_and_compare, step[1], step, self, plan)

    def compare(self, run: Run, node: Node, name: str, value: Value) -> None:
        key = *run.whereabouts, node.number, name
        if key not in self._results:
            self._results[key] = duplicate(value)
        elif not self.found and not is_close(value, self._results[key], self.rtol):
            self.found = (
                f"{node.name_and_place}, is not the same when it is computed again: '{name}' is "
                f"{describe(value)} that differs; random numbers come back if they are drawn from node.rng"
            )


def run_and_compare(slots: Slots, step: Step) -> None:
    """The step that runs another one, and compares its results with those of the first time."""
    _, node, inner, memory, plan = step
    inner[0](slots, inner)
    for name, symbol in node.varout.items():
        for i, leaf in enumerate(leaves(symbol)):
            if leaf in plan._slots:
                of_list = f"{name}[{i}]" if isinstance(symbol, List) else name
                memory.compare(current_run(), node, of_list, slots[plan._slots[leaf]])


def is_close(x: Value, y: Value, rtol: float | None) -> bool:
    """Whether two values are equal up to rounding."""
    return all(differ_by_rounding(p, q, rtol) for p, q in zip(items_of(x), items_of(y)))


def differ_by_rounding(x: Value, y: Value, rtol: float | None) -> bool:
    if not is_differentiable(x):
        return not isinstance(x, (str, int, numpy.ndarray)) or same(x, y)
    if numpy.shape(x) != numpy.shape(y):
        return False
    rtol = 1000 * max(precisions(x, y), default=float(numpy.finfo("f8").eps)) if rtol is None else rtol
    atol = rtol * numpy.max(numpy.abs(y), initial=0.0)
    return numpy.allclose(x, y, rtol=0, atol=atol, equal_nan=True)


Report = namedtuple("Report", "value, rates, products, second")

Report.__doc__ = """What `check` saw: the value, the slopes of the Taylor test, the two sides of the
dot-product test, and the slopes of the Taylor test of the gradient, or None if an operator offers no
hvp."""


def check(
    subject: Any,
    *args: Any,
    truth: Any = None,
    comm: Comm = None,
    replicated: Names = (),
    constant: Names = (),
    seed: int = 20,
    rtol: float | None = None,
    steps: Sequence[float] | Array | None = None,
    allow_zero: bool = False,
    **kwargs: Any,
) -> Report:
    """Verify an operator, a model, or a function that builds a model, at given inputs.

    The value is compared with the truth, the jvp with the value by the Taylor test, the vjp with the
    jvp by the dot-product test, and the hvp, where it is offered, with the vjp by `check_second_order`;
    derivatives must fit their values in shape, in being real, and in precision; inputs, tangents and
    cotangents must not be changed; a sweep must need nothing but its tape; and what is declared about arrays
    must be true, see `check_ownership`. A decision in the functions of an operator that went only one way is
    reported by a warning, `UntakenBranch`.

    Parameters are those of `check_dot_product`, and

    truth : callable or value, optional
        What the value should be: a function that is called with the same arguments, or the value
        itself (for several results, a sequence).
    steps : sequence of float, optional
        Step sizes of the Taylor test.

    A hyper-parameter of the subject whose name is taken here can be given by position.

    Returns
    -------
    Report
    """
    # Remember what was given
    given = [
        x
        for value in (*args, *kwargs.values())
        for x in (value.values() if isinstance(value, dict) else [value])
    ]
    unchanged = same_as_before(given)
    with blaming(getattr(subject, "__name__", None) or repr(subject)):
        trial = Trial(subject, args, kwargs, comm, replicated, constant, seed)
        if truth is not None:
            # Compare the value with the truth
            expected = truth(*args, **kwargs) if callable(truth) else truth
            names = list(trial.model._outputs)
            for name, y in zip(names, [expected] if len(names) == 1 else expected, strict=True):
                check_value(trial, name, trial.out[name], y)
        branches = Branches(codes_of(primitives_of(trial.model)))
        with branches.watched():
            rates, products, second = prove(trial, rtol, steps, allow_zero)
    if not unchanged():
        raise AssertionError(f"{trial.name} changed one of its inputs in place")
    tell_branches(trial, branches)
    values = [trial.out[name] for name in trial.model._outputs]
    return Report(values[0] if len(values) == 1 else values, rates, products, second)


def prove(trial: Trial, rtol: float | None, steps: Any, allow_zero: bool) -> tuple[Any, Any, Any]:
    """Assert all that `check` does about a subject, but its value; returns what it saw."""
    v, w = trial.tangents(), trial.cotangents()
    # Look at what derivatives look like
    left_alone = same_as_before([*v.values(), *w.values()])
    trial.value(trial.init)
    Jv, JTw = trial.jvp(v), trial.vjp(w)
    for name in trial.results:
        check_fits(trial, f"tangent of the result '{name}'", Jv[name], trial.out[name])
    for name in trial.varied:
        check_fits(trial, f"cotangent of the input '{name}'", JTw[name], trial.init[name])
    assert_finite(trial, Jv, JTw)
    if not left_alone():
        raise AssertionError(f"{trial.name} changed a tangent or cotangent in place")
    prove_tapes(trial, v, w)
    rates = taylor_rates(trial, steps, allow_zero=allow_zero)
    products = dot_products(trial, rtol, allow_zero)
    prove_second_run(trial, v, w, rtol)
    second = offered_second_order_rates(trial, steps, rtol)
    prove_ownership(trial)
    return rates, products, second


def check_value(trial: Trial, name: str, value: Value, expected: Value) -> None:
    """Assert that a result is what it should be."""
    if isinstance(expected, (list, tuple)):
        for i, (item, y) in enumerate(zip(value, expected, strict=True)):
            check_value(trial, f"{name}[{i}]", item, y)
        return
    tolerance = dict(rtol=trial.eps**0.8, atol=trial.eps**0.8)
    for item, y in zip(items_of(value), items_of(expected), strict=True):
        if numpy.shape(item) != numpy.shape(y):
            raise AssertionError(
                f"{trial.name}: '{name}' has shape {numpy.shape(item)}, expected {numpy.shape(y)}"
            )
        message = f"{trial.name}: the value of '{name}'"
        numpy.testing.assert_allclose(item, y, **tolerance, err_msg=message)


def check_fits(trial: Trial, what: str, derivative: Value, value: Value) -> None:
    """Assert that a tangent or cotangent has the shape of its value, is real if it is, and has the
    same precision."""
    if derivative is ZeroGradient:
        return
    if isinstance(value, (list, tuple)):
        if len(derivative) != len(value):
            raise AssertionError(
                f"{trial.name}: the {what} is a list of {len(derivative)}, expected {len(value)}"
            )
        for item, x in zip(derivative, value):
            check_fits(trial, what, item, x)
    elif value_type(value).take_apart(value) is not None:
        # Compare the parts of a derivative with those of the value
        if value_type(derivative) is not value_type(value):
            raise AssertionError(
                f"{trial.name}: the {what} is a {type(derivative).__name__}, expected a {type(value).__name__}"
            )
        for part, x in zip(items_of(derivative), items_of(value), strict=True):
            check_fits(trial, what, part, x)
    else:
        # Compare shape, kind and precision
        if numpy.shape(derivative) != numpy.shape(value):
            raise AssertionError(
                f"{trial.name}: the {what} has shape {numpy.shape(derivative)}, expected {numpy.shape(value)}"
            )
        if numpy.iscomplexobj(derivative) and not numpy.iscomplexobj(value):
            raise AssertionError(f"{trial.name}: the {what} is complex, and the value is real")
        has_dtypes = hasattr(value, "dtype") and hasattr(derivative, "dtype")
        if trial.uniform and has_dtypes and value.dtype.kind in "fc":
            if precisions(derivative) != precisions(value):
                raise AssertionError(
                    f"{trial.name}: the {what} has dtype {derivative.dtype}, and the value {value.dtype}"
                )


def check_rank_invariance(function: Callable[[Any], Any], comm: Comm = None, rtol: float = 1e-9) -> float:
    """Assert that `function(comm)` does not depend on the number of ranks.

    Parameters
    ----------
    function : callable
        Takes a communicator; returns a number, an array that is the same on all ranks, a field, or a
        list, tuple or dict of these. It is called with `comm`, and by each rank with COMM_SELF.
    comm : MPI communicator
        The default is COMM_WORLD.
    rtol : float
        What is allowed of a difference, relative to the largest element.

    Returns
    -------
    float
        The largest relative difference, on any rank.
    """
    with needed_for("check_rank_invariance", extra="mpi"):
        from mpi4py import MPI

    comm = MPI.COMM_WORLD if comm is None else comm
    # Compute it on all ranks together, and on each alone
    together = collected(function(comm))
    alone = collected(function(MPI.COMM_SELF))
    worst = max(comm.allgather(difference(together, alone)))
    if not worst <= rtol:
        raise AssertionError(
            f"{getattr(function, '__name__', function)}: the result on {comm.size} ranks differs from "
            f"that on one, relatively by {worst:.3g}, expected at most {rtol:.3g}"
        )
    return worst


def collected(x: Value) -> list[Array]:
    """A result as a flat list of arrays; a partitioned value is gathered from all ranks."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [array for item in x for array in collected(item)]
    return value_type(x).gather(x)


def difference(a: Sequence[Array], b: Sequence[Array]) -> float:
    """The largest difference between two lists of arrays, relative to the largest element of each array."""
    worst = 0.0
    if len(a) != len(b):
        return numpy.inf
    for p, q in zip(a, b):
        if p.shape != q.shape:
            return numpy.inf
        if p.size:
            gap = numpy.abs(p - q).max() / (max(numpy.abs(p).max(), numpy.abs(q).max()) or 1.0)
            worst = max(worst, float(gap) if numpy.isfinite(gap) else numpy.inf)
    return worst


class FiniteDifferenceTest:
    """What `BaseScalarTest` and `BaseVectorTest` have in common."""

    x: Any = numpy.arange(10)
    rtol = 1e-6
    atol = 1e-10
    epsilon: float
    m: Builder

    def setup(self) -> None:
        """Build the model, and evaluate it and its derivatives."""

    def inner(self, a: Value, b: Value) -> Any:
        """The inner product of a cotangent and a tangent; override it for values other than real arrays."""
        return numpy.sum(a * b)

    def model(self, x: Any) -> Any:
        """Build the model: from the symbol `x` to the symbol of the result. Override it."""
        return x

    def setup_method(self, method: object = None) -> None:
        self.setup()

    def _differences(self, directions: Iterable[Value]) -> list[Any]:
        """Central finite differences along the directions."""
        differences = []
        for x_ in directions:
            left = self.m.compute("y", dict(x=self.x - x_ * (self.epsilon * 0.5)))
            right = self.m.compute("y", dict(x=self.x + x_ * (self.epsilon * 0.5)))
            differences.append((right - left) / self.epsilon)
        if numpy.allclose(differences, 0):
            raise AssertionError("this test has no power, since all derivatives vanish at this point")
        return differences

    def _assert_close(self, what: str, got: Value, expected: Value) -> None:
        if numpy.size(got) != numpy.size(expected):
            raise AssertionError(f"{what} has shape {numpy.shape(got)}, expected {numpy.shape(expected)}")
        numpy.testing.assert_allclose(got, expected, rtol=self.rtol, atol=self.atol, err_msg=what)


class BaseVectorTest(FiniteDifferenceTest):
    """Compare value, jvp and vjp of a model from an array `x` to an array `y` with finite differences.

    Attributes
    ----------
    x : array
    y : array, or callable
        The expected result, or a function of `x` that gives it.
    x_bases, y_bases : lists of arrays, optional
        Tangents and cotangents to be tested; by default all unit vectors.
    epsilon : float
        The step of the finite differences.
    """

    y: Any = FiniteDifferenceTest.x
    x_bases: Any = None
    y_bases: Any = None
    epsilon = 1e-7

    def setup(self) -> None:
        if callable(self.y):
            self.y = self.y(self.x)
        with Builder() as self.m:
            self.m.output(y=self.model(self.m.input("x")))
        self.x_bases = unit_vectors(self.x) if self.x_bases is None else self.x_bases
        self.y_bases = unit_vectors(self.y) if self.y_bases is None else self.y_bases
        self.finite_jvp = self._differences(self.x_bases)
        self._evaluated_y, self.tape = self.m.compute("y", dict(x=self.x), return_tape=True)

    def test_opr(self) -> None:
        numpy.testing.assert_allclose(self._evaluated_y, self.y, rtol=self.rtol, atol=self.atol)

    def test_jvp_finite(self) -> None:
        jvp = self.tape.get_jvp()
        for i, (x_, y_) in enumerate(zip(self.x_bases, self.finite_jvp)):
            self._assert_close(f"the jvp along direction {i}", jvp.compute("y_", dict(x_=x_)), y_)

    def test_vjp_finite(self) -> None:
        vjp = self.tape.get_vjp()
        for j, _y in enumerate(self.y_bases):
            _x = vjp.compute("_x", dict(_y=_y))
            for i, (x_, y_) in enumerate(zip(self.x_bases, self.finite_jvp)):
                what = f"the vjp of cotangent {j} along direction {i}"
                self._assert_close(what, self.inner(_x, x_), self.inner(_y, y_))


def unit_vectors(x: ArrayLike) -> list[Array]:
    """All arrays of the shape of `x` with one element 1 and the others 0."""
    x = numpy.asarray(x)
    return [row.reshape(x.shape).copy() for row in numpy.eye(x.size)]


@operator
class squared_norm:
    """The sum of the squares of the moduli of the elements of an array."""

    ain = "x"
    aout = "y"

    def apl(node, x):
        return numpy.sum(numpy.real(x * numpy.conj(x)))

    def vjp(node, _y, x):
        return 2 * _y * x

    def jvp(node, x_, x):
        return 2 * numpy.sum(numpy.real(numpy.conj(x) * x_))

    def hvp(node, _y, x_):
        return 2 * _y * x_


class BaseScalarTest(FiniteDifferenceTest):
    """Compare value, jvp and vjp of the squared norm of a model with finite differences.

    Attributes
    ----------
    x : value of any kind
    x_ : list of values
        Directions.
    y : number
        The expected squared norm; NotImplemented if it is not known.
    to_scalar : operator
        The squared norm of the result.
    epsilon : float
        The step of the finite differences.
    """

    y: Any = sum(FiniteDifferenceTest.x**2)
    x_: Any = numpy.eye(10)
    to_scalar: Any = squared_norm
    epsilon = 1e-3

    def setup(self) -> None:
        with Builder() as self.m:
            result = self.model(self.m.input("x"))
            self.m.output(y=type(self).to_scalar(result))
        self.y_ = self._differences(self.x_)
        _, self.tape = self.m.compute("y", dict(x=self.x), return_tape=True)

    def test_opr(self) -> None:
        y = self.m.compute("y", dict(x=self.x))
        if self.y is not NotImplemented:
            numpy.testing.assert_allclose(y, self.y, rtol=self.rtol, atol=self.atol)

    def test_jvp_finite(self) -> None:
        jvp = self.tape.get_jvp()
        for i, (x_, y_) in enumerate(zip(self.x_, self.y_)):
            self._assert_close(f"the jvp along direction {i}", jvp.compute("y_", dict(x_=x_)), y_)

    def test_vjp_finite(self) -> None:
        _x = self.tape.get_vjp().compute("_x", dict(_y=1.0))
        for i, (x_, y_) in enumerate(zip(self.x_, self.y_)):
            self._assert_close(f"the vjp along direction {i}", self.inner(_x, x_), y_)
