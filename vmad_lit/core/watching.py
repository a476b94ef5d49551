"""Operators that nobody vouches for are watched when they run.

Derivatives that have another shape than their values are summed or repeated where broadcasting explains it; arguments
that others need must not be changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

import numpy

from . import declaration
from .declaration import misbehaves
from .execution import PASSES, Layout, Plan, Slots, Step, Target, describe, record_of
from .graph import Node
from .marks import digest
from .operator import ZeroGradient, ZeroGradientType
from .stdlib.operators import sum_to, unbroadcast
from .symbol import BaseSymbol, List, Literal, Value, leaves
from .valuetypes import VALUE_TYPES, Form, as_numbers


def watch_shapes(plan: Plan, layout: Layout) -> None:
    """The pass: note the looks of values around nodes whose operators nobody vouches for, and compare their derivatives."""
    nodes = iter(plan.nodes)
    for i, step in enumerate(plan.steps):
        if step[1] is None:
            continue
        node = next(nodes)
        operator, kind = node.primitive.operator, node.primitive.kind
        if operator.trusted:
            continue
        if kind == "apl" and node in layout.recorded:
            # Note the looks before and after
            slot = plan.forms[node] = layout.new_slot()
            before = [target_of(plan, node.varin[name]) for name in operator.ain]
            after = [target_of(plan, symbol) for symbol in node.varout.values()]
            plan.steps[i] = note_forms, step[1], step, slot, before, after
        elif kind != "apl" and plan.base and node.forward in plan.base.forms:
            # Compare the derivatives
            slot = plan.base.forms[node.forward]
            first = len(operator.ain) if kind == "jvp" else 0
            outs = [(i, name, target_of(plan, x)) for i, (name, x) in enumerate(node.varout.items(), first)]
            plan.steps[i] = fit_results, step[1], step, slot, outs, kind == "jvp"
            plan.last_reads[slot] = i


PASSES.append(watch_shapes)


def target_of(plan: Plan, symbol: BaseSymbol) -> Target:
    """Where the value of a symbol is in a run; None for a constant, and for a value that nobody wants."""
    if isinstance(symbol, List):
        return [target_of(plan, item) for item in symbol]
    return plan._slots.get(symbol)


def note_forms(s: Slots, step: Step) -> None:
    """Run the step of a node, and note what its arguments and results look like."""
    _, node, inner, slot, before, after = step
    looks = [look(s, target) for target in before]
    go(s, inner, node)
    looks += [look(s, target) for target in after]
    s[slot] = tuple(looks)


def go(s: Slots, step: Step, node: Node) -> None:
    """Run a step, for a node that may have been replaced since."""
    step[0](s, step if step[1] is node else (step[0], node, *step[2:]))


def look(s: Slots, target: Target) -> Any:
    if type(target) is int:
        x = s[target]
        return x.shape if type(x) is numpy.ndarray else looks_of(x)
    return target if target is None else alike([look(s, item) for item in target])


def alike(looks: list[Any]) -> list[Any]:
    """The looks of items; of shapes that are equal one object is kept."""
    first = looks[0] if looks else None
    return [first if shape == first else shape for shape in looks] if type(first) is tuple else looks


def looks_of(x: Value) -> Any:
    """What is to be known of a value: the shape of an array or number, else its Form; of a list those of its items."""
    cls = type(x)
    if cls is numpy.ndarray:
        return x.shape
    if cls is float or cls is int:
        return ()
    if cls is list or cls is tuple:
        return alike([looks_of(item) for item in x])
    form = Form(x)
    return (
        form
        if form.make or cls is complex or not isinstance(x, (numpy.ndarray, numpy.generic))
        else form.shape
    )


def fit_results(s: Slots, step: Step) -> None:
    """Run the step of a derivative, and make the results fit what they belong to."""
    _, node, inner, slot, outs, spread = step
    go(s, inner, node)
    looks = s[slot]
    for i, name, target in outs:
        g = s[target] if type(target) is int else None
        if type(g) is not numpy.ndarray or g.shape != looks[i]:
            fit_target(s, target, looks[i], spread, name, node)


def fit_target(s: Slots, target: Target, looks: Any, spread: bool, name: str, node: Node) -> None:
    """Make the value in a slot, or those in a list of slots, fit."""
    if type(target) is int:
        g = s[target]
        s[target] = fitted = fit(g, looks, spread)
        if fitted is None:
            # Complain that a derivative does not fit its value
            value = name.strip("_")
            shape = f"an array of shape {list(looks)}" if type(looks) is tuple else f"a value that is {looks}"
            shape = f"a list of {len(looks)}" if type(looks) is list else "a number" if looks == () else shape
            raise misbehaves(
                node.primitive, f"returned '{name}' as {describe(g)}, which does not fit '{value}', {shape}"
            )
    elif target is not None and type(looks) is list:
        for i, (item, part) in enumerate(zip(target, looks)):
            g = s[item] if type(item) is int else None
            if type(g) is not numpy.ndarray or g.shape != part:
                fit_target(s, item, part, spread, f"{name}[{i}]", node)


def fit(g: Value, looks: Any, spread: bool) -> Value | None:
    """A derivative of a value with such looks: as it is, summed over the axes along which the value was repeated (or,
    to `spread` a tangent, repeated along them); None if it does not fit."""
    if looks is None or ZeroGradientType.is_zero(g):
        return g
    if type(looks) is list:
        return fit_items(g, looks, spread)
    is_complex = False
    # Fit a value that has a form
    if type(looks) is Form:
        if looks.shape != () or looks.make is not None:
            return g if type(g) is not looks.kind or Form(g).shape == looks.shape else None
        looks, is_complex = (), True
    if isinstance(g, (list, tuple)):
        g = as_numbers(g)
    elif VALUE_TYPES[type(g)].take_apart(g) is not None:
        return unbroadcast(g, ((), is_complex)) if looks == () else g
    if g is None or not isinstance(g, (int, float, complex, numpy.ndarray, numpy.generic)):
        return g
    return fit_array(g, looks, spread)


def fit_items(g: Value, looks: list[Any], spread: bool) -> Value | None:
    """A list of derivatives, for a value that is a list."""
    is_list = isinstance(g, (list, tuple)) or isinstance(g, numpy.ndarray) and g.ndim > 0
    if not looks:
        return g
    if not is_list or len(g) != len(looks):
        return None
    items = [fit(item, part, spread) for item, part in zip(g, looks)]
    if all(item is given for item, given in zip(items, g)):
        return g
    return None if any(item is None for item in items) else items


def fit_array(g: Value, shape: tuple[int, ...], spread: bool) -> Value | None:
    """An array or number of a shape, made of one that broadcasting leads to (or, to `spread` it, from)."""
    given = numpy.shape(g)
    if given == shape:
        return g
    if numpy.size(g) == 1 == numpy.prod(shape):
        return numpy.reshape(g, shape)[()]
    if given == () and g == 0:
        return ZeroGradient
    try:
        common = numpy.broadcast_shapes(given, shape)
    except ValueError:
        return None
    if spread:
        return numpy.broadcast_to(g, shape).copy() if common == shape else None
    return sum_to(g, shape)[()] if common == given else None


def watch_arguments(plan: Plan, layout: Layout) -> None:
    """The pass: see that nodes whose operators nobody vouches for leave their arguments as they are."""
    nodes, callers, primitives = iter(plan.nodes), None, set()
    for i, step in enumerate(plan.steps):
        if step[1] is not None:
            node = next(nodes)
            if not node.primitive.operator.trusted:
                callers = layout.new_slot() if callers is None else callers
                given = arguments_of(node, plan, layout)
                plan.steps[i] = mind_arguments, step[1], step, given, callers
                primitives.add(node.primitive)
    # Note which arrays are the caller's
    if callers is not None:
        slots = [slot for name, slot in plan.inputs.items() if name not in plan.donated]
        plan.steps[0] = note_inputs, plan.steps[0][1], plan.steps[0], slots, callers, primitives


PASSES.append(watch_arguments)


def note_inputs(s: Slots, step: Step) -> None:
    """Run the first step, and note which arrays belong to the caller, as long as somebody will ask."""
    _, node, inner, slots, callers, primitives = step
    if any(primitive.calls < declaration.FIRST_CALLS for primitive in primitives):
        s[callers] = {id(array) for slot in slots for array in arrays_in(s[slot])}
    go(s, inner, node)


def arguments_of(node: Node, plan: Plan, layout: Layout) -> list[tuple[str, Target, Value, bool]]:
    """Those arguments of a node that have derivatives, or come from the tape: name, slots, or else the constant, and
    whether no other node needs them later."""
    kept = {symbol for name, symbol in layout.graph._inputs.items() if name not in plan.donated}
    found: list[tuple[str, Target, Value, bool]] = []
    for name in node.primitive.ain:
        symbol = node.varin[name]
        dies = all(layout.last_use.get(leaf) is node and leaf not in kept for leaf in leaves(symbol))
        constant = symbol._value if isinstance(symbol, Literal) else None
        found.append((name, target_of(plan, symbol), constant, dies and constant is None))
    operator, record = node.primitive.operator, record_of(node, plan.base)
    if node.primitive.kind != "apl" and type(record) is dict:
        names = [name for name in record if name in operator.ain or name in operator.aout]
        found += [(name, record[name], None, False) for name in names if name in node.primitive.argnames]
    return found


def mind_arguments(s: Slots, step: Step) -> None:
    """Run the step of a node; in the first calls complain about arguments that it changes and others need."""
    _, node, inner, given, callers = step
    primitive = node.primitive
    if primitive.calls >= declaration.FIRST_CALLS:
        go(s, inner, node)
        return
    primitive.calls += 1
    before = [
        (name, array, digest(array, inf), elsewhere(s, target) if dies else None)
        for name, target, constant, dies in given
        if not node.owns(name)
        for array in arrays_in(constant if target is None else look_up(s, target))
    ]
    go(s, inner, node)
    # Complain about an argument that was changed
    for name, array, checksum, rest in before:
        if digest(array, inf) != checksum and (id(array) in s[callers] or is_needed(array, rest)):
            raise misbehaves(
                primitive,
                f"changes its argument '{name}' in place, which others need; let it change a copy, '{name}.copy()'",
            )


def look_up(s: Slots, target: Target) -> Value:
    """The value in a slot, or the list of those in a list of slots; None where there is no slot."""
    if type(target) is list:
        return [look_up(s, item) for item in target]
    return None if target is None else s[target]


def elsewhere(s: Slots, target: Target) -> list[Value]:
    """The values in other slots than those of an argument."""
    own = set(slots_in(target))
    return [value for slot, value in enumerate(s) if slot not in own]


def slots_in(target: Target) -> Iterator[int]:
    if type(target) is int:
        yield target
    for item in target if type(target) is list else ():
        yield from slots_in(item)


def is_needed(array: Any, rest: list[Value] | None) -> bool:
    """Whether somebody may need an array, which may also be a part of another one, or of a value in the `rest`."""
    if rest is None or not array.flags.owndata:
        return True
    return any(numpy.may_share_memory(array, other) for other in arrays_in(rest))


def arrays_in(x: Value) -> Iterator[Any]:
    """The arrays of numbers in a value: itself, that of a field, or those of the items of a list."""
    if isinstance(x, (list, tuple)):
        for item in x:
            yield from arrays_in(item)
        return
    array = getattr(x, "value", x)
    if isinstance(array, numpy.ndarray) and array.dtype.kind in "biufc":
        yield array
