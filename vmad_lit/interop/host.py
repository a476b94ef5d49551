"""Our models and problems as functions of plain arrays, for other libraries to call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from threading import RLock
from typing import Any

import numpy as np

from vmad_lit import Builder
from vmad_lit.contrib.optimize import FlatProblem, Problem
from vmad_lit.core.arguments import whole_number
from vmad_lit.core.error import BadArgument, did_you_mean
from vmad_lit.core.graph import Graph
from vmad_lit.core.operator import InstanceOperator, Operator, ZeroGradient
from vmad_lit.core.placement import find_door
from vmad_lit.core.symbol import Value
from vmad_lit.core.tape import Tape
from vmad_lit.core.together import any_rank
from vmad_lit.core.valuetypes import value_type
from vmad_lit.interop.foreign import Arrays, MaybeArrays, bare, like, names_of, weights_of


class Kept:
    """What is kept of a run: its point, what its derivatives need, and whether they have been asked for."""

    def __init__(self, point: Arrays, what: Any) -> None:
        self.point, self.what, self.asked = point, what, False


LAST = 2**31 - 1  # the number of a run fits into four bytes


class Host:
    """Functions of lists of arrays, one call at a time.

    Attributes
    ----------
    names, vout : list of str
        The inputs and the outputs.
    inputs, outputs : list of array
        Examples of them, whose shapes and types hold.
    comm : communicator or None
        The ranks that have to ask the same together.
    tapes : int
        Of how many runs is kept what their derivatives need.
    """

    names: list[str]
    vout: list[str]
    inputs: Arrays
    outputs: Arrays
    comm: Any = None

    def __init__(self, tapes: int = 4) -> None:
        self.lock, self.tapes = RLock(), whole_number("tapes", tapes, least=1)
        self.runs: dict[int, Kept] = {}
        self.run = self.latest = 0

    # What is asked of a host
    def value(self, x: Arrays) -> Arrays:
        """The outputs."""
        raise NotImplementedError

    def forward(self, x: Arrays) -> Arrays:
        """The outputs, for a caller who will ask for derivatives at the same point."""
        return self.value(x)

    def pull(self, x: Arrays, cotangents: Arrays) -> Arrays:
        """The cotangents of the inputs: ``dL = sum Re(conj(_x) dx)``."""
        raise NotImplementedError

    def push(self, x: Arrays, tangents: Arrays) -> Arrays:
        """The tangents of the outputs."""
        raise NotImplementedError

    def bend(self, x: Arrays, cotangents: Arrays, tangents: Arrays) -> Arrays:
        """The derivative of `pull` along tangents of the inputs."""
        raise NotImplementedError

    # Remember runs
    def keep(self, x: Arrays, what: Any) -> None:
        """Keep what the derivatives at x need."""
        self.runs[self.run] = Kept([array.copy() for array in x], what)

    def kept(self, x: Arrays) -> Any:
        """What was kept in the run that is asked for; None if it has been given up. Collective."""
        found = self.runs.get(self.run)
        if found is not None and not self.run and self.moved(x, found.point):
            found = None
        if found is not None:
            found.asked = True
        return None if found is None else found.what

    def moved(self, x: Arrays, point: Arrays) -> bool:
        """Whether x is another point, on any rank. Collective."""
        other = not all(map(np.array_equal, x, point))
        return other if self.comm is None else any_rank(self.comm, other)

    def make_room(self) -> None:
        """Give up the runs that have been asked for derivatives, and the oldest ones beyond the number to keep."""
        left = [number for number, kept in self.runs.items() if not kept.asked and number != self.run]
        self.runs = {number: self.runs[number] for number in left[max(0, len(left) + 1 - self.tapes) :]}

    # Take a call
    def ask(self, kind: str, *arrays: Sequence[Any], run: int = 0) -> Arrays:
        """Call one of these methods, with arrays of any library and precision; of a `run` by the number from `start`."""
        with self.lock:
            lists = [[np.asarray(a) for a in part] for part in arrays]
            lists[0] = [a.astype(x.dtype, copy=False) for a, x in zip(lists[0], self.inputs)]
            self.run = int(run)
            return getattr(self, kind)(*lists)

    def start(self, x: Sequence[Any]) -> tuple[Arrays, int]:
        """The outputs, and the number of this run, with which a caller asks for derivatives at its point."""
        with self.lock:
            self.latest = self.latest % LAST + 1
            return self.ask("forward", x, run=self.latest), self.latest

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise ValueError unless arrays of these shapes can be inputs."""
        for name, shape, x in zip(self.names, shapes, self.inputs):
            if tuple(shape) != x.shape:
                raise ValueError(
                    f"'{name}' has the shape {x.shape} in the example that was given, and not {tuple(shape)}"
                )

    def arrange(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Arguments of a call, by position and by name, in order."""
        given = dict(zip(self.names, args), **kwargs)
        for name in given:
            if name not in self.names:
                raise BadArgument(f"there is no input '{name}'" + did_you_mean(name, self.names))
        missing = [name for name in self.names if name not in given]
        if missing or len(args) > len(self.names) or len(given) < len(args) + len(kwargs):
            raise BadArgument(f"expected one array for each of {', '.join(self.names)}")
        return [given[name] for name in self.names]


class ModelHost(Host):
    """A model, or an operator, as functions of its inputs. The tapes of some runs are kept."""

    def __init__(
        self,
        subject: Any,
        examples: Mapping[str, Value],
        inputs: Collection[str] | None = None,
        outputs: Collection[str] | None = None,
        tapes: int = 4,
    ) -> None:
        super().__init__(tapes)
        # Look at what was given
        given = dict(examples)
        self.model = model_of(subject, given)
        known = list(self.model._inputs)
        self.fixed = {name: given[name] for name in known if name in given}
        missing = [name for name in known if name not in given]
        if missing:
            raise BadArgument(f"an example is needed for '{missing[0]}'" + did_you_mean(missing[0], given))
        # Choose inputs and outputs
        varies = [name for name in known if value_type(given[name]).varies(given[name])]
        self.names = varies if inputs is None else names_of(inputs)
        self.vout = list(self.model._outputs) if outputs is None else names_of(outputs)
        for name, among in [(n, known) for n in self.names] + [(n, self.model._outputs) for n in self.vout]:
            if name not in among:
                raise BadArgument(f"the model has no '{name}'" + did_you_mean(name, among))
        # Run the example
        self.examples = [given[name] for name in self.names]
        self.inputs = [bare(f"'{name}'", x) for name, x in zip(self.names, self.examples)]
        self.results = self.model.compute(self.vout, self.init(self.inputs))
        self.outputs = [bare(f"'{name}'", y) for name, y in zip(self.vout, self.results)]
        self.comm = find_door(self.model, given)

    # Run, with and without a tape
    def init(self, x: Arrays) -> dict[str, Value]:
        """The inputs of the model."""
        return {**self.fixed, **dict(zip(self.names, map(dress, self.examples, x)))}

    def value(self, x: Arrays) -> Arrays:
        """The outputs."""
        return [bare("an output", y) for y in self.model.compute(self.vout, self.init(x))]

    def forward(self, x: Arrays) -> Arrays:
        """The outputs; the tape is kept."""
        self.make_room()
        y, tape = self.model.compute(self.vout, self.init(x), return_tape=True)
        self.keep(x, tape)
        return [bare("an output", part) for part in y]

    def tape_at(self, x: Arrays) -> Tape:
        """The tape of the run that is asked for, which is run again if its tape has been given up."""
        tape = self.kept(x)
        if tape is None:
            self.forward(x)
            tape = self.kept(x)
        found: Tape = tape
        return found

    # Ask the tape
    def cotangents(self, arrays: Arrays) -> dict[str, Value]:
        """Cotangents of the outputs, of plain arrays."""
        pairs = zip(self.vout, self.results, arrays)
        zeros = {"_" + name: ZeroGradient for name in self.model._outputs}
        return zeros | {"_" + name: dress(y, unweigh(y, a)) for name, y, a in pairs}

    def tangents(self, arrays: Arrays) -> dict[str, Value]:
        """Tangents of the inputs."""
        zeros = {name + "_": ZeroGradient for name in self.model._inputs}
        return zeros | {name + "_": dress(x, a) for name, x, a in zip(self.names, self.examples, arrays)}

    def pull(self, x: Arrays, cotangents: Arrays) -> Arrays:
        """The cotangents of the inputs."""
        vout = ["_" + name for name in self.names]
        found = self.tape_at(x).get_vjp().compute(vout, self.cotangents(cotangents))
        return [weigh(e, undress(c, e)) for c, e in zip(found, self.examples)]

    def push(self, x: Arrays, tangents: Arrays) -> Arrays:
        """The tangents of the outputs."""
        vout = [name + "_" for name in self.vout]
        found = self.tape_at(x).get_jvp().compute(vout, self.tangents(tangents))
        return [undress(t, y) for t, y in zip(found, self.results)]

    def bend(self, x: Arrays, cotangents: Arrays, tangents: Arrays) -> Arrays:
        """The derivative of `pull`."""
        vout = [f"_{name}_" for name in self.names]
        init = self.cotangents(cotangents) | self.tangents(tangents)
        found = self.tape_at(x).get_hvp().compute(vout, init)
        return [weigh(e, undress(c, e)) for c, e in zip(found, self.examples)]


def model_of(subject: Any, given: Mapping[str, Value]) -> Any:
    """A model, or one around an operator. What is given beyond its arguments are hyper-parameters."""
    if isinstance(subject, Graph):
        return subject
    if not isinstance(subject, (Operator, InstanceOperator)):
        raise TypeError(f"expected a model, an operator or a problem, not {subject!r}")
    hyper = {name: value for name, value in given.items() if name not in subject.ain}
    with Builder() as m:
        result = subject(**{name: m.input(name) for name in subject.ain}, **hyper)
        several = result if isinstance(result, list) else [result]
        m.output(**dict(zip(subject.aout, several)))
    return m


def dress(example: Value, array: Any) -> Value:
    """An array as a value like an example."""
    array = np.asarray(array, dtype=bare("an example", example).dtype)
    if value_type(example).whole(example) is not None:
        return like(example, array)
    return array[()] if array.ndim == 0 else array


def undress(derivative: Value, example: Value) -> Any:
    """A derivative as an array."""
    return (
        np.zeros_like(bare("an example", example))
        if derivative is ZeroGradient
        else bare("a derivative", derivative)
    )


def weigh(x: Value, cotangent: Any) -> Any:
    """The cotangent of plain numbers, of that of a field of half-stored modes."""
    w = weights_of(x)
    return cotangent if w is None else cotangent * w


def unweigh(x: Value, cotangent: Any) -> Any:
    """The cotangent of a field of half-stored modes, of that of plain numbers."""
    w = weights_of(x)
    return cotangent if w is None else cotangent / w


class ProblemHost(Host):
    """The objective of a problem as a function of one flat array. The gradients of some runs are kept."""

    def __init__(self, problem: Problem, x0: Any, gather: bool = True, tapes: int = 4) -> None:
        super().__init__(tapes)
        self.flat = FlatProblem(problem, x0, gather)
        self.names, self.vout = ["x"], ["y"]
        self.inputs, self.outputs = [self.flat.x0], [np.zeros(())]
        comm = problem.vs.comm
        self.comm = comm if comm is not None and comm.size > 1 else None

    def value(self, x: Arrays) -> Arrays:
        """The objective."""
        return [np.asarray(self.flat.fun(x[0]))]

    def forward(self, x: Arrays) -> Arrays:
        """The objective; the gradient is kept."""
        self.make_room()
        y = self.value(x)
        self.keep(x, self.flat.jac(x[0]))
        return y

    def pull(self, x: Arrays, cotangents: Arrays) -> Arrays:
        """The gradient times a number."""
        gradient = self.kept(x)
        return [(self.flat.jac(x[0]) if gradient is None else gradient) * cotangents[0]]

    def push(self, x: Arrays, tangents: Arrays) -> Arrays:
        """The slope along a direction."""
        gradient, direction = self.flat.unflatten(self.flat.jac(x[0])), self.flat.unflatten(tangents[0])
        return [np.asarray(self.flat.vs.inner(gradient, direction))]

    def bend(self, x: Arrays, cotangents: Arrays, tangents: Arrays) -> Arrays:
        """The Hessian times a direction, times a number."""
        return [self.flat.hessp(x[0], tangents[0]) * cotangents[0]]


def host_of(
    subject: Any,
    examples: Any,
    inputs: Collection[str] | None = None,
    outputs: Collection[str] | None = None,
    gather: bool = True,
    tapes: int = 4,
) -> Host:
    """The host of a problem, or of a model or an operator."""
    if isinstance(subject, Problem):
        return ProblemHost(subject, examples, gather, tapes)
    if not isinstance(examples, Mapping):
        raise TypeError(
            f"the examples of the inputs must be a dictionary by name, not a {type(examples).__name__}"
        )
    return ModelHost(subject, examples, inputs, outputs, tapes)


def to_scipy(problem: Problem, x0: Any) -> FlatProblem:
    """A problem as SciPy's optimisers, and other libraries for flat arrays, want it.

    ::

        flat = to_scipy(problem, x0)
        found = scipy.optimize.minimize(flat.fun, flat.x0, jac=flat.jac, hessp=flat.hessp, method="trust-ncg")
        x = flat.solution(found.x)

    On many ranks each has the whole flat array, and all have to make the same calls.
    """
    return FlatProblem(problem, x0)
