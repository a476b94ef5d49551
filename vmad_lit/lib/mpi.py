"""Communication between ranks as operators.

A value is *replicated* (all ranks have the same value), *partitioned* (each rank has a part, and the value
is all of them) or *root-only* (one rank has it, the others have None). The inner product of a replicated
value is counted once, that of a partitioned value is summed over the ranks; the transposes follow from
that.

Arrays and NumPy numbers travel as buffers, other objects are pickled. All operators are *collective*: all
ranks of the communicator have to run the same model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any, TypeVar

import numpy

from ..core.error import needed_for
from ..core.marks import digest
from ..core.operator import ZeroGradient, operator
from ..core.placement import Placement, Site, declare, same_ranks
from ..core.stdlib.operators import Array, Shape
from ..core.symbol import Symbol, Value
from ..core.together import raise_together, together
from ..core.traffic import count_object, count_to_all, count_to_each, count_to_one

T = TypeVar("T")
Description = tuple[Shape, numpy.dtype[Any]] | str  # shape and dtype, or the name of a type
Halo = tuple[Array, list[int], list[int], Array]  # see `plan_halo`
Rows = tuple[Sequence[int] | Array, Array]  # how many for each rank, and where they begin

with needed_for("communication between ranks", extra="mpi"):
    from mpi4py import MPI, __version__ as version


def describe(x: Value) -> Description:
    """What others must know about a value: (shape, dtype) of an array or number, else its type's name."""
    if isinstance(x, (numpy.ndarray, numpy.generic, int, float, complex)) and x is not ZeroGradient:
        x = numpy.asarray(x)
        if x.dtype.kind in "biufc":
            return x.shape, x.dtype
    return type(x).__name__


ZERO = "ZeroGradientType"


def told_by_rank(kinds: Sequence[Description]) -> str:
    """Some descriptions in words."""
    words = (kind if type(kind) is str else f"{kind[1]}{list(kind[0])}" for kind in kinds)
    return ", ".join(f"{word} on rank {rank}" for rank, word in enumerate(words))


def dense(x_: Value, kind: Description, comm: MPI.Comm) -> Value:
    """A tangent or cotangent: ZeroGradient if all ranks have that, else a value on each, maybe zeros."""
    count_object(comm, x_ is ZeroGradient)
    if comm.allreduce(x_ is ZeroGradient, op=MPI.LAND):
        return ZeroGradient
    if x_ is ZeroGradient and type(kind) is tuple:
        return numpy.zeros(*kind)
    return x_


def tell(comm: MPI.Comm, x: Value, **settings: Any) -> list[Any]:
    """The descriptions of a value on all ranks; raises ValueError on all if they do not have the same settings."""
    mine = describe(x), settings
    count_object(comm, mine)
    everybody = comm.allgather(mine)
    for rank, (_, theirs) in enumerate(everybody):
        different = [name for name in settings if theirs.get(name) != everybody[0][1].get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"all ranks must call it with the same '{name}', but rank 0 has {everybody[0][1].get(name)!r} and "
                f"rank {rank} has {theirs.get(name)!r}"
            )
    return [kind for kind, _ in everybody]


def gather_kinds(comm: MPI.Comm, x: Value, **settings: Any) -> tuple[list[Any], numpy.dtype[Any] | None]:
    """The shapes of a value on all ranks, and the dtype that holds them all; None if it is not an array."""
    kinds = tell(comm, x, **settings)
    if any(type(kind) is str for kind in kinds):
        return kinds, None
    return [shape for shape, _ in kinds], numpy.result_type(*(dtype for _, dtype in kinds))


def fail_together(comm: MPI.Comm, message: str | None) -> None:
    """Raise ValueError on all ranks if any of them has a message."""
    raise_together(comm, ValueError(message) if message else None)


def check_rank(name: str, rank: Any, comm: MPI.Comm) -> None:
    """Raise ValueError unless a number that all ranks know is that of one of them."""
    if not isinstance(rank, (int, numpy.integer)) or not 0 <= rank < comm.size:
        raise ValueError(f"'{name}' is the number of a rank, from 0 to {comm.size - 1}, not {rank!r}")


def run_together(comm: MPI.Comm, function: Callable[[], T]) -> T:
    """Call a function on all ranks; if any of them has an exception, all raise it: see `core.together`."""
    return together(comm, function)


def on_root(comm: MPI.Comm, function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result, or raise its exception, on all ranks."""
    return send_to_all(together(comm, function if comm.rank == 0 else lambda: None), comm)


def send_to_all(x: Any, comm: MPI.Comm, root: int = 0) -> Any:
    """An object of one rank, pickled, on all ranks."""
    if comm.rank == root:
        count_object(comm, x)
    return comm.bcast(x, root)


def total(x: Value, comm: MPI.Comm) -> Value:
    """The sum of a value over the ranks; of some of them it may be ZeroGradient."""
    count_object(comm, describe(x))
    kinds = comm.allgather(describe(x))
    some = [kind for kind in kinds if kind != ZERO]
    if not some:
        return ZeroGradient
    # Complain if there is no sum
    if any(kind in ("list", "tuple", "NoneType", "dict", "str") for kind in some):
        raise TypeError(
            "a sum over ranks needs numbers, arrays or objects with a sum on all ranks, not "
            + told_by_rank(kinds)
            + "; reduce the items of a list one by one"
        )
    if any(type(kind) is str for kind in some):
        count_object(comm, x)
        return comm.allreduce(x)
    shapes, dtype = {shape for shape, _ in some}, numpy.result_type(*(dtype for _, dtype in some))
    if len(shapes) > 1:
        raise ValueError(f"a sum over ranks needs values of the same shape, not {told_by_rank(kinds)}")
    if x is ZeroGradient:
        x = numpy.zeros(shapes.pop(), dtype)
    # Add the buffers
    dtype = numpy.dtype(int) if dtype.kind == "b" else dtype
    part = numpy.asarray(x, "f4" if dtype == "f2" else dtype, order="C")
    y = numpy.empty_like(part)
    count_to_all(comm, part.nbytes)
    for piece in pieces_of(part.size):
        comm.Allreduce(part.reshape(-1)[piece], y.reshape(-1)[piece])
    y = y.astype(dtype, copy=False)
    return y if y.ndim else y.item() if type(x) in (bool, int, float, complex) else y[()]


def add_up(comm: MPI.Comm, number: complex) -> Any:
    """The sum over the ranks of a number, of the same type on all of them."""
    if comm.size == 1:
        return number
    part = numpy.array(number)
    y = numpy.empty_like(part)
    count_to_all(comm, part.nbytes)
    comm.Allreduce(part, y)
    return y.item()


@operator
class allreduce:
    """The sum over ranks: from partial or partitioned to replicated.

    What is known to be replicated already is not summed: every rank has the sum.

    Parameters
    ----------
    x : an array of the same shape on all ranks, a number, or an object with a sum
    comm : MPI communicator

    Returns
    -------
    y : replicated
    """

    ain = "x"
    aout = "y"
    collective = True
    placements = "partial -> replicated"
    hvp = ZeroGradient

    def apl(node, x, comm):
        return dict(y=agreed(x, comm) if lives(node, "x", "replicated", comm) else total(x, comm))

    def vjp(node, _y):
        return dict(_x=_y)

    def jvp(node, x_, comm):
        return dict(y_=x_ if lives(node, "x", "replicated", comm) else total(x_, comm))


@operator
class allbcast:
    """The identity, from replicated to partitioned: each rank goes its own way with a value that all have.

    The reverse of `allreduce`. The value is not checked to be the same on all ranks; `bcast` makes it so. What is
    known to be partitioned already stays what it is.

    Parameters
    ----------
    x : replicated, an array or a number
    comm : MPI communicator

    Returns
    -------
    y : partitioned
    """

    ain = "x"
    aout = "y"
    collective = True
    placements = "replicated -> partitioned"
    hvp = ZeroGradient

    def apl(node, x, comm):
        return dict(y=x)

    def vjp(node, _y, comm):
        return dict(_x=_y if lives(node, "x", "partitioned", comm) else total(_y, comm))

    def jvp(node, x_):
        return dict(y_=x_)


@operator
class sum_of_shares:
    """The cotangent of a replicated value, from the shares that the ranks have of it; put into sweeps by `core.placement`."""

    ain = "x"
    aout = "y"
    placements = "partial -> replicated"

    def apl(node, x, comm):
        return dict(y=total(x, comm))


def relocate(site: Site) -> Placement:
    """The placement that a program gives to a value; raises PlacementError if the value lives elsewhere."""
    found = declare(site.constant("placement"), site.constant("comm"))
    given = site.given["x"]
    if isinstance(given, Placement) and given.kind != found.kind:
        if found.kind != "partitioned" or given.kind == "root-only":
            site.refuse(f"a {given.kind} value is no {found.kind} one because a program says so")
        site.take_apart("x")
    return found


@operator
class place:
    """The identity, which tells where a value lives; for values of which nothing is known, such as array constants.

    Parameters
    ----------
    x : any value
    placement : 'replicated', 'partitioned', 'partial' or 'root-only'
    comm : MPI communicator

    Returns
    -------
    y : x. Of a replicated value that is to be partitioned each rank takes its copy as its own, as by `allbcast`.
    """

    ain = "x"
    aout = "y"

    placements = staticmethod(relocate)

    def apl(node, x, placement, comm):
        return dict(y=x)

    def vjp(node, _y):
        return dict(_x=_y)


def lives(node: Any, name: str, kind: str, comm: MPI.Comm) -> bool:
    """Whether the value of an argument of a node is known to live somewhere, on the ranks of a communicator."""
    found = None if node is None else node.placed.get(name)
    return found is not None and found.kind == kind and same_ranks(found.comm, comm)


def agreed(x: Value, comm: MPI.Comm) -> Value:
    """A value that is taken for the same on all ranks; raises ValueError on all of them if it is not.

    Ranks may differ by rounding.
    """
    kind = describe(x)
    mine = kind, digest(numpy.asarray(x), math.inf) if type(kind) is tuple else 0
    count_object(comm, mine)
    kinds = comm.allgather(mine)
    if len(set(kinds)) == 1:
        return x
    # Look for how far they are apart
    if type(kind) is tuple and len({kind for kind, _ in kinds}) == 1:
        count_object(comm, x)
        values = numpy.array(comm.allgather(x))
        spread, size = numpy.ptp(numpy.abs(values - values[0]), axis=0), numpy.max(numpy.abs(values))
        if numpy.all(spread <= 1e-6 * size):
            return x
    raise ValueError(
        "a value is taken for replicated, since all that it is made of is, but ranks have different ones: "
        + told_by_rank([kind for kind, _ in kinds])
        + "; if an operator makes another value on each rank of the same input, send that through mpi.allbcast"
    )


def from_root(x: Value, comm: MPI.Comm, root: int) -> Value:
    """The value of one rank, on all ranks."""
    kinds = tell(comm, x, root=root)
    check_rank("root", root, comm)
    kind = kinds[root]
    if type(kind) is str or kind[0] == ():
        return send_to_all(x, comm, root)
    shape, dtype = kind
    y = numpy.asarray(x, dtype, order="C") if comm.rank == root else numpy.empty(shape, dtype)
    flat = y.reshape(-1)
    with row_type(flat) as item:
        for piece in pieces_of(y.size):
            if comm.rank == root:
                count_to_all(comm, flat[piece].nbytes)
            comm.Bcast([flat[piece], piece.stop - piece.start, item], root)
    return y


@operator
class bcast:
    """Send the value of one rank to all: from root-only to replicated.

    Follow it by `allbcast` if the ranks go different ways with the value afterwards.

    Parameters
    ----------
    x : root-only, any value; ignored on the other ranks
    comm : MPI communicator
    root : int, the rank that has the value

    Returns
    -------
    y : replicated
    """

    ain = "x"
    aout = "y"
    collective = True
    placements = "root-only -> replicated"
    hvp = ZeroGradient

    def apl(node, x, comm, root=0):
        return dict(y=from_root(x, comm, root))

    def vjp(node, _y, comm, root):
        keeps = comm.rank == root or lives(node, "x", "replicated", comm)
        return dict(_x=_y if keeps else ZeroGradient)

    def jvp(node, x_, comm, root):
        return dict(y_=from_root(x_, comm, root))


UNLIMITED = 2**62
#: The largest count that a call of MPI takes.
LARGEST = UNLIMITED if MPI.Get_version() >= (4, 0) and int(version.split(".")[0]) >= 4 else 2**31 - 1


def pieces_of(count: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most `LARGEST` items that make up `count` items from `start` on."""
    for begin in range(start, start + count, LARGEST):
        yield slice(begin, min(begin + LARGEST, start + count))


def starts(counts: Sequence[int] | Array) -> Array:
    """Where the rows for each rank begin, if they lie one after another."""
    places = numpy.zeros(len(counts), "i8")
    numpy.cumsum(counts[:-1], out=places[1:])
    return places


def row_size(x: Array) -> int:
    """The number of bytes of one item along the first axis."""
    return x.dtype.itemsize * math.prod(x.shape[1:])


@contextmanager
def row_type(x: Array) -> Iterator[MPI.Datatype]:
    """The type, for MPI, of a row of an array."""
    item = MPI.BYTE.Create_contiguous(x.dtype.itemsize)
    row = item.Create_contiguous(math.prod(x.shape[1:]))
    item.Free()
    row.Commit()
    try:
        yield row
    finally:
        row.Free()


def too_many(comm: MPI.Comm, *counts: Sequence[int] | Array) -> bool:
    """Whether any rank has more rows, to all ranks or from all, than a call can count. Collective."""
    if LARGEST == UNLIMITED:
        return False
    most = numpy.array(max(int(numpy.sum(numbers)) for numbers in counts))
    count_to_all(comm, most.nbytes)
    comm.Allreduce(most.copy(), most, MPI.MAX)
    return bool(most > LARGEST)


def deliver(
    comm: MPI.Comm, rows: Array, to: Rows, fro: Rows, received: Array, in_pieces: bool = False
) -> Array:
    """Rows to and from all ranks by one `Alltoallv`, into `received`; or, `in_pieces`, by many messages.

    `to` and `fro` are how many rows there are for each rank, and where they begin.
    """
    rows = numpy.ascontiguousarray(rows)
    count_to_each(comm, to[0], row_size(rows))
    with row_type(rows) as row:
        if not in_pieces:
            comm.Alltoallv([rows, to, row], [received, fro, row])
            return received
        # Send and receive pieces
        requests = []
        for counts, places, array, start in (*fro, received, comm.Irecv), (*to, rows, comm.Isend):
            for rank, (count, place) in enumerate(zip(counts, places)):
                for piece in pieces_of(int(count), int(place)) if rank != comm.rank else ():
                    requests.append(start([array[piece], piece.stop - piece.start, row], rank))
        here, there = (
            slice(side[1][comm.rank], side[1][comm.rank] + side[0][comm.rank]) for side in (fro, to)
        )
        received[here] = rows[there]
        MPI.Request.Waitall(requests)
    return received


def check_count(count: int) -> None:
    """Raise ValueError if a call cannot count so many rows; all ranks must ask the same."""
    if count > LARGEST:
        raise ValueError(
            f"{count} rows are more than a call of this MPI library can count, which is {LARGEST}; "
            "it takes a library of MPI 4 and mpi4py 4, or rows that are longer"
        )


def find_counts(comm: MPI.Comm, x: Value, **settings: Any) -> tuple[list[int] | Any, numpy.dtype[Any] | None]:
    """The number of rows on each rank and the common dtype of a partitioned array, else None, None."""
    shapes, dtype = gather_kinds(comm, x, **settings)
    if dtype is None:
        return None, None
    if all(shape == () for shape in shapes):
        return [1] * comm.size, dtype
    if () in shapes or len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"the parts differ in more than their length; ranks 0, 1, .. have {shapes}")
    return [shape[0] for shape in shapes], dtype


def join(x: Value, comm: MPI.Comm, root: int | None = None) -> tuple[Value, list[int] | None]:
    """The joined parts of all ranks, on `root` (others get None) or, without it, on all; and the counts."""
    counts, dtype = find_counts(comm, x, root=root)
    if root is not None:
        check_rank("root", root, comm)
    if counts is None:
        count_object(comm, x, root)
        return comm.allgather(x) if root is None else comm.gather(x, root), None
    x = numpy.asarray(x, dtype, order="C")
    y = None
    if root is None or root == comm.rank:
        y = numpy.empty((sum(counts), *x.shape[1:]), dtype)
    # Join the rows
    check_count(sum(counts))
    with row_type(x) as row:
        if root is None:
            count_to_all(comm, x.nbytes)
            comm.Allgatherv([x, len(x) if x.ndim else 1, row], [y, (counts, starts(counts)), row])
        else:
            count_to_one(comm, root, x.nbytes)
            there = None if y is None else [y, (counts, starts(counts)), row]
            comm.Gatherv([x, len(x) if x.ndim else 1, row], there, root)
    return y, counts


def count_objects(comm: MPI.Comm, items: Sequence[Any]) -> None:
    """Count objects of which the first goes to rank 0, the next to rank 1, and so on."""
    for rank, item in enumerate(items):
        count_object(comm, item, rank)


def deal(x: Value, counts: Sequence[int] | None, comm: MPI.Comm, root: int, scalar: bool = False) -> Value:
    """Our part of a value of `root`: counts[rank] rows, or an item of a list if `counts` is None."""
    if counts is None:
        count_objects(comm, x if comm.rank == root else ())
        return comm.scatter(x, root)
    # Tell what a row is
    kind = None
    if comm.rank == root:
        x = numpy.asarray(x, order="C")
        kind = x.shape[1:], x.dtype
    shape, dtype = send_to_all(kind, comm, root)
    check_count(sum(counts))
    y = numpy.empty((counts[comm.rank], *shape), dtype)
    count_to_each(comm, counts if comm.rank == root else (), row_size(y))
    with row_type(y) as row:
        there = [x, (counts, starts(counts)), row] if comm.rank == root else None
        comm.Scatterv(there, [y, len(y), row], root)
    return y[0] if scalar else y


@operator
class gather:
    """Join the parts of all ranks on one: from partitioned to root-only.

    Parameters
    ----------
    x : partitioned, an array of shape (n, ...), n may differ between ranks, or a number, or any object
    comm : MPI communicator
    root : int, the rank that receives

    Returns
    -------
    y : root-only, an array of shape (sum of n, ...); one item per rank for numbers; a list for other
        objects. None on the other ranks.
    """

    ain = "x"
    aout = "y"
    collective = True
    placements = "partitioned -> root-only"
    hvp = ZeroGradient

    def apl(node, x, comm, root=0):
        y, counts = join(x, comm, root)
        return dict(y=y, counts=counts)

    def rcd(node, x, comm, root, y, counts):
        return dict(kind=describe(x), counts=counts, comm=comm, root=root)

    def vjp(node, _y, kind, counts, comm, root):
        if send_to_all(_y is ZeroGradient, comm, root):
            return dict(_x=ZeroGradient)
        return dict(_x=deal(_y, counts, comm, root, scalar=kind[0] == ()))

    def jvp(node, x_, kind, comm, root):
        x_ = dense(x_, kind, comm)
        return dict(y_=x_ if x_ is ZeroGradient else join(x_, comm, root)[0])


def plan_scatter(x: Value, counts: Sequence[int] | None, comm: MPI.Comm, root: int) -> Sequence[int] | None:
    """The counts of a scatter, on all ranks; None for a list of objects."""
    tell(comm, None, root=root)
    check_rank("root", root, comm)
    complaint = None
    if comm.rank == root:
        # Find the counts, or what is wrong with them
        if not isinstance(x, numpy.ndarray) or x.ndim == 0:
            if not isinstance(x, (list, tuple)) or len(x) != comm.size:
                complaint = f"expected an array or a list of {comm.size} items, got {type(x).__name__}"
            counts = None
        elif counts is None:
            counts = even_counts(len(x), comm.size)
        elif not are_counts(counts, comm.size, len(x)):
            complaint = f"counts {counts!r} do not add up to {len(x)} rows on {comm.size} ranks"
    counts, complaint = send_to_all((counts, complaint), comm, root)
    if complaint:
        raise ValueError(complaint)
    return counts


def are_counts(counts: Any, size: int, n: int) -> bool:
    """Whether these are the numbers of rows that go to each of `size` ranks, n together."""
    try:
        whole = [index(count) for count in counts]
    except TypeError:
        return False
    return len(whole) == size and min(whole) >= 0 and sum(whole) == n


def even_counts(n: int, size: int) -> list[int]:
    """Counts that add up to n and differ by at most one."""
    return [n // size + (rank < n % size) for rank in range(size)]


@operator
class scatter:
    """Deal the rows of an array of one rank to all: from root-only to partitioned.

    Parameters
    ----------
    x : root-only, an array of shape (n, ...), or a list with one object for each rank
    comm : MPI communicator
    counts : list of int, root-only, how many rows each rank gets; as even as possible if None
    root : int, the rank that has the value

    Returns
    -------
    y : partitioned, of shape (counts[rank], ...)
    """

    ain = "x"
    aout = "y"
    collective = True
    placements = "root-only -> partitioned"
    own = ("counts",)
    hvp = ZeroGradient

    def apl(node, x, comm, counts=None, root=0):
        counts = plan_scatter(x, counts, comm, root)
        return dict(y=deal(x, counts, comm, root), plan=counts)

    def rcd(node, x, comm, counts, root, y, plan):
        return dict(kind=describe(y), plan=plan, comm=comm, root=root)

    def vjp(node, _y, kind, comm, root):
        _y = dense(_y, kind, comm)
        everywhere = lives(node, "x", "replicated", comm)
        _x = _y if _y is ZeroGradient else join(_y, comm, None if everywhere else root)[0]
        return dict(_x=_x if everywhere or comm.rank == root else ZeroGradient)

    def jvp(node, x_, plan, comm, root):
        if send_to_all(x_ is ZeroGradient, comm, root):
            return dict(y_=ZeroGradient)
        return dict(y_=deal(x_, plan, comm, root))


@operator
class allgather:
    """Join the parts of all ranks on all: from partitioned to replicated. See `gather` for the shapes."""

    ain = "x"
    aout = "y"
    collective = True
    placements = "partitioned -> replicated"
    hvp = ZeroGradient

    def apl(node, x, comm):
        y, counts = join(x, comm)
        return dict(y=y, counts=counts)

    def rcd(node, x, comm, y, counts):
        return dict(kind=describe(x), counts=counts, comm=comm)

    def vjp(node, _y, kind, counts, comm):
        if counts is None or kind[0] == ():
            return dict(_x=_y[comm.rank])
        start = sum(counts[: comm.rank])
        return dict(_x=_y[start : start + counts[comm.rank]])

    def jvp(node, x_, kind, comm):
        x_ = dense(x_, kind, comm)
        return dict(y_=x_ if x_ is ZeroGradient else join(x_, comm)[0])


def exchange_rows(x: Value, send: Sequence[int], recv: Sequence[int], comm: MPI.Comm) -> Array:
    """Send send[r] rows to each rank r and receive recv[r] from it; the dtype is the same on all."""
    x = numpy.asarray(x, order="C")
    y = numpy.empty((sum(recv), *x.shape[1:]), x.dtype)
    return deliver(comm, x, (send, starts(send)), (recv, starts(recv)), y, too_many(comm, send, recv))


def send_objects(items: Sequence[Any], comm: MPI.Comm) -> list[Any]:
    """Send an object, pickled, to each rank, and receive one from each."""
    count_objects(comm, items)
    return comm.alltoall(items)


def return_rows(
    _y: Value, kind: Description, send: Sequence[int], recv: Sequence[int], comm: MPI.Comm
) -> Value:
    """The transpose of `exchange_rows`."""
    _y = dense(_y, kind, comm)
    if _y is ZeroGradient:
        return _y
    _, dtype = find_counts(comm, _y)
    return exchange_rows(numpy.asarray(_y, dtype), recv, send, comm)


@operator
class alltoall:
    """Send a part of the rows of each rank to each rank: from partitioned to partitioned.

    Parameters
    ----------
    x : partitioned, an array of shape (n, ...), or a list with one object for each rank
    comm : MPI communicator
    counts : list of int, how many rows this rank sends to each rank; as even as possible if None

    Returns
    -------
    y : partitioned, the rows received in the order of the ranks that sent them; a list if x is a list
    """

    ain = "x"
    aout = "y"
    collective = True
    placements = "partitioned -> partitioned"
    own = ("counts",)
    hvp = ZeroGradient

    def apl(node, x, comm, counts=None):
        rows, dtype = find_counts(comm, x)
        # Check that every rank can send to every rank
        complaint = None
        if rows is None:
            if not isinstance(x, (list, tuple)) or len(x) != comm.size:
                complaint = f"expected an array or a list of {comm.size} items, got {type(x).__name__}"
        else:
            send = even_counts(rows[comm.rank], comm.size) if counts is None else counts
            if numpy.ndim(x) == 0 or not are_counts(send, comm.size, len(x)):
                complaint = (
                    f"counts {send!r} do not divide an array of shape {numpy.shape(x)} among the ranks"
                )
        fail_together(comm, complaint)
        if rows is None:
            return dict(y=send_objects(x, comm), send=None, recv=None)
        recv = send_objects(send, comm)
        return dict(y=exchange_rows(numpy.asarray(x, dtype), send, recv, comm), send=send, recv=recv)

    def rcd(node, x, comm, counts, y, send, recv):
        return dict(kinds=(describe(x), describe(y)), send=send, recv=recv, comm=comm)

    def vjp(node, _y, kinds, send, recv, comm):
        if send is None:
            return dict(_x=send_objects([ZeroGradient] * comm.size if _y is ZeroGradient else _y, comm))
        return dict(_x=return_rows(_y, kinds[1], send, recv, comm))

    def jvp(node, x_, kinds, send, recv, comm):
        if send is None:
            return dict(y_=send_objects([ZeroGradient] * comm.size if x_ is ZeroGradient else x_, comm))
        return dict(y_=return_rows(x_, kinds[0], recv, send, comm))


def pass_on(x: Value, dest: int, source: int, comm: MPI.Comm) -> Value:
    """Send a value to one rank and receive one from another; None if nobody is the source.

    Raises ValueError on all ranks unless each receives from the rank that sends to it.
    """
    mine = describe(x)
    count_object(comm, (mine, dest, source))
    everybody = comm.allgather((mine, dest, source))
    # Complain unless each receives from the rank that sends to it
    for rank, (_, to, _) in enumerate(everybody):
        if to != MPI.PROC_NULL and (to not in range(comm.size) or everybody[to][2] != rank):
            raise ValueError(f"rank {rank} sends to {to!r}, which expects nothing from it")
    for rank, (_, _, of) in enumerate(everybody):
        if of != MPI.PROC_NULL and (of not in range(comm.size) or everybody[of][1] != rank):
            raise ValueError(f"rank {rank} expects something from {of!r}, which sends it nothing")
    kind = "NoneType" if source == MPI.PROC_NULL else everybody[source][0]
    # Begin to send
    if type(mine) is tuple:
        check_count(numpy.size(x))
        flat = numpy.asarray(x, order="C").reshape(-1)
        count_to_one(comm, dest, flat.nbytes)
        with row_type(flat) as item:
            sent = comm.Isend([flat, flat.size, item], dest, 1)
    else:
        count_object(comm, x, dest)
        sent = comm.isend(x, dest, 1)
    # Receive
    if type(kind) is tuple:
        y = numpy.empty(*kind)
        with row_type(y.reshape(-1)) as item:
            comm.Recv([y, y.size, item], source, 1)
        y = y[()]
    else:
        y = comm.recv(source=source, tag=1)
    sent.wait()
    return y


@operator
class sendrecv:
    """Send a value to one rank and receive one from another: from partitioned to partitioned.

    The ranks have to match: if rank a has the destination b, then rank b has the source a.

    Parameters
    ----------
    x : partitioned, any value; arrays of different ranks may differ in shape and type
    comm : MPI communicator
    dest, source : int, ranks, or `MPI.PROC_NULL` for nobody

    Returns
    -------
    y : partitioned, the value of the source; zeros of the shape of x if that is nobody
    """

    ain = "x"
    aout = "y"
    collective = True
    placements = "partitioned -> partitioned"
    own = "dest", "source"
    hvp = ZeroGradient

    def apl(node, x, comm, dest, source):
        y = pass_on(x, dest, source, comm)
        if source == MPI.PROC_NULL:
            y = numpy.zeros_like(x)[()]
        return dict(y=y)

    def vjp(node, _y, comm, dest, source):
        _x = pass_on(_y, source, dest, comm)
        return dict(_x=ZeroGradient if dest == MPI.PROC_NULL else _x)

    def jvp(node, x_, comm, dest, source):
        y_ = pass_on(x_, dest, source, comm)
        return dict(y_=ZeroGradient if source == MPI.PROC_NULL else y_)


def shift(x: Symbol, comm: MPI.Comm, offset: int = 1) -> Symbol:
    """Pass values around a ring: rank r receives the value of rank r - offset (see `sendrecv`)."""
    return sendrecv(x, comm, (comm.rank + offset) % comm.size, (comm.rank - offset) % comm.size)


def plan_halo(counts: Sequence[int], rank: int, width: int, periodic: bool) -> Halo:
    """Who needs which rows of whom for a halo.

    Returns
    -------
    rows : the rows of ours that are sent, those for rank 0 first
    send, recv : how many rows we send to, and receive from, each rank
    places : where the received rows belong in our extended array
    """
    edges = numpy.concatenate([[0], numpy.cumsum(counts)])
    n, size = edges[-1], len(counts)
    wanted = []
    for r in range(size):
        # Find the ghosts of a rank, and who has them
        ghosts: Array = numpy.r_[edges[r] - width : edges[r], edges[r + 1] : edges[r + 1] + width]
        place = numpy.r_[0:width, width + counts[r] : 2 * width + counts[r]]
        if not periodic or n == 0:
            inside = (ghosts >= 0) & (ghosts < n)
            ghosts, place = ghosts[inside], place[inside]
        ghosts = ghosts % max(n, 1)
        owner = numpy.searchsorted(edges, ghosts, side="right") - 1
        order = numpy.argsort(owner, kind="stable")
        wanted.append((ghosts[order], owner[order], place[order]))
    rows = numpy.concatenate([ghosts[owner == rank] for ghosts, owner, _ in wanted]) - edges[rank]
    send = [int(numpy.sum(owner == rank)) for _, owner, _ in wanted]
    recv = numpy.bincount(wanted[rank][1], minlength=size).tolist()
    return rows, send, recv, wanted[rank][2]


@operator
class halo:
    """Extend the part of each rank by the rows before and after it: from partitioned to partitioned.

    Parameters
    ----------
    x : partitioned, an array of shape (n, ...), where n may be another on each rank, and 0
    comm : MPI communicator
    width : int, how many rows are added on either side
    periodic : bool, whether the first row follows the last. If not, rows beyond the ends are zero

    Returns
    -------
    y : partitioned, of shape (n + 2 * width, ...)
    """

    ain = "x"
    aout = "y"
    collective = True
    placements = "partitioned -> partitioned"
    hvp = ZeroGradient

    def apl(node, x, comm, width=1, periodic=True):
        counts, dtype = find_counts(comm, x, width=width, periodic=periodic)
        if type(width) is not int or width < 0:
            raise ValueError(f"the width of a halo is a number of rows, not {width!r}")
        fail_together(comm, None if counts is not None and numpy.ndim(x) else "a halo needs an array")
        plan = plan_halo(counts, comm.rank, width, periodic)
        return dict(y=extend(numpy.asarray(x, dtype), plan, width, comm), plan=plan)

    def rcd(node, x, comm, width, periodic, y, plan):
        return dict(kinds=(describe(x), describe(y)), plan=plan, width=width, comm=comm)

    def vjp(node, _y, kinds, plan, width, comm):
        _y = dense(_y, kinds[1], comm)
        if _y is ZeroGradient:
            return dict(_x=_y)
        rows, send, recv, places = plan
        _, dtype = find_counts(comm, _y)
        _y = numpy.asarray(_y, dtype)
        _x = _y[width : len(_y) - width].copy()
        numpy.add.at(_x, rows, exchange_rows(_y[places], recv, send, comm))
        return dict(_x=_x)

    def jvp(node, x_, kinds, plan, width, comm):
        x_ = dense(x_, kinds[0], comm)
        if x_ is ZeroGradient:
            return dict(y_=x_)
        _, dtype = find_counts(comm, x_)
        return dict(y_=extend(numpy.asarray(x_, dtype), plan, width, comm))


def extend(x: Array, plan: Halo, width: int, comm: MPI.Comm) -> Array:
    """An array with its halo."""
    rows, send, recv, places = plan
    y = numpy.zeros((len(x) + 2 * width, *x.shape[1:]), x.dtype)
    y[width : width + len(x)] = x
    y[places] = exchange_rows(x[rows], send, recv, comm)
    return y
