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
    root : Root
        The run of the outermost model.
    path : tuple of int
        Where in that run it is.
    """

    __slots__ = "root", "path", "_generators", "_guests"

    def __init__(self, root: Root, path: tuple[int, ...] = ()) -> None:
        self.root, self.path = root, path
        self._generators: dict[Any, numpy.random.Generator] | None = None
        self._guests = 0

    def inside(self, number: int) -> Run:
        """The run in a node of this one, or a step of a chain, by its number."""
        return Run(self.root, (*self.path, number))

    def again(self) -> Run:
        """The same run once more; its generators begin anew."""
        return Run(self.root, self.path)

    # The generators of a run
    def generator(self, node: Any, rank: int | None = None) -> numpy.random.Generator:
        """The generator of a node, for all ranks or for one."""
        if self._generators is None:
            self._generators = {}
        key = node.primitive.kind, node.number, rank
        if key not in self._generators:
            of_rank = () if rank is None else (OF_RANK, rank)
            place = (*self.path, (node.forward or node).number, *of_rank)
            seeds = numpy.random.SeedSequence(self.root.seed, spawn_key=place)
            self._generators[key] = numpy.random.default_rng(seeds)
        return self._generators[key]


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
    outer._guests += 1
    return outer.inside(GUEST).inside(outer._guests)


def run_inside(node: Any) -> Run:
    """The run inside a node, or inside the original of a derived one."""
    return current_run().inside((node.forward or node).number)


def current_run() -> Run:
    run = CURRENT.get()
    if run is None:
        raise BadArgument("a node has random numbers only while a model runs, in the thread that runs it")
    return run
