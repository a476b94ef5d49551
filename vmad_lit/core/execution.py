"""Plans: how a model is run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from typing import Any, ClassVar

from .declaration import NotRecorded, named
from .error import BrokenPrimitive, ExecutionError, ResolveError, did_you_mean
from .graph import NOWHERE, Graph, Node, Symbols
from .operator import ZeroGradient
from .symbol import AttrSymbol, BaseSymbol, Ignored, List, Literal, Value, leaves

Slots = list[Value]  # all values of a run
Step = tuple[Any, ...]  # a function, the node that it is for (or None), and what else the function needs
Target = Any  # the number of a slot, or a (nested) list of such numbers
Arrivals = tuple[tuple[str, Any], ...]  # names of inputs, and where their values live
LastUse = dict[Any, Node | None]  # from symbols to the nodes that use them last; None if a value stays


def find_needed(graph: Graph, vout: Iterable[str], results: bool = True) -> tuple[list[Node], LastUse]:
    """The nodes that have to run to compute the outputs named in `vout`, in order, and when values
    are used last: outputs never, unless it is only the nodes that matter and not the `results`."""
    last_use: LastUse = {leaf: None for name in vout for leaf in leaves(graph._outputs[name])}
    used = last_use.keys()
    needed = []
    for node in reversed(graph):
        varout = node.varout
        if not varout or not used.isdisjoint(varout.values()) or not used.isdisjoint(flatten(varout)):
            needed.append(node)
            note_use(last_use, node)
    # Let outputs die if nobody waits for them
    if not results:
        last_use = {}
        for node in needed:
            note_use(last_use, node)
    needed.reverse()
    return needed, last_use


def note_use(last_use: LastUse, node: Node) -> None:
    """Note that a node uses its arguments, unless it is known that a later one does."""
    for symbol in node.varin.values():
        for leaf in leaves(symbol) if isinstance(symbol, List) else (symbol,):
            last_use.setdefault(leaf, node)


def flatten(symbols: Symbols) -> list[BaseSymbol]:
    """The symbols in a dict of arguments or results, those in lists one by one."""
    flat = list(symbols.values())
    for symbol in flat:
        if isinstance(symbol, List):
            return [leaf for symbol in flat for leaf in leaves(symbol)]
    return flat


# What is recorded
def find_active(graph: Graph, nodes: Iterable[Node]) -> tuple[set[BaseSymbol], list[Node]]:
    """The symbols whose values depend differentiably on the inputs of the graph, and the nodes that
    compute them."""
    active: set[BaseSymbol] = set(graph._inputs.values())
    active_nodes: list[Node] = []
    for node in nodes:
        for name in node.primitive.ain:
            symbol = node.varin[name]
            if symbol in active or isinstance(symbol, List) and not active.isdisjoint(leaves(symbol)):
                active.update(flatten(node.varout))
                active_nodes.append(node)
                break
    return active, active_nodes


def find_recorded(active_nodes: Iterable[Node], last_use: LastUse) -> dict[Node, Symbols]:
    """For each node that computes active symbols, those that its derivatives read, by name; notes in
    `last_use` that they stay."""
    recorded: dict[Node, Symbols] = {}
    for node in active_nodes:
        operator = node.primitive.operator
        if node.primitive.kind == "apl":
            symbols = recorded[node] = {}
            if operator.rcd is None and operator.recorded:
                of_node = {**node.varout, **node.varin}
                symbols.update((name, of_node[name]) for name in operator.recorded if name in of_node)
                last_use.update(dict.fromkeys(flatten(symbols)))
    return recorded


class Layout:
    """Where the values of a run are kept, and the steps that compute them.

    Parameters
    ----------
    graph : Graph
    last_use : dict
        Which node uses a symbol last; None if its value stays.
    recorded : dict
        For each node that records, the symbols that its derivatives read, by name.
    record, reuse, base
        As for `Plan`.
    placed : dict
        For nodes of which it is known where the values of arguments live, that; see `Places`.

    Attributes
    ----------
    slots : dict
        From symbols to the numbers of their slots. Several symbols have a slot in turn.
    steps, template, records
        See `Plan`.
    make_step : callable
        Makes the step of a node, from what `general_step` takes.
    """

    make_step: ClassVar[Callable[..., Step]]

    def __init__(
        self,
        graph: Graph,
        last_use: LastUse,
        recorded: Mapping[Node, Symbols],
        record: bool = False,
        reuse: bool = True,
        base: Plan | None = None,
        placed: Mapping[Any, Mapping[str, Any]] = NOWHERE,
    ) -> None:
        self.graph, self.last_use, self.recorded, self.placed = graph, last_use, recorded, placed
        self.record, self.reuse, self.base = record, reuse, base
        self.slots: dict[Any, int] = {}
        self.steps: list[Step] = []
        self.records: dict[Node, Any] = {}
        # Prepare the slots
        self.offset = base.size if base else 0
        self.template: Slots = []
        self._constants: dict[BaseSymbol, int] = {}
        self._free: list[int] = []
        # Prepare for what dies
        self._saw_list = False

        self.last_reads: dict[int, int] = {}

        self.stand_ins: dict[Node, Node] = {}

    def new_slot(self, value: Value = None) -> int:
        self.template.append(value)
        return self.offset + len(self.template) - 1

    def place(self, symbol: BaseSymbol) -> int:
        """Give a slot to a symbol."""
        slot = self.slots[symbol] = self._free.pop() if self._free else self.new_slot()
        return slot

    def target(self, symbol: BaseSymbol) -> Target:
        """The slot of a symbol; for a List, the list of the slots of its items."""
        slot: Target = self.slots.get(symbol)
        if slot is None:
            # Find a slot for a symbol that is no result
            if type(symbol) is Literal:
                slot = self._constants.get(symbol)
                if slot is None:
                    slot = self._constants[symbol] = self.new_slot(symbol._value)
            # Look into a list, or at an attribute
            elif isinstance(symbol, List):
                slot = [self.target(item) for item in symbol]
            elif isinstance(symbol, AttrSymbol):
                slot = self.add_step(get_attribute, self.target(symbol._parent), symbol._attrname)
            else:
                raise ResolveError(
                    f"the symbol '{symbol!r}' has no value: it is not an input, and no node before its use computes it"
                )
        return slot

    # Small steps of a layout
    def add_step(self, function: Callable[..., None], *operands: Any) -> int:
        """Append a small step, whose result goes into a new slot."""
        slot = self.new_slot()
        # Note what a small step reads of a tape
        if self.base is not None:
            self.note_reads(operands)
        self.steps.append((function, None, slot, *operands))
        return slot

    def packed(self, target: Target) -> int:
        """One slot for the value of an argument, also for a list of slots."""
        return target if type(target) is int else self.add_step(pack, target)

    def note_reads(self, operands: Iterable[Any]) -> None:
        """Note that the next step reads what of these are slots on the tape, or lists of slots."""
        for operand in operands:
            if type(operand) in (int, list):
                self.last_reads.update(
                    (slot, len(self.steps)) for slot in numbers_in(operand) if slot < self.offset
                )

    def add_node(self, node: Node) -> None:
        """Append the step of a node, and the small ones before it that it needs."""
        primitive, slots, last_use, varin = node.primitive, self.slots, self.last_use, node.varin
        # Expect nothing special
        names = primitive.argnames
        record: Any = None
        linear: list[int] | None = None
        extras: Sequence[tuple[str, int]] = ()
        kept: int | None = None
        # Find the slots of the arguments
        # Leave to the step what lies in a record in a row
        if primitive.from_record and type(kept_record := record_of(node, self.base)) is int:
            names, record = tuple(primitive.ain), (taker(primitive.from_record), kept_record)
        ins: list[int] = []
        dead: list[int] = []
        clear: list[int] = []
        for name in names:
            symbol = varin.get(name)
            slot = slots.get(symbol)
            if slot is None:
                slot = self.find_argument(node, name, dead, clear)
            # Note that a value dies
            elif last_use[symbol] is node and slot not in dead:
                dead.append(slot)
            ins.append(slot)
        outs = self.place_results(node, dead, clear)
        # Arrange for what is recorded
        if node in self.recorded:
            extras, kept = self.arrange_record(node, names, ins)
        # See whether a derivative can be zero
        if primitive.kind != "apl" and not primitive.operator.collective:
            linear = self.find_linear(node, names, ins)
        # Note what the step reads of a tape
        if self.base is not None:
            self.note_reads(ins if record is None else [*ins, record[1]])
        # Tell the node what it can leave out
        if len(outs) < len(node.varout) or node in self.placed:
            node = self.tell(node, outs)
        function = primitive.recording_call if self.record else primitive.call
        make = self.make_step
        # Take the general step for lists
        if self._saw_list:
            make, self._saw_list = general_step, False
        self.steps.append(make(node, function, ins, record, linear, outs, extras, kept, clear))

    def find_argument(self, node: Node, name: str, dead: list[int], clear: list[int]) -> int:
        """The slot of an argument that is not a result; adds to the slots that die at the node, or are to be cleared."""
        symbol: Any = node.varin.get(name)
        # Find on the tape what is no argument of a derivative
        if symbol is None:
            return self.find_on_tape(node, name)
        slot: int = self.packed(self.target(symbol))
        # Let the items of a list die with it
        if isinstance(symbol, List):
            dying = [
                leaf for leaf in leaves(symbol) if self.last_use.get(leaf) is node and leaf in self.slots
            ]
            dead += sorted({self.slots[leaf] for leaf in dying}.difference(dead))
            if name not in self.recorded.get(node, ()):
                clear.append(slot)
            self._saw_list = True
        return slot

    def place_results(self, node: Node, dead: list[int], clear: list[int]) -> list[tuple[str, Target]]:
        """Slots for the results that are used, by name; what dies and gets no result is to be cleared."""
        # Let results take the place of what dies
        others = len(self._free)
        self._free += dead if self.reuse else ()
        outs = []
        for name, symbol in node.varout.items():
            if symbol in self.last_use:
                outs.append((name, self.place(symbol)))
            elif isinstance(symbol, List):
                outs.append((name, self.place_items(symbol)))
        # Clear what dies and gets no result
        clear += self._free[others:] if self.reuse else dead
        return outs

    # Places for the items of a list
    def place_items(self, symbol: BaseSymbol) -> Target:
        """Slots for a result that is used, or for the items of a List; None if it is not used."""
        if isinstance(symbol, List):
            # Note that a result is a list
            self._saw_list = True
            return [self.place_items(item) for item in symbol]
        return self.place(symbol) if symbol in self.last_use else None

    # What derivatives need of a layout
    def arrange_record(
        self, node: Node, names: Sequence[str], ins: Sequence[int]
    ) -> tuple[Sequence[tuple[str, int]], int | None]:
        """Note where a node keeps its record; returns the slots of extras, by name, and that of a dict."""
        operator = node.primitive.operator
        if operator.rcd is not None:
            kept = self.records[node] = self.new_slot()
            return (), kept
        extras = [(name, self.new_slot()) for name in operator.extras]
        if operator.recorded:
            # Note the slots of what is recorded
            places = dict(zip(names, ins))
            self.records[node] = {
                name: places[name] if name in places else self.target(symbol)
                for name, symbol in self.recorded[node].items()
            }
            self.records[node].update(extras)
        return extras, None

    def find_on_tape(self, node: Node, name: str) -> int:
        """A slot for an argument of a derived node that comes from the record of the original node."""
        record = record_of(node, self.base)
        if type(record) is int:
            return self.add_step(get_recorded, record, name, node.forward)
        if name in record:
            return self.packed(record[name])
        return self.new_slot(node.primitive.defaults[name])

    def find_linear(self, node: Node, names: Sequence[str], ins: Sequence[int]) -> list[int]:
        """The slots of the tangents or cotangents of a derivative, which is zero if all of these are."""
        primitive, varin = node.primitive, node.varin
        # Look at both factors of a second derivative
        if primitive.kind == "hvp":
            of_names = dict(zip(names, ins))
            factors = ([of_names[name] for name in factor] for factor in primitive.factors)
            return [self.add_step(product, *factors)]
        return [
            slot
            for name, slot in zip(names, ins)
            if name in primitive.ain
            and not (type(symbol := varin[name]) is Literal and symbol._value is ZeroGradient)
        ]

    # What a node can leave out
    def tell(self, node: Node, outs: Iterable[tuple[str, Target]]) -> Node:
        """The node to be called if only some of the results of a node are used, or if it is known where
        arguments live."""
        used, placed = [name for name, _ in outs], self.placed.get(node)
        if not placed and all(name in used or symbol is Ignored for name, symbol in node.varout.items()):
            return node
        stand_in = self.stand_ins[node] = node.stand_in(used, placed=placed)
        return stand_in


# Small steps
def get_attribute(s: Slots, step: Step) -> None:
    _, _, slot, parent, name = step
    s[slot] = getattr(s[parent], name)


def pack(s: Slots, step: Step) -> None:
    _, _, slot, target = step
    s[slot] = collect(s, target)


def collect(s: Slots, target: Target) -> Value:
    """The value in a slot, or the list of the values in a (nested) list of slots."""
    return s[target] if type(target) is int else [collect(s, item) for item in target]


def numbers_in(target: Target) -> list[int]:
    """The slots of a target, or of the values of a dict."""
    if type(target) is int:
        return [target]
    items = target.values() if type(target) is dict else target
    return [slot for item in items for slot in numbers_in(item)]


def scatter(s: Slots, target: Target, value: Value) -> None:
    """Store a value in a slot, or the items of a list in a (nested) list of slots; None is no slot."""
    if type(target) is int:
        s[target] = value
    elif target is not None:
        for item, v in zip(target, items_for(target, value)):
            scatter(s, item, v)


def items_for(target: Sequence[Target], value: Value) -> Any:
    """The items of a value that belongs in a list of slots."""
    if value is ZeroGradient:
        return value
    if not hasattr(value, "__iter__"):
        raise ExecutionError(f"a list of {len(target)} was to be returned, and {describe(value)} was")
    if not hasattr(value, "__len__"):
        value = list(value)
    if len(value) != len(target):
        raise ExecutionError(
            f"a list of {len(target)} was to be returned, as the call of the operator says (ListPlaceholder), "
            f"and one of {len(value)} was"
        )
    return value


def record_of(node: Node, base: Plan | None) -> Any:
    """What the original of a derived node recorded in the plan `base`: the slot of a dict, or a dict of slots."""
    return base.records.get(node.forward, {}) if base and node.forward else {}


def get_recorded(s: Slots, step: Step) -> None:
    _, _, slot, record, name, node = step
    s[slot] = find_extra(node, name, s[record])


def is_zero(value: Value) -> bool:
    """Whether a tangent or cotangent is ZeroGradient, or a list of nothing else."""
    return all(map(is_zero, value)) if type(value) is list else value is ZeroGradient


def product(s: Slots, step: Step) -> None:
    """ZeroGradient if the values of all slots of any of some groups are, else None."""
    _, _, slot, *factors = step
    s[slot] = ZeroGradient if any(all(is_zero(s[i]) for i in factor) for factor in factors) else None


# The step of a node
def execute(s: Slots, step: Step) -> None:
    """Call the function of a node."""
    _, node, function, gather, record, linear, outs, extras, kept, clear = step
    args, zero = gather(s), False
    # Prepare the call of a derivative
    if linear is not None:
        zero = all(is_zero(s[slot]) for slot in linear)
    if record is not None and not zero:
        args = *args, *take_recorded(s, record, node)
    r: Any = as_dict(ZeroGradient if zero else function(node, *args), node)
    # Record what was computed
    if kept is not None:
        operator = node.primitive.operator
        s[kept] = operator.rcd(node, **{**r, **dict(zip(operator.apl.argnames, args))})
    # Store the results
    for name, target in outs:
        value = the_only(r, name, node)
        if linear is not None and value.__class__ is int and value == 0:
            value = ZeroGradient
        scatter(s, target, value)
    # Store what only derivatives read
    for name, slot in extras:
        s[slot] = find_extra(node, name, r, NotRecorded(r))
    del args
    for slot in clear:
        s[slot] = None


def gatherer(slots: Sequence[int]) -> Callable[[Slots], Any]:
    """A function that returns the values in some slots in a row."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return itemgetter(slice(slots[0], slots[0] + 1) if slots else slice(0))


def general_step(node: Node, function: Callable[..., Any], ins: Sequence[int], *others: Any) -> Step:
    """The step of a node; `others` are the names in `execute` from `record` on."""
    return execute, node, function, gatherer(ins), *others


Layout.make_step = staticmethod(general_step)


def as_dict(r: Any, node: Node) -> dict[str, Value]:
    """What a function returned, as a dict."""
    names = node.primitive.outnames
    if type(r) is dict:
        return r
    if r is ZeroGradient and node.primitive.kind != "apl":
        return dict.fromkeys(names, r)
    if len(names) == 1:
        return {names[0]: r}
    if not names and r is None:
        return {}
    raise broken(node, r)


def the_only(r: dict[str, Value], name: str, node: Node) -> Value:
    """The result of a name in what a function returned."""
    try:
        return r[name]
    except KeyError:
        raise broken(node, r) from None


def broken(node: Node, r: Any) -> ExecutionError:
    got = f"a dict with {list(r)}" if isinstance(r, dict) else f"an object of type {type(r).__name__}"
    return ExecutionError(
        f"{node.primitive.name} returned {got}, and is declared to return {list(node.primitive.outnames)} "
        f"({named(node.prototype)})"
    )


# What derivatives take from a record
@lru_cache(None)
def taker(names: tuple[str, ...]) -> Callable[[dict[str, Value]], Any]:
    """A function that takes values by name, in a row, from a dict."""
    return itemgetter(*names) if len(names) > 1 else lambda record: (record[names[0]],)


def take_recorded(s: Slots, record: tuple[Callable[..., Any], int], node: Any) -> Any:
    """What a derivative takes, in a row, from what the original of its node recorded."""
    take, kept = record
    try:
        return take(s[kept])
    except KeyError:
        return [find_extra(node.forward, name, s[kept]) for name in node.primitive.from_record]


def find_extra(node: Node, key: str, r: dict[str, Value], otherwise: Value = None) -> Value:
    """What `apl` or `rcd` returned under a name that a derivative takes, or its default value."""
    if key in r:
        return r[key]
    for primitive in (node.operator.vjp, node.operator.jvp, node.operator.hvp):
        if primitive and key in primitive.defaults:
            return primitive.defaults[key]
    if otherwise is not None:
        return otherwise
    # Complain that nobody recorded it
    raise BrokenPrimitive(
        f"a derivative of operator {node.operator.__name__} takes '{key}', which has not been "
        f"recorded; recorded are {list(r)}"
    )


# Where values live
class Places:
    """Where the values of a run live. One process has nothing to tell of it, and so this is empty.

    Attributes
    ----------
    arrivals : tuple of (name, placement)
        What is known of inputs.
    of, seen : dict
        What is known of symbols; for each node of which anything is, of its arguments, by name.
    spread : dict
        For nodes that take values apart over ranks, the names of these arguments.
    complaint : Exception or None
        What is wrong with an output.
    """

    def __init__(
        self, graph: Graph, nodes: Iterable[Node], arrivals: Arrivals, vout: Iterable[str] = ()
    ) -> None:
        self.arrivals = arrivals
        self.of: dict[BaseSymbol, Any] = {}
        self.seen: dict[Node, dict[str, Any]] = {}
        self.spread: dict[Node, Collection[str]] = {}
        self.complaint: Exception | None = None


class Plan:
    """How to compute some outputs of a graph.

    Parameters
    ----------
    graph : Graph
    vout : sequence of str
        The names of the outputs.
    record : bool
        Whether the slots keep what the derivatives need.
    reuse : bool
        Whether slots may be used again; not if somebody wants to look at values by name.
    base : Plan, optional
        For a derived graph the recording plan of the original, whose slots precede ours.
    donated : collection of str
        The inputs whose values may be overwritten.
    results : bool
        Whether the outputs are wanted, or only the tape of a run that computes them.
    arrivals : tuple of (name, placement)
        Where the values of inputs live, as far as it is known.

    Attributes
    ----------
    nodes : list of Node
        Those that run.
    steps : list of tuple
        What is done, see `execute`.
    template : list
        The slots before the first step; `size` is the number of the slot behind them.
    inputs : dict
        The slots of the inputs that are needed, by name.
    outputs : list
        The slots of the outputs, or (nested) lists of slots.
    places : Places
        Where values live, found by `find_places`.
    made_for : tuple
        What a model was asked for when it made the plan.
    """

    find_places: ClassVar[Callable[..., Places]] = Places
    made_for: tuple[Any, ...] = ()
    # What others want to know of a plan
    active: set[BaseSymbol]  # if recording, the values that have derivatives
    records: dict[
        Node, Any
    ]  # where the record of a node is: the slot of what `rcd` returned, or slots by name
    unrecorded: list[int]  # the slots of outputs that no node recorded
    derived: dict[str, Any]  # the models derived from this plan, so that they are made only once
    forms: dict[Node, int]  # for some nodes the slot with the looks of their values, see `core.watching`
    last_reads: dict[int, int]  # for each slot of the tape that is read, the step that reads it last

    stand_ins: dict[Node, Node]  # from nodes to those that are called in their place
    fresh_outputs: tuple[str, ...] = ()  # the outputs that are new arrays, which nobody else holds

    consuming: list[Step] | None = None  # the steps for a tape that is used for the last time

    def __init__(
        self,
        graph: Graph,
        vout: Iterable[str],
        record: bool = False,
        reuse: bool = True,
        base: Plan | None = None,
        donated: Collection[str] = (),
        results: bool = True,
        arrivals: Arrivals = (),
    ) -> None:
        self.vout, self.donated = tuple(vout), tuple(donated)
        self.record, self.base = record, base
        self.size: int
        with undisturbed():
            # Find out what is needed and what is recorded
            self.nodes, last_use = find_needed(graph, self.vout, results)
            recorded: dict[Node, Symbols] = {}
            # Find out what is recorded
            self.active: set[BaseSymbol] = set()
            self.derived: dict[str, Any] = {}
            if record:
                self.active, active_nodes = find_active(graph, self.nodes)
                recorded = find_recorded(active_nodes, last_use)
            # Lay out the values
            self.places = self.find_places(graph, self.nodes, arrivals, self.vout)
            layout = Layout(graph, last_use, recorded, record, reuse, base, self.places.seen)
            self.inputs = {name: layout.place(x) for name, x in graph._inputs.items() if x in last_use}
            for node in self.nodes:
                layout.add_node(node)
            self.outputs = [layout.target(graph._outputs[name]) for name in self.vout] if results else []
            self.steps, self.template, self._slots = layout.steps, layout.template, layout.slots
            # Keep what the layout found out
            self.records = layout.records
            kept = {slot for record in self.records.values() for slot in numbers_in(record)}
            self.unrecorded = [slot for slot in numbers_in(self.outputs) if slot not in kept]
            self.forms = {}

            self.last_reads = layout.last_reads

            self.stand_ins = layout.stand_ins
            # Improve the plan
            for improve in PASSES:
                improve(self, layout)
        self.size = layout.offset + len(self.template)

    def run(
        self,
        init: Mapping[str, Value],
        tape: Slots | None = None,
        monitor: Callable[..., object] | None = None,
    ) -> tuple[list[Value], Slots]:
        """Run the plan.

        Parameters
        ----------
        init : dict
            Values of the inputs.
        tape : list, optional
            For a derived graph: the slots that a run of `base` left behind.
        monitor : callable, optional
            `monitor(node, inputs, outputs, context)` is called after each node with the symbols of
            the node by name, and a mapping from the names of symbols to values.

        Returns
        -------
        values : list
            The outputs, in the order of `vout`.
        slots : list
            All slots, as the run leaves them.
        """
        slots = self.template.copy() if tape is None else tape + self.template
        return self.follow(self.steps, slots, init, monitor)

    def follow(
        self,
        todo: Sequence[Step],
        slots: Slots,
        init: Mapping[str, Value],
        monitor: Callable[..., object] | None = None,
    ) -> tuple[list[Value], Slots]:
        """Go through steps, with given slots; the rest is as for `run`."""
        for name, slot in self.inputs.items():
            if name not in init:
                # Complain about a missing input
                raise ResolveError(
                    f"the input '{name}' is needed and was not given" + did_you_mean(name, list(init))
                )
            slots[slot] = init[name]
        steps: Any = iter(todo)
        try:
            # Go through the steps
            if monitor is None:
                for step in steps:
                    step[0](slots, step)
            else:
                # Let the monitor look on
                context = Context(self, slots)
                for step in steps:
                    function, node, *_ = step
                    function(slots, step)
                    if node is not None:
                        monitor(node, node.varin, node.varout, context)
        except Exception as error:
            # Tell in which node it happened
            node = todo[len(todo) - steps.__length_hint__() - 1][1]
            if node is not None:
                filename, line = node.place
                arguments = ", ".join(
                    f"{name}: {describe(self._value(symbol, slots))}"
                    for name, symbol in node.varin.items()
                    if not any(isinstance(leaf, AttrSymbol) for leaf in leaves(symbol))
                )
                error.add_note(f"in {node.name}({arguments}), built at {filename}:{line}")
            raise
        return [collect(slots, target) for target in self.outputs], slots

    def _value(self, symbol: BaseSymbol, slots: Slots) -> Value:
        """The value of an argument, as long as it is alive."""
        if isinstance(symbol, List):
            return [self._value(item, slots) for item in symbol]
        return symbol._value if isinstance(symbol, Literal) else slots[self._slots[symbol]]


def describe(value: Value) -> str:
    """A few words about a value: its type, and its shape and dtype if it has any."""
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return repr(value) if len(repr(value)) < 40 else type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ + (f" {dtype}{list(shape)}" if isinstance(shape, tuple) else "")


# Passes
PASSES: list[Callable[[Plan, Layout], None]] = []  # what later chapters do to a plan that works already


# Pause of the garbage collector
@contextmanager
def undisturbed() -> Iterator[None]:
    """Suspend the cyclic garbage collector, for code that makes many objects that stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Context(Mapping[str, Value]):
    """The values of a run, by the names of their symbols; for monitors. A value that died is None.

    The list `nodes` tells which nodes the run consists of.
    """

    def __init__(self, plan: Plan, slots: Slots) -> None:
        self.nodes = plan.nodes
        self._slots = {symbol._name: slot for symbol, slot in plan._slots.items()}
        self._values = slots

    def __getitem__(self, name: str) -> Value:
        return self._values[self._slots[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)
