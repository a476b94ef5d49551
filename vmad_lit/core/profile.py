"""Profiles: where the time and the memory of a run go, and how far it has come."""

from __future__ import annotations

import html
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, ClassVar, NamedTuple, Self

from . import draw
from .error import needed_for
from .execution import Plan, Slots, Step, collect, flatten
from .graph import Node
from .model import Model
from .ownership import with_steps
from .symbol import leaves
from .traffic import listen, stop
from .valuetypes import nbytes_of

Key = tuple[str, str, int]  # the name of a node, and the file and line where it was built


class Entry:
    """What was measured for a node, in one place of the nest of autooperators.

    Attributes
    ----------
    operator : str
        The name of the operator; `mul-vjp` is the vjp of `mul`.
    calls : int
    own, total : float
        Seconds, without and with the nodes inside.
    made, recorded : int
        Bytes of new arrays among the results, and of arrays that went on a tape, on this rank and by this
        node itself.
    messages, sent : int
        Messages from this rank to others while the node ran, and not one inside, and their bytes.
    parts : dict
        The entries of the nodes inside, in the order of their first call.
    """

    NUMBERS = "calls", "own", "total", "made", "recorded", "messages", "sent"

    def __init__(self, operator: str = "") -> None:
        self.operator = operator
        self.calls: float = 0
        self.own: float = 0.0
        self.total: float = 0.0
        self.made: float = 0
        self.recorded: float = 0
        self.messages: float = 0
        self.sent: float = 0
        self.parts: dict[Key, Entry] = {}

    def numbers(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: getattr(self, name) for name in self.NUMBERS}


class Profile:
    """Measures the runs of all models while it is open as a context, in the thread that opened it.

    Attributes
    ----------
    root : Entry
        Its `total` is the time for which the profile was open, its parts are the nodes of the models.
    """

    _repr_html_: ClassVar[Callable[..., str]]

    def __init__(self) -> None:
        self.root = Entry("all")
        self._stack = [self.root]
        self._plans: dict[Plan, Plan] = {}
        self._seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._before: Callable[..., Any] = Model.runner
        Model.runner = staticmethod(self._run)
        listen(self._hear)
        self._begin = perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        elapsed = perf_counter() - self._begin
        stop(self._hear)
        Model.runner = staticmethod(self._before)
        self.root.total += elapsed
        self.root.own = self.root.total - sum(part.total for part in self.root.parts.values())
        self._plans.clear()

    def _hear(self, way: str, messages: int, nbytes: int) -> None:
        """Count what the node that runs sends to other ranks."""
        if threading.get_ident() == self._thread:
            self._stack[-1].messages += messages
            self._stack[-1].sent += nbytes

    def _run(self, plan: Plan, *args: Any) -> Any:
        """Run a plan and measure it."""
        if threading.get_ident() != self._thread:
            return self._before(plan, *args)
        measured = self._plans.get(plan)
        if measured is None:
            measured = self._plans[plan] = with_steps(plan, lambda step: self._wrap(plan, step))
        values, slots = self._before(measured, *args)
        # Weigh what the run recorded
        for node in plan.nodes if plan.record else ():
            if node in plan.records:
                record = plan.records[node]
                targets = [record] if type(record) is int else list(record.values())
                entry = self._stack[-1].parts[key_of(node)]
                entry.recorded += nbytes_of([collect(slots, target) for target in targets], self._seen)
        return values, slots

    def _wrap(self, plan: Plan, step: Step) -> Step:
        node = step[1]
        if node is None:
            return step
        slots = plan._slots
        ins, outs = (
            [slots[leaf] for symbol in flatten(symbols) for leaf in leaves(symbol) if leaf in slots]
            for symbols in (node.varin, node.varout)
        )
        return measure, node, step, self, key_of(node), ins, outs

    # Measure a step
    def _measure(
        self, slots: Slots, node: Node, step: Step, key: Key, ins: list[int], outs: list[int]
    ) -> None:
        above = self._stack[-1]
        entry = above.parts.get(key)
        if entry is None:
            entry = above.parts[key] = Entry(node.primitive.name)
        seen: dict[int, Any] = {}
        for slot in ins:
            nbytes_of(slots[slot], seen)
        # Run the step against the clock
        self._stack.append(entry)
        begin = perf_counter()
        try:
            step[0](slots, step)
        finally:
            elapsed = perf_counter() - begin
            self._stack.pop()
            entry.calls += 1
            entry.total += elapsed
            entry.own += elapsed
            above.own -= elapsed
        if not entry.parts:
            entry.made += sum(nbytes_of(slots[slot], seen) for slot in outs)

    # Methods of profiles
    def by_node(self) -> list[Row]:
        """A row for each node, in the order of the first calls; `depth` counts the autooperators around it."""
        rows = []
        for path, (name, filename, line), entry in walk(self.root):
            place = f"{os.path.basename(filename)}:{line}"
            rows.append(Row(name, place=place, depth=len(path), **entry.numbers()))
        return rows

    def by_operator(self) -> list[Row]:
        """A row for each operator (or derivative of one), in the order of the time they took themselves."""
        sums: dict[str, Row] = {}
        for path, _, entry in walk(self.root):
            row = sums.get(entry.operator, Row(entry.operator))
            added = {name: getattr(row, name) + number for name, number in entry.numbers().items()}
            added["total"] = row.total + (0.0 if entry.operator in path else entry.total)
            sums[entry.operator] = row._replace(**added)
        return sorted(sums.values(), key=lambda row: (-row.own, row.name))

    def table(self, by: str = "operator") -> str:
        """The profile as a string, by "operator" or by "node"."""
        traffic = self._traffic()
        rows = [columns(traffic), *(row.cells(traffic) for row in self._rows(by))]
        if len(rows) > 101:
            rows[51:-50] = [[f"({len(rows) - 101} more)", *[""] * (len(rows[0]) - 1)]]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = []
        for row in rows:
            texts = [text.rjust(width) for text, width in zip(row[1:-1], widths[1:])]
            lines.append("  ".join([row[0].ljust(widths[0]), *texts, row[-1]]).rstrip())
        return "\n".join(lines)

    def _traffic(self) -> bool:
        """Whether anything was sent to other ranks."""
        return any(entry.messages for _, _, entry in walk(self.root))

    def _rows(self, by: str) -> list[Row]:
        if by not in ("node", "operator"):
            raise ValueError(f"a profile is read by 'operator' or by 'node', got {by!r}")
        return self.by_node() if by == "node" else self.by_operator()

    def __repr__(self) -> str:
        calls = sum(part.calls for _, _, part in walk(self.root))
        return f"profile of {calls:g} calls in {self.root.total:.3g} s"

    def __str__(self) -> str:
        return f"{self!r}\n{self.table()}"

    def plot(self, limit: int = 12) -> Any:
        """Draw time and bytes by operator, at most `limit` of them; returns the figure of matplotlib."""
        with needed_for("the picture of a profile", extra="output"):
            from matplotlib import pyplot
        rows = self.by_operator()[:limit][::-1]
        names = [row.name for row in rows]
        size = 8, 0.9 + 0.28 * len(rows)
        figure, (left, right) = pyplot.subplots(1, 2, sharey=True, figsize=size, layout="constrained")
        left.barh(names, [row.own * 1e3 for row in rows])
        left.set_xlabel("own time / ms")
        right.barh(names, [row.made / 1e6 for row in rows], label="made")
        right.barh(names, [row.recorded / 1e6 for row in rows], height=0.4, label="recorded")
        right.set_xlabel("megabytes")
        right.legend()
        return figure

    def over_ranks(self, comm: Any, sums: bool = False) -> tuple[Profile, Profile]:
        """The mean, or with `sums` the sum, and the largest values over the ranks of a communicator of mpi4py, as two
        profiles.

        A collective call; the results are the same on all ranks.
        """
        roots = comm.allgather(self.root)
        whole, largest = Profile(), Profile()
        whole.root = merge(roots, lambda numbers: sum(numbers) / (1 if sums else len(numbers)))
        largest.root = merge(roots, max)
        return whole, largest


def measure(slots: Slots, step: Step) -> None:
    """The step that calls another step, and measures it."""
    _, node, inner, profile, key, ins, outs = step
    profile._measure(slots, node, inner, key, ins, outs)


def key_of(node: Node) -> Key:
    return node.name, *node.place


class Row(NamedTuple):
    """A line of a profile; times are in seconds, sizes in bytes."""

    name: str
    calls: float = 0
    own: float = 0.0
    total: float = 0.0
    made: float = 0
    recorded: float = 0
    place: str = ""
    depth: int = 0
    messages: float = 0
    sent: float = 0

    def cells(self, traffic: bool = False) -> list[str]:
        """The strings in a table, with the `traffic` between ranks or without."""
        times = [f"{seconds * 1e3:.3f}" for seconds in (self.own, self.total)]
        sizes = [draw.in_bytes(size) for size in (self.made, self.recorded)]
        sizes += [f"{self.messages:g}", draw.in_bytes(self.sent)] if traffic else []
        return ["  " * self.depth + self.name, f"{self.calls:g}", *times, *sizes, self.place]


def columns(traffic: bool) -> list[str]:
    """The titles of the cells of rows."""
    sizes = ["made", "recorded", *(["messages", "sent"] if traffic else [])]
    return ["", "calls", "own ms", "total ms", *sizes, "built at"]


def walk(entry: Entry, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Key, Entry]]:
    """All entries inside one, each with the operators around it and its key."""
    for key, part in entry.parts.items():
        yield path, key, part
        yield from walk(part, (*path, part.operator))


def merge(entries: Sequence[Entry], combine: Callable[[list[float]], float]) -> Entry:
    """One entry made of several, with the numbers combined."""
    merged = Entry(next(entry.operator for entry in entries if entry.operator))
    for name in Entry.NUMBERS:
        setattr(merged, name, combine([getattr(entry, name) for entry in entries]))
    absent = Entry()
    for key in dict.fromkeys(key for entry in entries for key in entry.parts):
        merged.parts[key] = merge([entry.parts.get(key, absent) for entry in entries], combine)
    return merged


class Progress:
    """A monitor that shows a bar; made by `progress`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        with needed_for("a progress bar", extra="output"):
            from tqdm.auto import tqdm
        self._make, self._options = tqdm, options
        self._run: Callable[[], object] = lambda: None
        self._left = 0
        self.bar: Any = None

    def __call__(self, node: Node, inputs: Any, outputs: Any, context: Any) -> None:
        if context is not self._run():
            self._open(context)
        self.bar.update()
        self._left -= 1
        if self._left == 0:
            self.close()

    def _open(self, context: Any) -> None:
        self.close()
        self._run, self._left = weakref.ref(context), len(context.nodes)
        kinds = {node.primitive.kind for node in context.nodes}
        sweep = next((kind for kind in ("hvp", "vjp", "jvp") if kind in kinds), "forward")
        options = {"total": self._left, "desc": sweep, "unit": "node", "leave": False, **self._options}
        self.bar = self._make(**options)

    def close(self) -> None:
        """Remove the bar, if a run did not come to its end."""
        if self.bar is not None:
            self.bar.close()


def progress(everywhere: bool = False, always: bool = False, **options: Any) -> Progress:
    """A monitor with a progress bar: `m.compute(vout, init, monitor=progress())`.

    Parameters
    ----------
    everywhere : bool
        Show a bar on every rank, not only on rank 0.
    always : bool
        Show it also where the standard error is no terminal.
    options :
        For `tqdm`, as `desc`, `leave`, `file`.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    silent = mpi is not None and mpi.COMM_WORLD.rank > 0 and not everywhere
    return Progress({"disable": True if silent else False if always else None, **options})


def tables_of_profile(self: Profile) -> str:
    """The tables of a profile by operator and by node, which unfold, in HTML."""
    traffic = self._traffic()

    def cells(row: Row) -> list[str]:
        return [html.escape(text).replace("  ", "&emsp;") for text in row.cells(traffic)]

    tables = (draw.fold(f"by {by}", columns(traffic), self._rows(by), cells) for by in ("operator", "node"))
    return f"<p>{html.escape(repr(self))}</p>" + "".join(tables)


Profile._repr_html_ = tables_of_profile
