"""Plans: how a model is run."""

import gc
from collections.abc import Mapping
from contextlib import contextmanager
from operator import itemgetter

from .error import BrokenPrimitive, ExecutionError, ResolveError, did_you_mean
from .operator import ZeroGradient
from .symbol import AttrSymbol, List, Literal, Recorded, leaves


def needed_nodes(graph, vout):
    """The nodes that have to run to compute the outputs named in `vout`, in order."""
    wanted = {leaf for name in vout for leaf in leaves(graph._outputs[name])}
    needed = []
    for node in reversed(graph):
        if not node.varout or not wanted.isdisjoint(flatten(node.varout)):
            needed.append(node)
            wanted.update(flatten(node.varin))
    needed.reverse()
    return needed


def flatten(symbols):
    """The symbols in a dict of arguments or results, those in lists one by one."""
    flat = []
    for symbol in symbols.values():
        if isinstance(symbol, List):
            flat.extend(leaves(symbol))
        else:
            flat.append(symbol)
    return flat


def active_symbols(graph, nodes):
    """The symbols whose values depend differentiably on the inputs of the graph."""
    active = set(graph._inputs.values())
    for node in nodes:
        for name in node.primitive.ain:
            symbol = node.varin[name]
            if symbol in active or isinstance(symbol, List) and not active.isdisjoint(leaves(symbol)):
                active.update(flatten(node.varout))
                break
    return active


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

    Attributes
    ----------
    nodes : list of Node
        Those that run.
    active : set of Symbol
        If recording: the values that have derivatives.
    records : dict
        If recording: for each node where to find what it recorded. Either the slot of the dict that its `rcd` returned, or
        a dict from names to slots.
    derived : dict
        The models derived from this plan, so that they are made only once.
    """

    def __init__(self, graph, vout, record=False, reuse=True, base=None):
        self.vout = tuple(vout)
        self.record = record
        self.base = base
        self.nodes = needed_nodes(graph, self.vout)
        self.active = active_symbols(graph, self.nodes) if record else frozenset()
        self.records = {}
        self.derived = {}
        self.steps = []
        self.nodes_of_steps = []
        with undisturbed():
            # Prepare the slots
            self.offset = base.size if base else 0
            self.template = []
            self._slots = {}
            self._constants = {}
            self._free = [] if reuse else None
            self._recorded = self._find_recorded()
            self._last_use = self._find_last_uses(graph)
            # Plan all nodes
            self.inputs = {
                name: self._give_slot(symbol) for name, symbol in graph._inputs.items() if symbol in self._last_use
            }
            for position, node in enumerate(self.nodes):
                self._plan_node(position, node)
            self.outputs = [self._target(graph._outputs[name]) for name in self.vout]
            self.size = self.offset + len(self.template)
            del self._last_use, self._recorded, self._free

    def _new_slot(self, value=None):
        self.template.append(value)
        return self.offset + len(self.template) - 1

    def _give_slot(self, symbol):
        slot = self._slots[symbol] = self._free.pop() if self._free else self._new_slot()
        return slot

    def _find_last_uses(self, graph):
        """From each symbol that is used to the position of the last node that uses it."""
        last_use = {}
        for position, node in enumerate(self.nodes):
            for symbol in flatten(node.varin):
                last_use[symbol] = position
        never = len(self.nodes)
        for name in self.vout:
            last_use.update(dict.fromkeys(leaves(graph._outputs[name]), never))
        for symbols in self._recorded.values():
            last_use.update(dict.fromkeys(flatten(symbols), never))
        return last_use

    def _find_recorded(self):
        """For each node that records: its arguments and results that derivatives read, by name."""
        recorded = {}
        for node in self.nodes if self.record else ():
            if not self.active.isdisjoint(flatten(node.varout)):
                operator = node.operator
                symbols = {} if operator.rcd else {**node.varout, **node.varin}
                recorded[node] = {name: symbols[name] for name in operator.recorded if name in symbols}
        return recorded

    def _target(self, symbol):
        """The slot of a symbol; for a List, the list of the slots of its items."""
        if isinstance(symbol, List):
            return [self._target(item) for item in symbol]
        slot = self._slots.get(symbol)
        if slot is None:
            # Find a slot for a symbol that is no result
            if type(symbol) is Literal:
                slot = self._constants.get(symbol)
                if slot is None:
                    slot = self._constants[symbol] = self._new_slot(symbol._value)
            elif isinstance(symbol, AttrSymbol):
                slot = self._add_step(get_attribute, self._target(symbol._parent), symbol._attrname)
            elif isinstance(symbol, Recorded):
                slot = self._find_record(symbol._node, symbol._key)
            else:
                raise ResolveError(
                    f"the symbol '{symbol!r}' has no value: it is not an input, and no node before its use computes it"
                )
        return slot

    def _slot(self, symbol):
        """One slot for the value of an argument, also for a List."""
        target = self._target(symbol)
        return target if type(target) is int else self._add_step(pack, target)

    def _add_step(self, make, *args):
        slot = self._new_slot()
        self._append(make(slot, *args), None)
        return slot

    def _append(self, step, node):
        self.steps.append(step)
        self.nodes_of_steps.append(node)

    def _find_record(self, node, key):
        record = self.base.records[node]
        if type(record) is int:
            return self._add_step(get_recorded, record, key, node)
        target = record[key]
        return target if type(target) is int else self._add_step(pack, target)

    def _plan_node(self, position, node):
        primitive, slots, last_use = node.primitive, self._slots, self._last_use
        # Find the slots of the arguments, and those that die here
        ins, dead, clear = [], [], []
        record = self.base.records.get(node.forward) if self.base else None
        shortcut = type(record) is int and recorded_last(primitive)
        for name in primitive.ain if shortcut else primitive.argnames:
            symbol = node.varin.get(name)
            slot = slots.get(symbol)
            if slot is None:
                # Find the slot of an argument that is not a result
                if symbol is None:
                    slot = self._new_slot(primitive.defaults[name])
                else:
                    slot = self._slot(symbol)
                    if isinstance(symbol, List):
                        leaf_slots = {slots[leaf] for leaf in leaves(symbol) if last_use[leaf] == position and leaf in slots}
                        dead += sorted(leaf_slots.difference(dead))
                        if name not in self._recorded.get(node, ()):
                            clear.append(slot)
            elif last_use[symbol] == position and slot not in dead:
                dead.append(slot)
            ins.append(slot)
        gather = record_gatherer(ins, record, node.forward, primitive.argnames[len(ins) :]) if shortcut else gatherer(ins)
        # Give slots to the results
        recorded = self._recorded.get(node)
        rcd = node.operator.rcd if recorded is not None else None
        if self._free is not None and rcd is None:
            self._free += dead
        outs = [(name, self._result_target(symbol)) for name, symbol in node.varout.items()]
        if self._free is not None and rcd is None:
            clear += [slot for slot in dead if slot in self._free[-len(dead):]]
        else:
            clear += dead
            if self._free is not None:
                self._free += dead
        # Arrange for the record
        extras, kept = [], None
        if rcd is not None:
            kept = self.records[node] = self._new_slot()
        elif recorded is not None:
            extras = [(name, self._new_slot()) for name in node.operator.extras]
            of_arguments = dict(zip(primitive.argnames, ins))
            self.records[node] = {
                name: of_arguments[name] if name in of_arguments else self._target(symbol) for name, symbol in recorded.items()
            }
            self.records[node].update(extras)
        self._append(make_step(self, node, ins, gather, outs, extras, kept, clear), node)

    def _result_target(self, symbol):
        if isinstance(symbol, List):
            return [self._result_target(item) for item in symbol]
        return self._give_slot(symbol) if symbol in self._last_use else None

    def run(self, init, tape=None, monitor=None):
        """Run the plan.

        Parameters
        ----------
        init : dict
            Values of the inputs.
        tape : list, optional
            For a derived graph: the slots that a run of `base` left behind.
        monitor : callable, optional
            `monitor(node, inputs, outputs, context)` is called after each node with the symbols of the node by name, and a mapping from
            the names of symbols to values.

        Returns
        -------
        values : list
            The outputs, in the order of `vout`.
        slots : list
            All slots, as the run leaves them.
        """
        slots = self.template.copy() if tape is None else tape + self.template
        for name, slot in self.inputs.items():
            if name not in init:
                raise ResolveError(f"the input '{name}' is needed and was not given" + did_you_mean(name, list(init)))
            slots[slot] = init[name]
        steps = iter(self.steps)
        try:
            # Go through the steps
            if monitor is None:
                for step in steps:
                    step(slots)
            else:
                context = Context(self, slots)
                for step, node in zip(steps, self.nodes_of_steps):
                    step(slots)
                    if node is not None:
                        monitor(node, node.varin, node.varout, context)
        except Exception as error:
            # Tell in which node it happened
            node = self.nodes_of_steps[len(self.steps) - steps.__length_hint__() - 1]
            if node is not None:
                filename, line = node.place
                arguments = ", ".join(
                    f"{name}: {describe(collect(slots, self._target(symbol)))}"
                    for name, symbol in node.varin.items()
                    if not isinstance(symbol, (Recorded, AttrSymbol))
                )
                error.add_note(f"in {node.name}({arguments}), built at {filename}:{line}")
            raise
        return [collect(slots, target) for target in self.outputs], slots


# Small steps
def get_attribute(slot, parent, name):
    def step(s):
        s[slot] = getattr(s[parent], name)

    return step


def get_recorded(slot, parent, key, node):
    def step(s):
        s[slot] = find_extra(node, key, s[parent])

    return step


def pack(slot, target):
    def step(s):
        s[slot] = collect(s, target)

    return step


def collect(s, target):
    """The value in a slot, or the list of the values in a (nested) list of slots."""
    return s[target] if type(target) is int else [collect(s, item) for item in target]


def scatter(s, target, value):
    """Store a value in a slot, or the items of a list in a (nested) list of slots; None is no slot."""
    if type(target) is int:
        s[target] = value
    elif target is not None:
        for item, v in zip(target, value):
            scatter(s, item, v)


# The steps of nodes
@contextmanager
def undisturbed():
    """Suspend the cyclic garbage collector, for code that makes many objects that stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

def recorded_last(primitive):
    """Whether the arguments of a derivative are tangents or cotangents, followed by recorded names."""
    n = len(primitive.ain)
    return primitive.positional and len(primitive.argnames) > n and all(x in primitive.ain for x in primitive.argnames[:n])


def record_gatherer(slots, record, node, names):
    """A function that returns the values in some slots, and those of some names in the dict in the slot `record`."""
    first, items = gatherer(slots), itemgetter(*names) if len(names) > 1 else lambda r: (r[names[0]],)

    def gather(s):
        try:
            return *first(s), *items(s[record])
        except KeyError:
            return *first(s), *(find_extra(node, name, s[record]) for name in names)

    return gather

def make_step(plan, node, ins, gather, outs, extras, kept, clear):
    """The step that executes a node: a function of the list of slots."""
    primitive = node.primitive
    impl = primitive.recording_impl if plan.record else primitive.impl
    if not primitive.positional:
        impl = by_keyword(impl, primitive.argnames)
    linear = None
    if primitive.kind != "apl" and not primitive.operator.collective:
        linear = [slot for name, slot in zip(primitive.argnames, ins) if name in primitive.ain]
    # Choose a simple step if possible
    if len(outs) == 1 and type(outs[0][1]) is int and not extras and kept is None and not clear:
        key, out = outs[0]
        if linear is None:
            return simple_step(impl, node, ins, gather, key, out)
        if len(linear) == 1 and not isinstance(node.varin[next(iter(primitive.ain))], List):
            return simple_linear_step(impl, node, gather, key, out, linear[0])
    # Make the general step
    wanted = [(name, target) for name, target in outs if target is not None]
    rcd = node.operator.rcd if kept is not None else None

    def step(s):
        args = gather(s)
        if linear is not None and all(is_zero(s[slot]) for slot in linear):
            r = ZeroGradient
        else:
            r = impl(node, *args)
        # Bring the result into the form of a dict
        if type(r) is not dict:
            if linear is not None and r is ZeroGradient:
                r = dict.fromkeys(primitive.outnames, r)
            elif len(primitive.outnames) == 1:
                r = {primitive.outnames[0]: r}
            elif not primitive.outnames and r is None:
                r = {}
            else:
                raise broken(node, r)
        # Store the wanted results
        for key, target in wanted:
            if key not in r:
                raise broken(node, r)
            value = r[key]
            if linear is not None and value.__class__ is int and value == 0:
                value = ZeroGradient
            scatter(s, target, value)
        for key, slot in extras:
            s[slot] = find_extra(node, key, r)
        if rcd is not None:
            s[kept] = rcd(node, **{**r, **dict(zip(primitive.argnames, args))})
        del args
        for slot in clear:
            s[slot] = None

    return step


def by_keyword(impl, names):
    def call(node, *args):
        return impl(node, **dict(zip(names, args)))

    return call

def simple_step(impl, node, ins, gather, key, out):
    if len(ins) == 2:
        i, j = ins

        def step(s):
            r = impl(node, s[i], s[j])
            s[out] = the_only(r, key, node) if type(r) is dict else r
    else:

        def step(s):
            r = impl(node, *gather(s))
            s[out] = the_only(r, key, node) if type(r) is dict else r

    return step


def simple_linear_step(impl, node, gather, key, out, linear):
    zero = ZeroGradient

    def step(s):
        r = s[linear]
        if r is not zero:
            r = impl(node, *gather(s))
            if type(r) is dict:
                r = the_only(r, key, node)
            if r.__class__ is int and r == 0:
                r = zero
        s[out] = r

    return step


def the_only(r, key, node):
    try:
        return r[key]
    except KeyError:
        raise broken(node, r) from None


def gatherer(slots):
    """A function that returns the values in some slots as a tuple."""
    if len(slots) > 1:
        return itemgetter(*slots)
    if slots:
        (slot,) = slots
        return lambda s: (s[slot],)
    return lambda s: ()

def is_zero(value):
    """Whether a tangent or cotangent is ZeroGradient, or a list of nothing else."""
    return all(map(is_zero, value)) if type(value) is list else value is ZeroGradient

def broken(node, r):
    got = f"a dict with {list(r)}" if isinstance(r, dict) else f"an object of type {type(r).__name__}"
    return ExecutionError(
        f"{node.primitive.name} returned {got}, and is declared to return {list(node.primitive.outnames)}"
    )


def find_extra(node, key, r):
    """What `apl` or `rcd` returned under a name that a derivative takes."""
    if key in r:
        return r[key]
    for primitive in (node.operator.vjp, node.operator.jvp):
        if primitive is not None and key in primitive.defaults:
            return primitive.defaults[key]
    raise BrokenPrimitive(
        f"a derivative of operator {node.operator.__name__} takes '{key}', which has not been recorded; recorded are {list(r)}"
    )

def describe(value):
    """A few words about a value: its type, and its shape and dtype if it has any."""
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return repr(value) if len(repr(value)) < 40 else type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ + (f" {dtype}{list(shape)}" if isinstance(shape, tuple) else "")


class Context(Mapping):
    """The values of a run, by the names of their symbols; for monitors. A value that died is None."""

    def __init__(self, plan, slots):
        self._slots = {symbol._name: slot for symbol, slot in plan._slots.items()}
        self._values = slots

    def __getitem__(self, name):
        return self._values[self._slots[name]]

    def __iter__(self):
        return iter(self._slots)

    def __len__(self):
        return len(self._slots)
