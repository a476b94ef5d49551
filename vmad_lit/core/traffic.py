"""What a rank sends to other ranks, counted where it is sent and told to those who listen.

A message is a piece that goes to one other rank, or the argument of a call by which all ranks hear the same. Its
bytes are those that this rank hands over.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

from .stdlib.operators import before_sums

Listener = Callable[[str, int, int], None]  # of the way, "each", "one" or "all"; messages; and their bytes

listeners: list[Listener] = []


def tell(way: str, messages: int, nbytes: int) -> None:
    """Tell all who listen."""
    for listener in tuple(listeners):
        listener(way, messages, nbytes)


def count_to_each(comm: Any, counts: Iterable[int], size: int = 1) -> None:
    """Count what goes to each rank r of a communicator: counts[r] items of so many bytes."""
    if listeners:
        me = comm.rank
        others = [int(count) for rank, count in enumerate(counts) if rank != me and count > 0]
        tell("each", len(others) if size else 0, sum(others) * size)


def count_to_one(comm: Any, rank: int, nbytes: int) -> None:
    """Count bytes that go to a rank; a negative one, such as `MPI.PROC_NULL`, is nobody."""
    if listeners and rank >= 0 and rank != comm.rank:
        tell("one", 1, nbytes)


def count_to_all(comm: Any, nbytes: int) -> None:
    """Count the argument of a call that brings it to all ranks, or a sum in which it is."""
    if listeners and comm.size > 1:
        tell("all", 1, nbytes)


def count_object(comm: Any, x: Any, to: int | None = None) -> None:
    """Count an object that is pickled on its way to all ranks, or `to` one."""
    if listeners and comm.size > 1:
        nbytes = len(pickle.dumps(x, pickle.HIGHEST_PROTOCOL))
        if to is None:
            count_to_all(comm, nbytes)
        else:
            count_to_one(comm, to, nbytes)


before_sums.append(count_object)

#: Make contexts in which other packages tell us what they send.
sources: list[Callable[[], AbstractContextManager[Any]]] = []


class Traffic:
    """The messages and bytes that this rank sends while it is open as a context.

    Attributes
    ----------
    messages, nbytes : dict
        Their numbers by the way they went: "each", "one" or "all".
    """

    def __init__(self) -> None:
        self.messages: dict[str, int] = dict.fromkeys(("each", "one", "all"), 0)
        self.nbytes = dict(self.messages)

    def hear(self, way: str, messages: int, nbytes: int) -> None:
        """Add to the numbers."""
        self.messages[way] += messages
        self.nbytes[way] += nbytes

    def __enter__(self) -> Self:
        listen(self.hear)
        return self

    def __exit__(self, *exception: object) -> None:
        stop(self.hear)

    def __repr__(self) -> str:
        told = (f"{self.messages[way]} to {way}, {self.nbytes[way]} bytes" for way in self.messages)
        return f"messages: {'; '.join(told)}"


_opened = ExitStack()


def listen(listener: Listener) -> None:
    """Have a function told of all that this rank sends, until `stop`."""
    if not listeners:
        for source in sources:
            _opened.enter_context(source())
    listeners.append(listener)


def stop(listener: Listener) -> None:
    """Tell a function no more."""
    listeners.remove(listener)
    if not listeners:
        _opened.close()
