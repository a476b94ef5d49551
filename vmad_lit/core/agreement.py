"""Ranks that run a model together have built the same one.

What they are about to run is described, node by node, and a digest of the description is compared when they meet at
the door of the model. What may be another on each rank, such as its part of the data, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from zlib import crc32

import numpy

from .autooperator import AutoOperator, find_known_model
from .error import Disagreement, PlacementError
from .execution import PASSES, Layout, Plan, Slots, Step, find_needed
from .graph import Graph, Node
from .meeting import Detail, Place, Watch, channel_of
from .model import Model
from .operator import Operator
from .placement import (
    DOORS,
    RULES_INSIDE,
    Given,
    Placement,
    PlacesOnRanks,
    Site,
    communicates,
    find_door,
    many_ranks,
)
from .symbol import AttrSymbol, BaseSymbol, List, Literal, Value, leaves
from .together import raise_first
from .valuetypes import VALUE_TYPES

DEEP = 4  # how far to look into values that are made of others


def describe_model(model: Model, wanted: Iterable[str], arrivals: Any) -> Iterator[Detail]:
    """What is run when some outputs of a model are wanted: for each node its name and place, and what it does."""
    nodes = find_needed(model, wanted)[0]
    places = PlacesOnRanks(model, nodes, arrivals, ())
    numbers: dict[BaseSymbol, str] = {symbol: name for name, symbol in model._inputs.items()}
    for node in nodes:
        if not node.varout and not node.operator.collective:
            continue  # somebody watches a value
        found = [places.of.get(symbol) for symbol in node.varout.values()]
        yield node.name_and_place, describe_node(node, numbers, found)
        for symbol in leaves(List(node.varout.values())):
            numbers.setdefault(symbol, f"#{len(numbers)}")
        # Describe the model inside
        inside = RULES_INSIDE.get(type(node.operator))
        within = None if inside is None else inside(node)
        if within is not None:
            given = {name: p for name, p in places.seen.get(node, {}).items() if isinstance(p, Placement)}
            arrived = within.find_arrivals({}, given)
            for label, text in describe_model(within, list(within._outputs), arrived):
                yield f"{label}, in {node.name_and_place}", text
    yield (
        "the outputs",
        ", ".join(f"{name} = {describe_symbol(model._outputs[name], numbers, True)}" for name in wanted),
    )


def describe_node(node: Node, numbers: Mapping[BaseSymbol, str], found: list[Any]) -> str:
    """A node in words: its operator, where its arguments come from, and constants that must be the same on all ranks."""
    operator = node.operator
    kinds = {place.kind for place in found if place is not None}
    field = any(place is not None and place.field for place in found)
    exact = operator.collective or field or kinds == {"replicated"}  # whatever it computes, it is one thing
    free = kinds <= {"partitioned", "partial"} and bool(kinds) and not exact
    if type(operator) is AutoOperator:
        exact, free = False, find_known_model(node) is not None  # its own nodes tell
    whole = exact or operator.placements == "elementwise"  # else it may be the number of a row, or a length
    parts = (
        f"{name}={'...' if name in operator.own else describe_symbol(symbol, numbers, not free, whole)}"
        for name, symbol in node.varin.items()
    )
    return f"{operator.__name__}({', '.join(parts)})"


def describe_symbol(
    symbol: BaseSymbol, numbers: Mapping[BaseSymbol, str], exact: bool, whole: bool = True
) -> str:
    """An argument in words; of constants the value if it must be `exact`, whole numbers only if these must be, too."""
    if isinstance(symbol, AttrSymbol):
        return f"{describe_symbol(symbol._parent, numbers, exact, whole)}.{symbol._attrname}"
    if isinstance(symbol, Literal):
        return describe_value(symbol._value, exact, whole)
    if isinstance(symbol, List):
        return f"[{', '.join(describe_symbol(item, numbers, exact, whole) for item in symbol)}]"
    return numbers.get(symbol, "?")


def describe_value(value: Value, exact: bool = True, whole: bool = True, depth: int = 0) -> str:
    """A constant in words, the same on all ranks that mean the same."""
    if depth > DEEP:
        return "..."
    inner = partial(describe_value, exact=exact, whole=whole, depth=depth + 1)
    if isinstance(value, (bool, str, bytes, type(None), type(...), numpy.dtype, numpy.bool_)):
        return repr(value)
    # Describe a number
    if isinstance(value, (int, float, complex, numpy.number)) or (
        isinstance(value, numpy.ndarray) and value.ndim == 0 and value.dtype.kind in "iufc"
    ):
        number = value.item() if isinstance(value, (numpy.number, numpy.ndarray)) else value
        return repr(number) if exact and (whole or not isinstance(number, int)) else "a number"
    # Describe what holds other values
    if isinstance(value, slice):
        return f"slice({inner(value.start)}, {inner(value.stop)}, {inner(value.step)})" if whole else "slice"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(inner, value))}]" if whole or not all_whole(value) else "whole numbers"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {inner(item)}" for key, item in value.items()) + "}"
    if isinstance(value, numpy.ndarray):
        return f"array with {value.ndim} axes"  # a part of a field may differ in any of them
    if isinstance(value, (type, Operator)):
        return str(getattr(value, "__qualname__", value))
    if callable(value):
        return describe_function(value, inner, whole)
    return describe_object(value, inner)


def all_whole(value: Value) -> bool:
    """Whether a list is one of whole numbers, such as a shape or a few indices."""
    return all(isinstance(item, (int, numpy.integer)) for item in value)


def describe_function(function: Any, inner: Callable[[Value], str], whole: bool) -> str:
    """A function in words: its name, its code, and the constants that it was made with."""
    if isinstance(function, partial):
        return f"partial({', '.join(map(inner, (function.func, *function.args, function.keywords)))})"
    if isinstance(function, MethodType):
        return f"{inner(function.__func__)} of {inner(function.__self__)}"
    if not isinstance(function, FunctionType):
        return str(getattr(function, "__qualname__", type(function).__qualname__))
    # Collect what it was made with
    made_with = [cell_value(cell) for cell in function.__closure__ or ()]
    made_with = [value for value in made_with if whole or not isinstance(value, int)]
    scope = (function.__globals__.get(name) for name in sorted(set(names_in(function.__code__))))
    made_with += [value for value in scope if isinstance(value, (float, complex))]
    told = ", ".join(map(inner, (*(function.__defaults__ or ()), *made_with)))
    return f"{function.__qualname__}({told})@{digest_of_code(function.__code__):08x}"


def cell_value(cell: Any) -> Value:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def names_in(code: CodeType) -> Iterator[str]:
    """The names that a function and those inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def digest_of_code(code: CodeType) -> int:
    """A number that changes with what a function does, and not with the line on which it stands."""
    digest = crc32(code.co_code)
    for constant in code.co_consts[1:] if code.co_consts[:1] != (None,) else code.co_consts:
        if isinstance(constant, CodeType):
            digest = crc32(digest_of_code(constant).to_bytes(4, "little"), digest)
        elif isinstance(constant, (int, float, complex, str, bytes)):
            digest = crc32(repr(constant).encode(), digest)
    return crc32(" ".join(code.co_names).encode(), digest)


def describe_object(value: Value, inner: Callable[[Value], str]) -> str:
    """An object in words: its type, and what tells it from others. Of a value that is spread over ranks, and of what
    belongs to it, that is only the type."""
    name = type(value).__qualname__
    if hasattr(value, "Nmesh") and hasattr(value, "BoxSize"):
        return f"{name}(Nmesh={list(map(int, value.Nmesh))}, BoxSize={list(map(float, value.BoxSize))})"
    if hasattr(value, "Compare") and hasattr(value, "allgather"):
        return f"communicator of {value.Get_size()}"
    values = VALUE_TYPES[type(value)]
    if values.comm(value) is not None:
        pm = getattr(value, "pm", None)
        return name if pm is None else f"{name} on {inner(pm)}"
    # Collect its real numbers and words
    numbers = {
        key: item
        for key, item in getattr(value, "__dict__", {}).items()
        if isinstance(item, (float, str)) and key[:1] != "_"
    }
    return f"{name}({', '.join(f'{key}={item!r}' for key, item in sorted(numbers.items()))})"


# The door
def at_the_door(
    self: Model, init: Any, check: Callable[[dict[str, Value]], dict[str, Value]], wanted: Iterable[str] = ()
) -> Any:
    init = dict(init)
    comm = find_door(self, init) if many_ranks() else None
    channel = channel_of(comm)
    if channel is None:
        return check(init)
    result: Any = None
    error: Exception | None = None
    # Look at the model and the inputs
    try:
        place = door_of(self, init, tuple(wanted))
    except Exception as exception:
        kind = "" if isinstance(exception, PlacementError) else f"{type(exception).__name__}: "
        error, place = exception, Place(0, f"at the start of {self!r}, which fails: {kind}{exception}")
    else:
        try:
            result = check(init)
        except Exception as exception:
            error = exception
    try:
        failed = channel.meet(error is not None, place)
    except Disagreement as disagreement:
        raise disagreement from error
    if failed:
        raise_first(comm, error)
    return result


Model.at_the_door = at_the_door  # type: ignore[method-assign]


def door_of(model: Model, init: Mapping[str, Value], wanted: tuple[str, ...]) -> Place:
    """The place where ranks meet before they run a model."""
    given = ", ".join(sorted(name for name in init if name in model._inputs))
    kind = {"apl": "the model", "vjp": "its gradient", "jvp": "its tangent", "hvp": "its second derivative"}
    head = [
        ("what is computed", kind[model._kind]),
        ("the inputs that are given", given),
        ("the outputs that are wanted", ", ".join(wanted)),
        ("the seed of random numbers", repr(model.seed)),
    ]

    def details() -> list[Detail]:
        return [*head, *describe(model, init, wanted)]

    digest = crc32(repr(head).encode(), digest_of(model, init, wanted))
    same = [name for name, place in model.placed.items() if place.kind == "replicated" and name in init]
    values = {f"the input {name!r}": init[name] for name in same if is_plain(init[name])}
    return Place(digest, f"at the start of {model!r}", details, values)


def is_plain(value: Value) -> bool:
    """Whether a value is a number or an array of numbers."""
    plain = isinstance(value, (int, float, complex, numpy.number, numpy.ndarray))
    return plain and numpy.asarray(value).dtype.kind in "biufc"


def describe(model: Model, init: Mapping[str, Value], wanted: tuple[str, ...]) -> list[Detail]:
    """What is run; a derived model follows from its original, which was compared when it ran."""
    if model._base is not None:
        return []
    return list(describe_model(model, wanted, model.find_arrivals(init, None)))


def digest_of(model: Model, init: Mapping[str, Value], wanted: tuple[str, ...]) -> int:
    """A digest of what is run, kept by the model."""
    if model._base is not None:
        return 0
    key = "digest", len(model), len(model._outputs), wanted, model.find_arrivals(init, None)
    if key not in model.shared:
        model.shared[key] = crc32("\n".join(text for _, text in describe(model, init, wanted)).encode())
    digest: int = model.shared[key]
    return digest


# Collective operators
def watch_meetings(plan: Plan, layout: Layout) -> None:
    """The pass: ranks meet before each node that talks to others, if they are to look after each other."""
    if not Watch.check or not many_ranks():
        return
    nodes, graph = iter(plan.nodes), layout.graph
    for i, step in enumerate(plan.steps):
        if step[1] is not None:
            node = next(nodes)
            original = node.forward or node
            talks = communicates(original, Site(original, {}).comm)
            if talks and type(node.operator) not in RULES_INSIDE:
                comm = Site(original, dict(given_to(original, plan))).comm
                key = crc32(f"{node.primitive.name} {node.primitive.kind}".encode())
                place = Place(key, f"in {node.primitive.name}-{original.number}, built at {place_of(node)}")
                plan.steps[i] = meet_first, step[1], step, comm, place, graph


PASSES.append(watch_meetings)


def given_to(node: Node, plan: Plan) -> Given:
    """What is known of where the arguments of a node live."""
    seen = plan.places.seen if plan.base is None else plan.base.places.seen
    return seen.get(node, {})


def place_of(node: Node) -> str:
    filename, line = node.place
    return f"{filename}:{line}"


def meet_first(s: Slots, step: Step) -> None:
    """Meet the other ranks, and do a step."""
    _, _, inner, comm, place, graph = step
    channel = channel_of(comm or door_known(graph))
    if channel is not None:
        channel.meet(False, place)
    inner[0](s, inner)


def door_known(graph: Graph) -> Any:
    """The communicator on which a model runs, or its original did."""
    derived = getattr(graph, "_base", None) is not None
    original = next((node.forward.graph for node in graph if node.forward is not None), None)
    return DOORS.get(original or graph if derived else graph)
