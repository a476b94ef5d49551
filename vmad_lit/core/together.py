"""What fails on one rank, fails on all: errors that are raised on every rank of a communicator."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from traceback import format_exception
from typing import Any, NoReturn, TypeVar

import numpy

from .traffic import count_object, count_to_all

T = TypeVar("T")


def together(comm: Any, action: Callable[[], T]) -> T:
    """What `action()` returns, if it succeeds on all ranks of a communicator; else its error, on all. Collective.

    The error is of the type that the first rank has raised which failed, and names that rank. Where it was raised it
    has the original for its cause, elsewhere the text of the traceback. If all ranks fail alike, each raises its own.
    Without a communicator, or on one rank, this is a call like others. `action` must not talk to other ranks, which
    would wait in it for one that has failed.
    """

    if comm is None or comm.size == 1:
        return action()
    results, error = [], None
    try:
        results.append(action())
    except Exception as exception:
        error = exception
    raise_together(comm, error)
    return results[0]


def raise_together(comm: Any, error: Exception | None) -> None:
    """Raise on all ranks the error that any has; None is no error. Collective."""
    if comm is None or comm.size == 1:
        if error is not None:
            raise error
    elif any_rank(comm, error is not None):
        raise_first(comm, error)


def any_rank(comm: Any, flag: bool) -> bool:
    """Whether a flag is up on any rank. Collective."""
    return HOW["any_rank"](comm, flag)


def ask(comm: Any, flag: bool) -> bool:
    flags = numpy.array([flag], "i4")
    count_to_all(comm, flags.nbytes)
    comm.Allreduce(flags.copy(), flags)
    return bool(flags[0])


HOW = {"any_rank": ask}  # a later chapter has a way that looks after ranks which do not come

Note = tuple[str, str, bytes, str]  # the kind of an error, its text, the error as bytes, its traceback


def note_of(error: Exception) -> Note:
    """What other ranks are told of an error."""
    try:
        data = pickle.dumps(error)
        data = data if type(pickle.loads(data)) is type(error) else b""
    except Exception:  # whatever somebody's exception does when it is pickled
        data = b""
    return type(error).__qualname__, str(error), data, "".join(format_exception(error))


def raise_first(comm: Any, error: Exception | None) -> NoReturn:
    """Raise an error on all ranks, of which at least one has an error. Collective."""
    note = None if error is None else note_of(error)
    count_object(comm, note)
    everybody = comm.allgather(note)
    notes: dict[int, Note] = {rank: note for rank, note in enumerate(everybody) if note is not None}
    first = next(iter(notes.values()))
    alike = [rank for rank, note in notes.items() if note[:2] == first[:2]]
    # Raise what all have alike as it is
    if error is not None and len(alike) == comm.size:
        raise error
    # Raise the first error, and name the ranks
    raised = restore(first, f"on rank{'s' * (len(alike) > 1)} {', '.join(map(str, alike[:8]))}")
    for rank in [rank for rank in notes if rank not in alike][:3]:
        raised.add_note(f"and on rank {rank}: {notes[rank][0]}: {notes[rank][1]}")
    raise raised from (ErrorElsewhere(first[3]) if error is None else error)


class ErrorElsewhere(Exception):
    """The cause of an error that another rank has raised: the text of its traceback."""

    def __str__(self) -> str:
        return f'on another rank\n"""\n{self.args[0]}"""'


def restore(note: Note, who: str) -> Exception:
    """An error of other ranks, with their names in its message."""
    kind, text, data, _ = note
    try:
        error: Exception = pickle.loads(data)
    except Exception:
        error = RuntimeError(f"{kind}: {text}")
    # Put the ranks into the message
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{who}: {error.strerror}"
    elif error.args and type(error.args[0]) is str:
        error.args = f"{who}: {error.args[0]}", *error.args[1:]
    if who not in str(error):
        error.add_note(who)
    return error
