"""Plans: how a model is run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from typing import Any

from .error import BrokenPrimitive, ExecutionError, ResolveError, did_you_mean
from .graph import Graph, Node, Symbols
from .operator import ZeroGradient
from .symbol import AttrSymbol, BaseSymbol, Ignored, List, Literal, Symbol, Value, leaves

Slots = list[Value]  # all values of a run
Step = tuple[Any, ...]  # a function, the node that it is for (or None), and what else the function needs
Target = Any  # the number of a slot, or a (nested) list of such numbers


def find_needed(graph: Graph, vout: Iterable[str]) -> tuple[list[Node], dict[Any, Node | None]]:
    """The nodes that have to run to compute the outputs named in `vout`, in order, and when values
    are used last.

    The latter is a dict from each symbol that is used to the node that uses it last; for an output
    that is None.
    """
    last_use: dict[Any, Node | None] = {leaf: None for name in vout for leaf in leaves(graph._outputs[name])}
    used = last_use.keys()
    needed = []
    for node in reversed(graph):
        varout = node.varout
        if not varout or not used.isdisjoint(varout.values()) or not used.isdisjoint(flatten(varout)):
            needed.append(node)
            note_use(last_use, node)
    needed.reverse()
    return needed, last_use


def note_use(last_use: dict[Any, Node | None], node: Node) -> None:
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

    Attributes
    ----------
    nodes : list of Node
        Those that run.
    steps : list of tuple
        What is done, see `call`.
    active : set of Symbol
        If recording: the values that have derivatives.
    records : dict
        If recording: for each node where to find what it recorded. Either the slot of the dict that
        its `rcd` returned, or a dict from names to slots.
    unrecorded : list of int
        The slots of outputs that no node recorded.
    fresh_outputs : tuple of str
        The outputs that are new arrays, which nobody else holds.
    derived : dict
        The models derived from this plan, so that they are made only once.
    acting : dict
        From nodes to those that stand for them.
    """

    def __init__(
        self,
        graph: Graph,
        vout: Iterable[str],
        record: bool = False,
        reuse: bool = True,
        base: Plan | None = None,
        donated: Collection[str] = (),
        results: bool = True,
    ) -> None:
        self.vout = tuple(vout)
        self.record = record
        self.base = base
        self.records: dict[Node, Any] = {}
        self.derived: dict[str, Any] = {}
        self.acting: dict[Node, Node] = {}
        self.steps: list[Step] = []
        self.size: int
        self._last_reads: dict[int, int] = {}
        self._consuming: list[Step] | None = None
        with undisturbed():
            self.nodes, self._last_use = find_needed(graph, self.vout)
            if not results:
                self._last_use = {}
                for node in reversed(self.nodes):
                    note_use(self._last_use, node)
            # Find out what is recorded
            self.active: set[BaseSymbol] = set()
            recording: list[Node] = []
            if record:
                self.active, recording = find_active(graph, self.nodes)
            self._recorded: dict[Node, Symbols] = {}
            for node in recording:
                symbols: Symbols = {}
                self._recorded[node] = symbols
                operator = node.primitive.operator
                if operator.rcd is None and operator.recorded:
                    of_node = {**node.varout, **node.varin}
                    symbols.update((name, of_node[name]) for name in operator.recorded if name in of_node)
                    self._last_use.update(dict.fromkeys(flatten(symbols)))
            # Prepare the slots
            self.offset = base.size if base else 0
            self.template: Slots = []
            self._slots: dict[Any, int] = {}
            self._constants: dict[BaseSymbol, int] = {}
            self._free: list[int] | None = [] if reuse else None
            self._may_change_values = reuse and not record
            self._private: set[Any] = set()
            if reuse:
                self._private.update(graph._inputs[name] for name in donated if name in graph._inputs)
            self._totals: dict[BaseSymbol, int] = {}
            # Plan all nodes
            self.inputs = {
                name: self._give_slot(symbol)
                for name, symbol in graph._inputs.items()
                if symbol in self._last_use
            }
            for node in self.nodes:
                self._plan_node(node)
            wanted = [graph._outputs[name] for name in self.vout] if results else []
            self.outputs = [self._target(symbol) for symbol in wanted]
            recorded = {slot for record in self.records.values() for slot in numbers_in(record)}
            self.unrecorded = [slot for slot in numbers_in(self.outputs) if slot not in recorded]
            self.fresh_outputs = tuple(
                name
                for name, symbol in zip(self.vout, wanted)
                if symbol in self._private
                and wanted.count(symbol) == 1
                and self._slots[symbol] not in recorded
            )
            self.size = self.offset + len(self.template)
            del self._last_use, self._recorded, self._free, self._totals, self._private

    def _new_slot(self, value: Value = None) -> int:
        self.template.append(value)
        return self.offset + len(self.template) - 1

    def _give_slot(self, symbol: BaseSymbol) -> int:
        slot = self._slots[symbol] = self._free.pop() if self._free else self._new_slot()
        return slot

    def _target(self, symbol: BaseSymbol) -> Target:
        """The slot of a symbol; for a List, the list of the slots of its items."""
        slot: Target = self._slots.get(symbol)
        if slot is None:
            # Find a slot for a symbol that is no result
            if type(symbol) is Literal:
                slot = self._constants.get(symbol)
                if slot is None:
                    slot = self._constants[symbol] = self._new_slot(symbol._value)
            elif isinstance(symbol, List):
                slot = [self._target(item) for item in symbol]
            elif isinstance(symbol, AttrSymbol):
                slot = self._add_step(get_attribute, self._target(symbol._parent), symbol._attrname)
            else:
                raise ResolveError(
                    f"the symbol '{symbol!r}' has no value: it is not an input, and no node before its use computes it"
                )
        return slot

    def _slot(self, target: Target) -> int:
        """One slot for the value of an argument, also for a list of slots."""
        return target if type(target) is int else self._add_step(pack, target)

    def _add_step(self, function: Callable[..., None], *operands: Any) -> int:
        slot = self._new_slot()
        self._note_reads(operands)
        self.steps.append((function, None, slot, *operands))
        return slot

    def _note_reads(self, operands: Iterable[Any]) -> None:
        """Note that the next step reads what of these are slots on the tape, or lists of slots."""
        if self.base is None:
            return
        for operand in operands:
            if type(operand) in (int, list):
                self._last_reads.update(
                    (slot, len(self.steps)) for slot in numbers_in(operand) if slot < self.offset
                )

    def _record_of(self, node: Node) -> Any:
        """What the original of a derived node recorded: the slot of a dict, or a dict of slots by name."""
        return self.base.records.get(node.forward, {}) if self.base and node.forward else {}

    def _find_on_tape(self, node: Node, name: str) -> int:
        """A slot for an argument of a derived node that comes from the record of the original node."""
        record = self._record_of(node)
        if type(record) is int:
            return self._add_step(get_recorded, record, name, node.forward)
        if name in record:
            return self._slot(record[name])
        return self._new_slot(node.primitive.defaults[name])

    def _plan_node(self, node: Node) -> None:
        primitive, slots, last_use = node.primitive, self._slots, self._last_use
        # Find the slots of the arguments, and those that die here
        ins: list[int] = []
        dead: list[int] = []
        clear: list[int] = []
        lists = False
        varin: dict[str, Any] = node.varin
        names: Collection[str] = primitive.argnames
        record = None
        if primitive.from_record and type(kept_record := self._record_of(node)) is int:
            names, record = primitive.ain, (taker(primitive.from_record), kept_record)
        for name in names:
            symbol = varin.get(name)
            slot = slots.get(symbol)
            if slot is None:
                # Find the slot of an argument that is not a result
                if symbol in self._constants:
                    slot = self._constants[symbol]
                elif type(symbol) is Literal:
                    slot = self._constants[symbol] = self._new_slot(symbol._value)
                elif symbol is None:
                    slot = self._find_on_tape(node, name)
                elif not isinstance(symbol, List):
                    slot = self._target(symbol)
                else:
                    lists = True
                    slot = self._slot(self._target(symbol))
                    leaf_slots = {
                        slots[leaf] for leaf in leaves(symbol) if leaf in slots and last_use[leaf] is node
                    }
                    dead += sorted(leaf_slots.difference(dead))
                    if name not in self._recorded.get(node, ()):
                        clear.append(slot)
            elif last_use[symbol] is node and slot not in dead:
                dead.append(slot)
            ins.append(slot)
        # Give slots to the results
        free = self._free if self._free is not None else []
        others = len(free)
        free += dead
        outs = []
        for name, symbol in node.varout.items():
            if symbol in last_use:
                outs.append((name, self._give_slot(symbol)))
            elif isinstance(symbol, List):
                lists = True
                outs.append((name, self._give_slots(symbol)))
        clear += free[others:]
        # Tell the operator what nobody uses
        used = [name for name, _ in outs]
        owned = self._find_donated(node, dead, primitive.operator.inplace)
        unused = any(name not in used and symbol is not Ignored for name, symbol in node.varout.items())
        acting = node.acting(used, owned) if owned or unused else node
        if self._free is not None:
            own = primitive.operator.fresh_results(acting, self)
            if primitive.operator.alias and primitive.kind == "vjp" and len(outs) == 1:
                own = used if self._find_donated(node, dead, primitive.ain) else []
            if self._private:
                self._private.difference_update(flatten(varin))
            self._private.update(node.varout[name] for name in own)
        if acting is not node:
            self.acting[node] = acting
        # Arrange for the record
        recorded = self._recorded.get(node)
        extras: list[tuple[str, int]] = []
        kept = None
        if recorded is not None:
            operator = primitive.operator
            if operator.rcd is not None:
                kept = self.records[node] = self._new_slot()
            elif operator.recorded:
                extras = [(name, self._new_slot()) for name in operator.extras]
                places = dict(zip(names, ins))
                self.records[node] = {
                    name: places[name] if name in places else self._target(symbol)
                    for name, symbol in recorded.items()
                }
                self.records[node].update(extras)
        # Choose the step
        function = primitive.recording_call if self.record else primitive.call
        single = len(outs) == len(node.varout) == 1 and not lists and not extras
        linear = None
        if primitive.kind != "apl" and not primitive.operator.collective:
            # Find the cotangents or tangents
            linear = [
                slot
                for name, slot in zip(names, ins)
                if name in primitive.ain
                and not (type(varin[name]) is Literal and varin[name]._value is ZeroGradient)
            ]
            if primitive.kind == "hvp":
                of_names = dict(zip(names, ins))
                factors = ([of_names[name] for name in factor] for factor in primitive.factors)
                linear = [self._add_step(product, *factors)]
        if single and kept is None and linear is None and record is None and len(clear) < 2:
            ((name, out),) = outs
            spent = (clear or [out])[0]
            if primitive.operator.grow and self._may_change_values:
                step = self._plan_total(node, ins[0], ins[1], out, spent)
            elif len(ins) == 2:
                step = call_two, acting, function, *ins, name, out, spent
            else:
                step = call, acting, function, gatherer(ins), name, out, spent
        elif single and kept is not None and linear is None:
            step = call_and_record, acting, function, gatherer(ins), *outs[0], kept, clear
        elif linear is not None and not clear and not lists and len(linear) == 1:
            # Choose the step of a derivative
            if single and ins[0] == linear[0] and (record is None or len(ins) == 1):
                step = differentiate_one, acting, function, ins[0], gatherer(ins[1:]), record, *outs[0]
            else:
                step = differentiate, acting, function, gatherer(ins), record, linear[0], outs
        elif linear is not None and single and len(clear) < 2 and len(linear) == 2:
            ((name, out),) = outs
            step = (
                differentiate_two,
                acting,
                function,
                gatherer(ins),
                record,
                *linear,
                name,
                out,
                (clear or [out])[0],
            )
        else:
            step = execute, acting, function, gatherer(ins), record, linear, outs, extras, kept, clear
        self._note_reads(ins if record is None else [*ins, record[1]])
        self.steps.append(step)

    def _give_slots(self, symbol: BaseSymbol) -> Target:
        """Slots for a result that is used, or for the items of a List; None if it is not used."""
        if isinstance(symbol, List):
            return [self._give_slots(item) for item in symbol]
        return self._give_slot(symbol) if symbol in self._last_use else None

    def _find_donated(self, node: Node, dead: list[int], names: Iterable[str]) -> list[str]:
        """Those of some arguments that nobody has seen before this node, and nobody needs after it."""
        if not self._private:
            return []
        symbols: list[Any] = [*node.varin.values()]
        return [
            name
            for name in names
            if (symbol := node.varin.get(name)) in self._private
            and self._slots[symbol] in dead
            and symbols.count(symbol) == 1
        ]

    def _plan_total(self, node: Node, a: int, b: int, out: int, dead: int) -> Step:
        """The step of a sum of two, which may be one of a row of sums."""
        first, total = node.varin["a"], node.varout["y"]
        own = self._totals.pop(first, None)
        user = self._last_use[total]
        continued = user is not None and user.primitive is node.primitive and user.varin["a"] is total
        if continued:
            own = self._totals[total] = self._new_slot() if own is None else own
        if own is None:
            return call_two, node, node.primitive.call, a, b, "y", out, dead
        return grow_total, node, node.primitive.operator.grow, a, b, out, dead, own, continued

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
        slots: Slots
        if type(tape) is ConsumedTape and monitor is None:
            slots, todo = tape, self._find_consuming()
            slots += self.template
        else:
            slots, todo = self.template.copy() if tape is None else tape + self.template, self.steps
        for name, slot in self.inputs.items():
            if name not in init:
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
                    f"{name}: {describe(collect(slots, self._target(symbol)))}"
                    for name, symbol in node.varin.items()
                    if not any(isinstance(leaf, AttrSymbol) for leaf in leaves(symbol))
                )
                error.add_note(f"in {node.name}({arguments}), built at {filename}:{line}")
            raise
        return [collect(slots, target) for target in self.outputs], slots

    def _find_consuming(self) -> list[Step]:
        """The steps, and between them those that drop what is not needed on the tape any more."""
        if self._consuming is None:
            block = 1 + len(self.steps) // 100
            dropped: dict[int, list[int]] = {}
            outputs = set(numbers_in(self.outputs))
            for slot in range(self.offset):
                if slot not in outputs:
                    last = self._last_reads.get(slot, -1)
                    dropped.setdefault(last // block, []).append(slot)
            tapes: dict[int, list[int]] = {}
            for node, record in self.base.records.items() if self.base else ():
                for name in node.primitive.operator.extras if type(record) is dict else ():
                    if record[name] in self._last_reads:
                        tapes.setdefault(self._last_reads[record[name]], []).append(record[name])
            self._consuming = [(drop, None, dropped[-1])] if -1 in dropped else []
            for i, step in enumerate(self.steps):
                if i in tapes:
                    self._consuming.append((hand_over, None, tapes[i]))
                self._consuming.append(self._with_its_record(i, step))
                if i % block == block - 1 and i // block in dropped:
                    self._consuming.append((drop, None, dropped[i // block]))
        return self._consuming

    def _with_its_record(self, i: int, step: Step) -> Step:
        """A step, which may overwrite what only it and the tape have, if it is the last to read that."""
        function, node, *others = step
        if node is None or not node.operator.inplace:
            return step
        record = self._record_of(node)
        if type(record) is not int or self._last_reads.get(record) != i:
            return step
        recorded = set(node.operator.inplace).difference(node.primitive.ain)
        return (function, node.acting(node.used, recorded.union(node._owned)), *others)


# Small steps
def get_attribute(s: Slots, step: Step) -> None:
    _, _, slot, parent, name = step
    s[slot] = getattr(s[parent], name)


def get_recorded(s: Slots, step: Step) -> None:
    _, _, slot, record, name, node = step
    s[slot] = find_extra(node, name, s[record])


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
        for item, v in zip(target, value):
            scatter(s, item, v)


def product(s: Slots, step: Step) -> None:
    """ZeroGradient if the values of all slots of any of some groups are, else None."""
    _, _, slot, *factors = step
    s[slot] = ZeroGradient if any(all(is_zero(s[i]) for i in factor) for factor in factors) else None


# The steps of nodes
def call(s: Slots, step: Step) -> None:
    """Call a function that has one result."""
    _, node, function, gather, name, out, dead = step
    r = function(node, *gather(s))
    s[dead] = None
    s[out] = r if type(r) is not dict else the_only(r, name, node)


def call_two(s: Slots, step: Step) -> None:
    """Call a function of two arguments that has one result."""
    _, node, function, i, j, name, out, dead = step
    r = function(node, s[i], s[j])
    s[dead] = None
    s[out] = r if type(r) is not dict else the_only(r, name, node)


def the_only(r: dict[str, Value], name: str, node: Node) -> Value:
    try:
        return r[name]
    except KeyError:
        raise broken(node, r) from None


def gatherer(slots: Sequence[int]) -> Callable[[Slots], Any]:
    """A function that returns the values in some slots in a row."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return itemgetter(slice(slots[0], slots[0] + 1) if slots else slice(0))


def grow_total(s: Slots, step: Step) -> None:
    """Add to a sum that only the engine knows."""
    _, _, grow, a, b, out, dead, own, continued = step
    total, mine = grow(s[a], s[b], s[own])
    s[own] = mine if continued else None
    s[dead] = None
    s[out] = total


def call_and_record(s: Slots, step: Step) -> None:
    """Call a function that has one result, and record what its `rcd` wants to."""
    _, node, function, gather, name, out, kept, clear = step
    args = gather(s)
    r = function(node, *args)
    operator = node.primitive.operator
    if type(r) is dict:
        s[kept] = operator.rcd(node, **{**r, **dict(zip(operator.apl.argnames, args))})
        r = the_only(r, name, node)
    elif operator.rcd_in_order:
        s[kept] = operator.rcd(node, *args, r)
    else:
        s[kept] = operator.rcd(node, **{name: r, **dict(zip(operator.apl.argnames, args))})
    s[out] = r
    for slot in clear:
        s[slot] = None


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


def differentiate_one(s: Slots, step: Step) -> None:
    """Call a derivative that has one tangent or cotangent, and one result."""
    _, node, function, linear, gather, record, name, out = step
    r = s[linear]
    if r is not ZeroGradient:
        r = function(node, r, *(gather(s) if record is None else take_recorded(s, record, node)))
        if type(r) is dict:
            r = the_only(r, name, node)
        if r.__class__ is int and r == 0:
            r = ZeroGradient
    s[out] = r


def differentiate(s: Slots, step: Step) -> None:
    """Call a derivative of which only one argument can be something else than zero."""
    _, node, function, gather, record, linear, outs = step
    if s[linear] is ZeroGradient:
        for name, out in outs:
            s[out] = ZeroGradient
        return
    if record is None:
        r = function(node, *gather(s))
    else:
        r = function(node, *gather(s), *take_recorded(s, record, node))
    if type(r) is not dict:
        r = as_dict(r, node)
    for name, out in outs:
        value = r[name] if name in r else the_only(r, name, node)
        s[out] = value if value.__class__ is not int or value else ZeroGradient


def differentiate_two(s: Slots, step: Step) -> None:
    """Call a derivative that has two tangents and one result."""
    _, node, function, gather, record, i, j, name, out, dead = step
    if s[i] is ZeroGradient and s[j] is ZeroGradient:
        r = ZeroGradient
    elif record is None:
        r = function(node, *gather(s))
    else:
        r = function(node, *gather(s), *take_recorded(s, record, node))
    if type(r) is dict:
        r = the_only(r, name, node)
    s[dead] = None
    s[out] = r if r.__class__ is not int or r else ZeroGradient


def execute(s: Slots, step: Step) -> None:
    """Call any function."""
    _, node, function, gather, record, linear, outs, extras, kept, clear = step
    args = gather(s)
    if linear is not None and all(is_zero(s[slot]) for slot in linear):
        r: Any = ZeroGradient
    elif record is None:
        r = function(node, *args)
    else:
        r = function(node, *args, *take_recorded(s, record, node))
    r = as_dict(r, node)
    if kept is not None:
        operator = node.primitive.operator
        s[kept] = operator.rcd(node, **{**r, **dict(zip(operator.apl.argnames, args))})
    # Store the results
    for name, target in outs:
        value = the_only(r, name, node)
        if linear is not None and value.__class__ is int and value == 0:
            value = ZeroGradient
        scatter(s, target, value)
    for name, slot in extras:
        s[slot] = find_extra(node, name, r)
    del args
    for slot in clear:
        s[slot] = None


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


def is_zero(value: Value) -> bool:
    """Whether a tangent or cotangent is ZeroGradient, or a list of nothing else."""
    return all(map(is_zero, value)) if type(value) is list else value is ZeroGradient


def broken(node: Node, r: Any) -> ExecutionError:
    got = f"a dict with {list(r)}" if isinstance(r, dict) else f"an object of type {type(r).__name__}"
    return ExecutionError(
        f"{node.primitive.name} returned {got}, and is declared to return {list(node.primitive.outnames)}"
    )


def find_extra(node: Node, key: str, r: dict[str, Value]) -> Value:
    """What `apl` or `rcd` returned under a name that a derivative takes."""
    if key in r:
        return r[key]
    for primitive in (node.operator.vjp, node.operator.jvp, node.operator.hvp):
        if primitive and key in primitive.defaults:
            return primitive.defaults[key]
    raise BrokenPrimitive(
        f"a derivative of operator {node.operator.__name__} takes '{key}', which has not been "
        f"recorded; recorded are {list(r)}"
    )


class ConsumedTape(list[Value]):
    """The slots of a tape that nobody will use again."""


def drop(s: Slots, step: Step) -> None:
    for slot in step[2]:
        s[slot] = None


def hand_over(s: Slots, step: Step) -> None:
    """Tell inner tapes that they are used for the last time."""
    for slot in step[2]:
        consume = getattr(s[slot], "consume", None)
        if consume is not None:
            consume()


def describe(value: Value) -> str:
    """A few words about a value: its type, and its shape and dtype if it has any."""
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return repr(value) if len(repr(value)) < 40 else type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ + (f" {dtype}{list(shape)}" if isinstance(shape, tuple) else "")


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
