"""Placements: where the values of a model live when it runs on many ranks, and what follows from it.

A value is *replicated* (the same on all ranks), *partitioned* (each rank has a part of it), *partial* (each rank
has a summand), *root-only* (one rank has it), or nothing is known. The placements of a model are found when a run
is planned; on one rank there is nothing to find.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from importlib import import_module
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import numpy

from .autodiff import SWEEPS, ReverseSweep, SecondOrderSweep, accumulate
from .autooperator import AutoOperator, find_known_model
from .chain import Chain
from .error import BadArgument, PlacementError, did_you_mean, needed_for
from .execution import Arrivals, Places, Plan, flatten
from .graph import Graph, Node, Symbols
from .model import Model
from .operator import Operator, Primitive
from .registry import OverloadedOperator
from .symbol import BaseSymbol, Ignored, List, Literal, Symbol, Value, leaves
from .traffic import count_object, count_to_all
from .valuetypes import VALUE_TYPES

KINDS = "replicated", "partitioned", "partial", "root-only"


class Placement:
    """Where a value lives.

    Attributes
    ----------
    kind : str
        One of KINDS.
    comm : MPI communicator
        Its ranks have the value together.
    field : bool or None
        Whether a partitioned value knows its communicator itself, as the fields of a mesh do, so that its sum
        is the sum over all ranks; None if that is not known.
    """

    __slots__ = "kind", "comm", "field"

    def __init__(self, kind: str, comm: Any, field: bool | None = False) -> None:
        if kind not in KINDS:
            raise BadArgument(f"there is no placement {kind!r}" + did_you_mean(str(kind), KINDS))
        self.kind, self.comm, self.field = kind, comm, field

    def __repr__(self) -> str:
        return self.kind

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (self.kind, self.field) == (other.kind, other.field) and same_ranks(self.comm, other.comm)

    def __hash__(self) -> int:
        return hash((self.kind, self.field))


CONSTANT: Any = object()  # a plain constant of a program, which takes the place of what it meets
Given = dict[str, Any]  # for arguments, by name: a Placement, CONSTANT, or None if nothing is known


def same_ranks(a: Any, b: Any) -> bool:
    """Whether two communicators are of the same ranks, in the same order."""
    return a is b or hasattr(a, "Compare") and hasattr(b, "Compare") and type(a).Compare(a, b) <= 1


def find_comm(value: Value) -> Any:
    """The communicator that a constant is, or has; or None."""
    for candidate in value, getattr(value, "comm", None):
        if hasattr(candidate, "Compare") and hasattr(candidate, "allgather"):
            return candidate
    place = None if type(value) in SILENT else of_value(value)
    return None if place is None else place.comm


def world() -> Any:
    with needed_for("placements", extra="mpi"):
        from mpi4py import MPI
    return MPI.COMM_WORLD


def declare(placement: str | Placement, comm: Any = None) -> Placement:
    """The placement that a program gives: one of KINDS, or 'field' for a partitioned value that is a field; on the
    ranks of a communicator, by default all."""
    if isinstance(placement, Placement):
        return placement
    kind = "partitioned" if placement == "field" else placement
    return Placement(kind, world() if comm is None else comm, placement == "field")


Graph.declare = staticmethod(declare)


def of_value(value: Value) -> Placement | None:
    """What a value tells of itself: fields, and what else has a communicator, are partitioned."""
    if type(value) is list or type(value) is tuple:
        found = [of_value(item) for item in value]
        return next((place for place in found if place is not None), None)
    values = VALUE_TYPES[type(value)]
    comm = values.comm(value)
    return None if comm is None else Placement("partitioned", comm, values.whole(value) is not None)


PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    type,
    type(None),
    type(...),
    numpy.generic,
    numpy.dtype,
)


def of_constant(value: Value, differentiable: bool) -> Any:
    """The placement of a constant; a plain one is CONSTANT. An array may be another on each rank, so of it nothing
    is known."""
    if isinstance(value, (tuple, list)):
        parts = [of_constant(item, differentiable) for item in value]
        return CONSTANT if all(part is CONSTANT for part in parts) else None
    if isinstance(value, (*PLAIN, FunctionType)) or isinstance(value, numpy.ndarray) and value.ndim == 0:
        return CONSTANT
    return of_value(value) if differentiable else None


class Site:
    """A node, and what is known of its arguments.

    Attributes
    ----------
    node : Node
    given : dict
        For each argument a Placement, CONSTANT, or None.
    spread : tuple of str
        The arguments that the node takes apart over ranks: of a replicated value it takes each rank's copy as
        that rank's own, as `allbcast` does.
    implied : dict
        What a rule concludes about arguments of which nothing is known: the kind of their placement, or None if
        arrays are to be partitioned and numbers replicated.
    """

    def __init__(self, node: Node, given: Given) -> None:
        self.node, self.given = node, given
        self.spread: tuple[str, ...] = ()
        self.implied: dict[str, str | None] = {}

    @property
    def placed(self) -> list[Placement]:
        return [place for place in self.given.values() if isinstance(place, Placement)]

    def constant(self, name: str) -> Any:
        """The value of an argument if it is a constant; else None."""
        symbol = self.node.varin.get(name)
        return symbol._value if type(symbol) is Literal else None

    @property
    def comm(self) -> Any:
        """The communicator of the node: that of a constant, such as a mesh, or of arguments; None if they differ."""
        symbols = flatten(self.node.varin)
        constants = (find_comm(symbol._value) for symbol in symbols if type(symbol) is Literal)
        comms = [comm for comm in constants if comm is not None]
        comms += [place.comm for place in self.placed]
        same = comms and all(same_ranks(comm, comms[0]) for comm in comms)
        return comms[0] if same else None

    def take_apart(self, names: Iterable[str]) -> None:
        self.spread = tuple(
            name
            for name in names
            if (place := self.given.get(name)) is not None
            and place is not CONSTANT
            and place.kind in ("replicated", "partitioned")
        )

    def refuse(self, message: str) -> None:
        """Complain, if there is more than one rank."""
        comm = self.placed[0].comm
        if comm.Get_size() > 1:
            raise PlacementError(f"{message}; in {self.node.name_and_place}")


def elementwise(site: Site, of_fields: bool = True) -> Placement | None:
    """The placement of what an operator computes element by element, and part by part.

    Of fields it makes fields, unless that is not known to be so (not `of_fields`).
    """
    comm, kinds = site.comm, {place.kind for place in site.placed}
    if not kinds or comm is None:
        return None
    # Refuse what lives on one rank
    if "root-only" in kinds:
        names = [name for name, p in site.given.items() if isinstance(p, Placement) and p.kind == "root-only"]
        site.refuse(
            f"'{names[0]}' lives on the root only, and is read on all ranks; send it to them by mpi.bcast, or "
            "deal it out by mpi.scatter"
        )
        return None
    # Refuse a summand beside a part
    if kinds >= {"partial", "partitioned"}:
        site.refuse(
            "a sum of which each rank has only its own summand meets a value of which each rank has a part; "
            "mpi.allreduce makes the sum (or mpi.place(x, 'partitioned', comm) says that each rank means its own)"
        )
    for kind in "partitioned", "partial":
        if kind in kinds:
            site.take_apart(site.given)
            fields = [place.field for place in site.placed if place.kind == "partitioned"]
            field = None if None in fields else False
            if True in fields:
                field = True if of_fields else None
            return Placement(kind, comm, field)
    return Placement("replicated", comm) if None not in site.given.values() else None


def reduction(site: Site) -> Placement | None:
    """The placement of a sum over the argument `axis`, or over all, of a value that may be partitioned along its
    first one."""
    place, axis = elementwise(site), site.node.varin.get("axis", Literal(None))
    if place is None or place.kind != "partitioned":
        return place
    axes = axis._value if type(axis) is Literal else ()
    axes = axes if isinstance(axes, tuple) else (axes,)
    if axes == (None,) or 0 in axes:
        return Placement("partial", place.comm) if place.field is False else None
    known = axes and all(isinstance(i, int) and i > 0 for i in axes)
    return place if known else None


def contraction(site: Site) -> Placement | None:
    """The placement of a sum of products that the argument `subscripts` describes: of arrays that are partitioned
    along their first axis a partial one, if nothing is left of that."""
    place, subscripts = elementwise(site), site.constant("subscripts")
    if place is None or place.kind != "partitioned":
        return place
    _, arrow, output = str(subscripts).replace(" ", "").partition("->")
    if arrow and not output and place.field is False:
        return Placement("partial", place.comm)
    return Placement("partitioned", place.comm, None)


def declared(rule: str, site: Site) -> list[Placement | None]:
    """The placements of results by a declaration such as 'partitioned, any -> field'."""
    wanted, results = read_rule(rule, site.node.operator)
    for name, want in wanted.items():
        check(site, name, want)
    site.take_apart(name for name, want in wanted.items() if want in ("partitioned", "field"))
    comm = site.comm
    if comm is None:
        return []
    return [Placement("partitioned", comm, True) if r == "field" else Placement(r, comm) for r in results]


def read_rule(rule: str, operator: Operator) -> tuple[dict[str, str], list[str]]:
    """What a declaration such as 'partitioned, any -> field' wants of arguments, by name, and says of results."""
    sides = zip(rule.split("->"), (operator.ain, operator.aout))
    words = (
        [word.strip() for word in side.split(",")] * (1 if "," in side else len(names))
        for side, names in sides
    )
    wanted, results = words
    return dict(zip(operator.ain, wanted)), results


def check(site: Site, name: str, want: str) -> None:
    """Complain if an argument does not live where an operator wants it."""
    place = site.given.get(name)
    if not isinstance(place, Placement) or want in ("any", place.kind):
        return
    if place.kind == "root-only":
        site.refuse(
            f"'{name}' lives on the root only, and is to be {want}; use mpi.bcast or mpi.scatter first"
        )
    if place.kind == "partial" and want == "replicated":
        site.refuse(
            f"each rank has only a summand of '{name}', which is to be replicated; use mpi.allreduce first"
        )


# Operators of several kinds
def of_overloaded(site: Site) -> Any:
    """The placements that the operator has which will be chosen: the one for fields, or that for arrays."""
    operator: Any = site.node.operator
    fields = {place.field for place in site.placed if place.kind == "partitioned"}
    rules = [choice.placements for choice in operator.registry.operators(operator)]
    rules = [rule for rule in rules if isinstance(rule, str) and rule.startswith("field")]
    if True in fields and rules:
        return by_rule(rules[0], site)
    place = by_rule(operator.default.placements, site)
    return place if None not in fields or not rules else []


def of_model(site: Site) -> Any:
    """The placements of the outputs of the model in an autooperator, if it is known before the run."""
    model = find_known_model(site.node)
    if model is None:
        return []
    given = {name: place for name, place in site.given.items() if isinstance(place, Placement)}
    of = PlacesOnRanks(model, list(model), model.find_arrivals({}, given)).of
    return [of.get(model._outputs[name]) for name in site.node.varout]


def of_chain(site: Site) -> Any:
    """A state stays where it is."""
    states = site.node.operator.state_names
    return [site.given[name] if isinstance(site.given[name], Placement) else None for name in states]


RULES: dict[type, Callable[[Site], Any]] = {
    OverloadedOperator: of_overloaded,
    AutoOperator: of_model,
    Chain: of_chain,
}

BY_NAME: dict[str, Callable[[Site], Placement | None]] = dict(
    elementwise=elementwise,
    spread=partial(elementwise, of_fields=False),
    reduction=reduction,
    contraction=contraction,
)


def by_rule(rule: Any, site: Site) -> Any:
    """The placements of results, in order, or one for all, by the rule of an operator."""
    if rule is None:
        return elementwise(site, of_fields=False)
    if isinstance(rule, str):
        return BY_NAME[rule](site) if rule in BY_NAME else declared(rule, site)
    return rule(site)


class PlacesOnRanks(Places):
    """Where the values of a run on many ranks live."""

    def __init__(
        self, graph: Graph, nodes: Iterable[Node], arrivals: Arrivals = (), vout: Iterable[str] = ()
    ) -> None:
        super().__init__(graph, nodes, arrivals, vout)
        known: dict[BaseSymbol, Any] = {
            graph._inputs[name]: place for name, place in [*graph.placed.items(), *arrivals]
        }
        self.looks = {symbol: place for symbol, place in known.items() if isinstance(place, str)}
        self.known = {symbol: place for symbol, place in known.items() if symbol not in self.looks}
        self.implied: dict[BaseSymbol, Placement] = {}
        implied: dict[BaseSymbol, Placement] | None = None
        while implied != self.implied:
            implied = dict(self.implied)
            self.go_through(graph, nodes)
        self.complaint = next(filter(None, (self.find_complaint(graph, name) for name in vout)), None)

    def go_through(self, graph: Graph, nodes: Iterable[Node]) -> None:
        """Find out about all nodes, from what is known and what was found to be implied."""
        promised = (name for name, place in graph.placed.items() if place.kind == "replicated")
        self.promised: set[BaseSymbol] = {graph._inputs[name] for name in promised}
        self.of, self.seen, self.spread = {**self.implied, **self.known}, {}, {}
        for node in nodes:
            self.add(node)

    def add(self, node: Node) -> None:
        """Find out about the results of a node."""
        operator = node.primitive.operator
        kind, rule = type(operator), operator.placements
        # Skip a node that nothing is known of
        if kind not in RULES and (rule is None or rule in BY_NAME):
            self.look(node)
            touched = not self.of.keys().isdisjoint([*flatten(node.varin), *node.varout.values()])
            if not touched and not any(is_spread(node.varin[name]) for name in operator.ain):
                return
        site = Site(node, {name: self.place(x, name in operator.ain) for name, x in node.varin.items()})
        # Find where the results live
        found = RULES[kind](site) if kind in RULES else by_rule(rule, site)
        results = found if isinstance(found, list) else [found] * len(node.varout)
        for (name, symbol), place in zip(node.varout.items(), results):
            if place is not None and symbol not in self.implied:
                self.of.update(dict.fromkeys(leaves(symbol), by_pattern(place, operator, name)))
        self.imply(site)
        self.note(site)
        if not self.promised.isdisjoint(flatten(node.varin)):
            self.keep_promise(site, [self.of.get(symbol) for symbol in node.varout.values()])

    def note(self, site: Site) -> None:
        """Write down how an operator sees its arguments."""
        seen = {}
        for name, place in site.given.items():
            if isinstance(place, Placement):
                apart = name in site.spread and place.kind == "replicated"
                seen[name] = Placement("partitioned", place.comm) if apart else place
        if seen:
            self.seen[site.node], self.spread[site.node] = seen, site.spread

    def keep_promise(self, site: Site, results: list[Placement | None]) -> None:
        """What is made of inputs that are declared replicated stays known, or the program has to say more."""
        if all(place is not None and place.kind == "replicated" for place in results):
            self.promised.update(flatten(site.node.varout))
        elif None in results and type(site.node.operator) not in RULES:
            unknown = ", ".join(f"'{name}'" for name, place in site.given.items() if place is None)
            site.refuse(
                f"a value that is declared replicated meets {unknown}, of which nothing is known: is it the same on all "
                "ranks, or has each rank its own? mpi.place(x, 'replicated', comm) or mpi.place(x, 'partitioned', comm) "
                "says it of any value, m.input(.., placement=..) of an input"
            )

    # What a program implies without saying it
    def look(self, node: Node) -> None:
        """See whether the result of a node is a number or an array, if it works element by element."""
        rule, looks = node.primitive.operator.placements, [""]
        if rule == "elementwise":
            looks = [self.looks_of(node.varin[name]) for name in node.primitive.ain]
        elif rule == "spread":
            shape = node.varin.get("shape")
            looks = [ARRAY if type(shape) is Literal and shape._value not in ((), []) else ""]
        result = ARRAY if ARRAY in looks else NUMBER if set(looks) == {NUMBER} else ""
        if result:
            self.looks.update(dict.fromkeys(node.varout.values(), result))

    def looks_of(self, symbol: BaseSymbol) -> Any:
        """Whether a value is known to be an ARRAY or a NUMBER; else an empty string."""
        if type(symbol) is not Literal:
            return self.looks.get(symbol, "")
        if numpy.ndim(symbol._value):
            return ARRAY
        return NUMBER if isinstance(symbol._value, (int, float, complex, numpy.generic)) else ""

    def imply(self, site: Site) -> None:
        """Note what the use of values by a node implies of them."""
        node, rule = site.node, site.node.primitive.operator.placements
        if type(rule) is str and rule.startswith("replicated"):
            self.suppose(node.varin[next(iter(node.primitive.ain))], "replicated", site.comm)
        for name, kind in site.implied.items():
            self.suppose(
                node.varin[name], kind or KIND_OF_LOOKS.get(self.looks_of(node.varin[name])), site.comm
            )
        if rule not in ("elementwise", "spread"):
            return
        (symbol,) = node.varout.values()
        result = self.of.get(symbol)
        if result is None or not result.field and symbol not in self.implied:
            return
        # Beside a field, or in what is beside one, arrays are in parts, and numbers are replicated
        for argument in (node.varin[name] for name in node.primitive.ain):
            looks = self.looks_of(argument)
            self.suppose(argument, KIND_OF_LOOKS.get(looks), result.comm)
        if result.kind == "partitioned":
            site.take_apart(node.primitive.ain)

    def suppose(self, symbol: BaseSymbol, kind: str | None, comm: Any) -> None:
        """Believe that a value lives somewhere, unless it is known better; None is no belief."""
        found = self.of.get(symbol)
        better = found is None or (kind, found.kind) == ("partitioned", "replicated")
        if kind and isinstance(symbol, Symbol) and symbol not in self.known and comm is not None and better:
            self.implied[symbol] = Placement(kind, comm)

    def place(self, symbol: BaseSymbol, differentiable: bool) -> Any:
        """What is known of an argument."""
        if isinstance(symbol, Symbol):
            return self.of.get(symbol)
        if type(symbol) is Literal:
            return of_constant(symbol._value, differentiable)
        return (
            of_list([self.place(item, differentiable) for item in symbol])
            if isinstance(symbol, List)
            else None
        )

    def find_complaint(self, graph: Graph, name: str) -> PlacementError | None:
        """What is wrong with an output: each rank has only a summand of it."""
        for leaf in leaves(graph._outputs[name]):
            place = self.of.get(leaf)
            if place is not None and place.kind == "partial" and place.comm.Get_size() > 1:
                node = next(node for node in graph if any(leaf is symbol for symbol in flatten(node.varout)))
                return PlacementError(
                    f"each rank has only its own summand of the output '{name}'; make the sum by mpi.allreduce "
                    f"(or say by mpi.place(x, 'partitioned', comm) that each rank means its own); "
                    f"from {node.name_and_place}"
                )
        return None


def of_list(parts: list[Any]) -> Any:
    """The placement of a list, from those of its items."""
    for kind in "partitioned", "partial", "root-only":
        for place in parts:
            if isinstance(place, Placement) and place.kind == kind:
                return place
    placed = [place for place in parts if place is not CONSTANT]
    return None if None in placed else placed[0] if placed else CONSTANT


def is_spread(symbol: BaseSymbol) -> bool:
    """Whether a symbol is a constant that is spread over ranks."""
    return (
        type(symbol) is Literal and type(symbol._value) not in SILENT and of_value(symbol._value) is not None
    )


def by_pattern(place: Placement, operator: Operator, name: str) -> Placement:
    """The placement of a result of one of our operators, which is known to be a field, or rows, by its declared type."""
    if place.kind != "partitioned" or place.field is not None or not operator.__module__.startswith(OURS):
        return place
    pattern = str(operator.aout[name])
    return Placement(
        place.kind, place.comm, True if "Field" in pattern else False if pattern == "ndarray" else None
    )


OURS = __name__.partition(".")[0] + "."


def many_ranks() -> bool:
    """Whether this process is one of several."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and world_size(mpi) > 1


@cache
def world_size(mpi: Any) -> int:
    size = int(mpi.Comm.Get_size(mpi.COMM_WORLD)) if mpi.Is_initialized() and not mpi.Is_finalized() else 1
    for begin in WHEN_MANY if size > 1 else ():
        begin()
    return size


WHEN_MANY: list[Callable[[], None]] = []  # what is done when this process is found to be one of several


def find_places(graph: Graph, nodes: Iterable[Node], arrivals: Arrivals, vout: Iterable[str]) -> Places:
    """What a plan has to know of where values live: nothing on one rank, or for a derived model."""
    derived = getattr(graph, "_base", None) is not None
    return (PlacesOnRanks if many_ranks() and not derived else Places)(graph, nodes, arrivals, vout)


Plan.find_places = staticmethod(find_places)


def find_arrivals(self: Model, init: Mapping[str, Value], placed: Mapping[str, Placement] | None) -> Arrivals:
    if not many_ranks():
        return ()
    known = dict(placed or {})
    for name, value in init.items():
        if name not in known and type(value) not in SILENT:
            place = of_value(value)
            if place is not None and self.placed.get(name, place).kind == "partitioned":
                known[name] = place
        elif name not in known and name not in self.placed:
            known[name] = ARRAY if numpy.ndim(value) else NUMBER
    return tuple((name, known[name]) for name in self._inputs if name in known)


SILENT = {numpy.ndarray, numpy.float64, float, int, complex}  # types that tell nothing
NUMBER: Any = "number"  # in the place of the placement of an input, of which no more is known
ARRAY: Any = "array"
KIND_OF_LOOKS = {ARRAY: "partitioned", NUMBER: "replicated"}  # beside a field
Model.find_arrivals = find_arrivals  # type: ignore[method-assign]

# What one rank refuses, all refuse
DOORS: WeakKeyDictionary[Graph, Any] = WeakKeyDictionary()  # the communicators on which models ran last


def find_door(model: Model, init: Mapping[str, Value]) -> Any:
    """The communicator whose ranks run a model together, as far as that is known; None if they do not communicate."""
    if model._base is not None:
        original = next((node.forward.graph for node in model if node.forward is not None), None)
        return None if original is None else DOORS.get(original)
    talks, comm, fields = find_talk(model)
    if talks and comm is None:
        places = {name: of_value(value) for name, value in init.items() if type(value) not in SILENT}
        comm = next((place.comm for place in places.values() if place is not None), None)
        if comm is None and any(places.get(name) is None for name in fields.intersection(init)):
            comm = world()  # here is no field where the others have one
    DOORS[model] = comm = comm if comm is not None and comm.Get_size() > 1 else None
    return comm


def find_talk(model: Model) -> tuple[bool, Any, set[str]]:
    """Whether a node of a model communicates, or of a model inside; on which communicator, if a constant tells; and
    which inputs have to be fields."""
    key = "who talks", len(model)
    if key not in model.shared:
        names = {symbol: name for name, symbol in model._inputs.items()}
        talks, comm = False, None
        fields: set[str] = set()
        for node in model:
            # Ask the model inside, or the node itself
            inside = RULES_INSIDE.get(type(node.operator))
            if inside is not None:
                others = inside(node)
                found = find_talk(others)[:2] if others is not None else (False, None)
            else:
                own = Site(node, {}).comm
                found = communicates(node, own), own
                fields.update(names[x] for x in fields_of(node) if x in names)
            talks, comm = talks or found[0], found[1] if comm is None else comm
        model.shared[key] = talks, comm, fields
    result: tuple[bool, Any, set[str]] = model.shared[key]
    return result


def fields_of(node: Node) -> list[BaseSymbol]:
    """The arguments of a node that its operator declares to be fields."""
    rule = node.operator.placements
    if type(rule) is not str or rule in BY_NAME:
        return []
    wanted, _ = read_rule(rule, node.operator)
    return [node.varin[name] for name, want in wanted.items() if want == "field"]


def communicates(node: Node, comm: Any) -> bool:
    """Whether a node talks to other ranks: its operator is collective, or declares where values live, and is given a
    communicator."""
    rule = node.operator.placements
    moves = type(rule) is str and rule not in BY_NAME and comm is not None
    return node.operator.collective or moves


RULES_INSIDE: dict[type, Callable[[Node], Any]] = {
    AutoOperator: find_known_model,
    Chain: lambda node: (models := find_known_model(node)) and models[0],
}

# What models look like when they are printed
ROWS = 40  # nodes at either end of a long model


def print_graph(graph: Graph) -> str:
    """A model in several lines: its inputs, its nodes, and where their results live."""
    plans, derived = list(getattr(graph, "_plans", {}).values()), getattr(graph, "_base", None) is not None
    try:
        arrivals = plans[-1].places.arrivals if plans else ()
        of, lines = {} if derived else PlacesOnRanks(graph, list(graph), arrivals).of, []
    except PlacementError as error:
        of, lines = {}, [f"  ! {error}"]

    def known(symbol: BaseSymbol) -> str:
        found = [str(of[leaf]) for leaf in leaves(symbol) if leaf in of]
        return f"{symbol!r}: {', '.join(dict.fromkeys(found))}" if found else repr(symbol)

    # Collect the lines
    rows = [f"  {node!r}" + told(node.varout.values(), known) for node in graph]
    if len(rows) > 2 * ROWS:
        rows[ROWS:-ROWS] = [f"  ({len(rows) - 2 * ROWS} more)"]
    inputs = [f"  input {known(symbol)}" for symbol in graph._inputs.values()]
    outputs = [f"  output {name} = {known(symbol)}" for name, symbol in graph._outputs.items()]
    return "\n".join([repr(graph), *lines, *inputs, *rows, *outputs])


def told(symbols: Iterable[BaseSymbol], known: Callable[[BaseSymbol], str]) -> str:
    """What is known of the results of a node, for the end of its line."""
    texts = [known(symbol) for symbol in symbols]
    return "" if all(": " not in text for text in texts) else "  # " + "; ".join(texts)


Graph.__str__ = print_graph  # type: ignore[assignment, method-assign]


# Sweeps that sum over ranks
class Shares(ReverseSweep):
    """A sweep that sums cotangents over ranks: of a replicated value each rank finds a share where the value is
    taken apart."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shares: dict[BaseSymbol, tuple[BaseSymbol, Node]] = {}

    def hand_out(
        self, primitive: Primitive, node: Node, derivatives: Symbols, partials: list[BaseSymbol]
    ) -> None:
        spread = self.plan.places.spread.get(node)
        if not spread:
            super().hand_out(primitive, node, derivatives, partials)
        elif self.add_node(primitive, node, derivatives, dict(zip(primitive.outnames, partials))):
            for name, partial in zip(primitive.operator.ain, partials):
                add = self.add_share if name in spread else self.add
                add(node.varin[name], partial, node)

    def add_share(self, symbol: BaseSymbol, partial: BaseSymbol, node: Node) -> None:
        """Add to the share that this rank has of the cotangent of a replicated value."""
        if isinstance(symbol, List) and isinstance(partial, List):
            for item, part in zip(symbol, partial):
                self.add_share(item, part, node)
        elif partial is not Ignored:
            place = self.plan.places.of.get(symbol)
            if place is None or place.kind != "replicated":
                self.add(symbol, partial, node)
                return
            # Add to what this rank has
            if symbol in self.shares:
                total = self.new_symbol(self.form + "@rank", symbol)
                so_far, _ = self.shares[symbol]
                self.model.append(Node(accumulate.apl, dict(a=so_far, b=partial), dict(y=total), None, node))
                partial = total
            self.shares[symbol] = partial, node

    def sum_shares(self, symbols: Iterable[BaseSymbol]) -> None:
        """Sum the shares of cotangents over the ranks, once for each."""
        for symbol in symbols:
            if symbol in self.shares:
                share, node = self.shares.pop(symbol)
                total = self.new_symbol(self.form + "@ranks", symbol)
                given = dict(x=share, comm=Literal(self.plan.places.of[symbol].comm))
                operator = import_module("vmad_lit.lib.mpi").sum_of_shares
                self.model.append(Node(operator.apl, given, dict(y=total), None, node))
                self.add(symbol, total, node)

    def pull_back(self, node: Node) -> None:
        if self.shares:
            self.sum_shares(flatten(node.varout))
        super().pull_back(node)

    def finish(self) -> None:
        self.sum_shares(self.graph._inputs.values())
        super().finish()


class SecondOrderShares(Shares, SecondOrderSweep):
    """The same for the changes of cotangents."""


SWEEPS.update(vjp=Shares, hvp=SecondOrderShares)
