"""Steps for nodes that need less than the general one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .execution import (
    PASSES,
    Layout,
    Plan,
    Slots,
    Step,
    as_dict,
    gatherer,
    general_step,
    take_recorded,
    the_only,
)
from .graph import Node
from .operator import ZeroGradient
from .symbol import BaseSymbol


def fastest_step(
    node: Node,
    function: Callable[..., Any],
    ins: Sequence[int],
    record: Any,
    linear: Sequence[int] | None,
    outs: Sequence[tuple[str, int]],
    extras: Sequence[tuple[str, int]],
    kept: int | None,
    clear: Sequence[int],
) -> Step:
    """The step of a node without lists, which does what the general one would."""
    single = len(outs) == len(node.varout) == 1 and not extras
    if linear is not None:
        # Choose the step of a derivative
        if len(linear) == 1 and not clear and kept is None and not extras:
            # Choose the step of a derivative of one argument
            if single and ins[0] == linear[0] and (record is None or len(ins) == 1):
                return differentiate_one, node, function, ins[0], gatherer(ins[1:]), record, *outs[0]
            return differentiate, node, function, gatherer(ins), record, linear[0], outs
        # Choose the step of a derivative of several arguments
        if single and len(clear) < 2 and kept is None:
            ((name, out),) = outs
            spent = clear[0] if clear else out
            return differentiate_several, node, function, gatherer(ins), record, linear, name, out, spent
    elif single and record is None and kept is not None:
        return call_and_record, node, function, gatherer(ins), *outs[0], kept, clear
    elif single and record is None and len(clear) < 2:
        # Choose the step of a plain call
        ((name, out),) = outs
        spent = clear[0] if clear else out
        if len(ins) == 2:
            return call_two, node, function, *ins, name, out, spent
        return call, node, function, gatherer(ins), name, out, spent
    return general_step(node, function, ins, record, linear, outs, extras, kept, clear)


Layout.make_step = staticmethod(fastest_step)


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


def differentiate_several(s: Slots, step: Step) -> None:
    """Call a derivative that has several tangents and one result."""
    _, node, function, gather, record, linear, name, out, dead = step
    for slot in linear:
        if s[slot] is not ZeroGradient:
            break
    else:
        s[dead] = None
        s[out] = ZeroGradient
        return
    # Call it, with or without a record
    if record is None:
        r = function(node, *gather(s))
    else:
        r = function(node, *gather(s), *take_recorded(s, record, node))
    if type(r) is dict:
        r = the_only(r, name, node)
    s[dead] = None
    s[out] = r if r.__class__ is not int or r else ZeroGradient


def join_sums(plan: Plan, layout: Layout) -> None:
    """The pass: let sums of cotangents that follow each other add in place."""
    if plan.base is None or plan.record or not layout.reuse:
        return
    rows: dict[BaseSymbol, int] = {}  # the slot that a row has in common, by its latest sum
    for i, step in enumerate(plan.steps):
        if step[0] is call_two and step[1].primitive.operator.grow:
            _, node, _, a, b, _, out, dead = step
            total = node.varout["y"]
            own = rows.pop(node.varin["a"], None)
            # See whether the row goes on
            user = layout.last_use[total]
            continued = user is not None and user.primitive is node.primitive and user.varin["a"] is total
            if continued:
                own = rows[total] = layout.new_slot() if own is None else own
            if own is not None:
                plan.steps[i] = grow_total, node, node.operator.grow, a, b, out, dead, own, continued


PASSES.append(join_sums)


def grow_total(s: Slots, step: Step) -> None:
    """Add to a sum that only the engine knows."""
    _, _, grow, a, b, out, dead, own, continued = step
    total, mine = grow(s[a], s[b], s[own])
    s[own] = mine if continued else None
    s[dead] = None
    s[out] = total
