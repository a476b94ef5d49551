"""Runs: where a model is run, and the random numbers that come of that."""

from __future__ import annotations

from contextvars import ContextVar
from numbers import Integral
from typing import Any

import numpy

from .error import BadArgument

CURRENT: ContextVar[Run | None] = ContextVar("the run that is going on", default=None)


class Run:
    """A run of a model, for which node.rng makes random numbers.

    Attributes
    ----------
    outer : Run, Root or None
        The run in which it happens.
    number : int
        That of the node of the outer run, or of the step of a chain.
    """

    __slots__ = "outer", "number", "streams", "guests"

    def __init__(self, outer: Run | Root | None, number: int = 0) -> None:
        self.outer, self.number = outer, number
        self.streams: dict[Any, numpy.random.Generator] | None = None
        self.guests = 0

    @property
    def whereabouts(self) -> tuple[Root | None, tuple[int, ...]]:
        """The run of the outermost model, and the path from there."""
        path, run = [], self
        while isinstance(run.outer, Run):
            path.append(run.number)
            run = run.outer
        return run.outer, tuple(reversed(path))

    def again(self) -> Run:
        """The same run once more; its generators begin anew."""
        return Run(self.outer, self.number) if self.streams or self.guests else self

    # The generators of a run
    def generator(self, node: Any, rank: int | None = None) -> numpy.random.Generator:
        """The generator of a node, for all ranks or for one."""
        if self.streams is None:
            self.streams = {}
        key = node.primitive.kind, node.number, rank
        if key not in self.streams:
            root, path = self.whereabouts
            of_rank = () if rank is None else (OF_RANK, rank)
            place = (*path, (node.forward or node).number, *of_rank)
            seeds = numpy.random.SeedSequence(root.seed if root else 0, spawn_key=place)
            self.streams[key] = numpy.random.default_rng(seeds)
        return self.streams[key]


class Root:
    """The run of a model that is in no other one, with its seed."""

    __slots__ = ("seed", "__weakref__")

    def __init__(self, seed: int) -> None:
        if type(seed) is not int and not isinstance(seed, Integral) or seed < 0:
            raise BadArgument(f"the seed of a model is a whole number that is not negative, got {seed!r}")
        self.seed = int(seed)


OF_RANK, GUEST = 2**32 - 1, 2**32 - 2  # in a path, what is no number of a node


def begin_run(seed: int) -> Run:
    """A run of which nobody says where it is."""
    outer = CURRENT.get()
    if outer is None:
        return Run(Root(seed))
    outer.guests += 1
    return Run(Run(outer, GUEST), outer.guests)


def current_root() -> Root | None:
    """The run of the outermost model that is going on, if one is."""
    run: Run | Root | None = CURRENT.get()
    while isinstance(run, Run):
        run = run.outer
    return run


def run_inside(node: Any) -> Run:
    """The run inside a node, or inside the original of a derived one."""
    return Run(CURRENT.get(), (node.forward or node).number)


def current_run() -> Run:
    run = CURRENT.get()
    if run is None:
        raise BadArgument("a node has random numbers only while a model runs, in the thread that runs it")
    return run
