"""Who owns an array: what a run may overwrite, and what it may drop from a tape.

An operator may declare that its results are *fresh*, new arrays that nobody else holds; that the cotangent
which its vjp returns may be an *alias* of the one that came in; and which arguments it can overwrite
*inplace*. A caller may give inputs away: they are *donated*. A tape that is used for the last time is *consumed*.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import copy
from typing import Any

from .execution import PASSES, LastUse, Layout, Plan, Slots, Step, flatten, numbers_in, record_of
from .graph import Graph, Node
from .model import Model
from .symbol import Value
from .tape import ConsumedTape


def find_owners(plan: Plan, layout: Layout) -> None:
    """The pass: tell the nodes of a plan which arguments they own, and find the outputs that are fresh."""
    if not layout.reuse:
        return  # somebody looks at values by name
    inputs = layout.graph._inputs
    fresh: set[Any] = {inputs[name] for name in plan.donated if name in inputs}
    nodes = iter(plan.nodes)
    for i, step in enumerate(plan.steps):
        if step[1] is not None:
            node = next(nodes)
            # Give arguments away
            donated = find_donated(node, node.primitive.operator.inplace, fresh, layout.last_use)
            if donated:
                plan.steps[i] = give_away(step, donated)
                plan.stand_ins[node] = plan.steps[i][1]
            # Keep track of what is fresh
            acting, operator = plan.steps[i][1], node.primitive.operator
            results = operator.fresh_results(acting, plan)
            if operator.alias and node.primitive.kind == "vjp" and len(acting.used) == 1:
                ours = find_donated(node, node.primitive.ain, fresh, layout.last_use)
                results = acting.used if ours else ()
            if fresh:
                fresh.difference_update(flatten(node.varin))
            if results:
                fresh.update(node.varout[name] for name in results)
    plan.fresh_outputs = find_fresh_outputs(plan, layout.graph, fresh)


PASSES.append(find_owners)


def find_donated(
    node: Node, names: Collection[str], fresh: Collection[Any], last_use: LastUse
) -> tuple[str, ...]:
    """Those of some arguments of a node whose values nobody has seen before it, and nobody needs after it."""
    if not fresh or not names:
        return ()
    given = flatten(node.varin)
    return tuple(
        name
        for name, symbol in node.varin.items()
        if name in names
        and symbol in fresh
        and last_use.get(symbol) is node
        and sum(item is symbol for item in given) == 1
    )


def give_away(step: Step, donated: Collection[str]) -> Step:
    """A step whose node owns further arguments."""
    function, node, *others = step
    return function, node.stand_in(node.used, {*node.donated, *donated}), *others


def find_fresh_outputs(plan: Plan, graph: Graph, fresh: Collection[Any]) -> tuple[str, ...]:
    """The outputs of a plan, by name, that nobody else holds when the run ends."""
    names = [name for name, _ in zip(plan.vout, plan.outputs) if graph._outputs[name] in fresh]
    if not names:
        return ()
    out = numbers_in(plan.outputs)
    kept = {slot for record in plan.records.values() for slot in numbers_in(record)}
    slots = {name: plan._slots[graph._outputs[name]] for name in names}
    return tuple(name for name, slot in slots.items() if slot not in kept and out.count(slot) == 1)


def run(
    plan: Plan,
    init: Mapping[str, Value],
    tape: Slots | None = None,
    monitor: Callable[..., object] | None = None,
) -> tuple[list[Value], Slots]:
    """Run a plan, as its method `run` does; of a consumed tape drop what is not needed any more on the way."""
    if type(tape) is not ConsumedTape or monitor is not None:
        return plan.run(init, tape, monitor)
    tape += plan.template
    return plan.follow(last_steps(plan), tape, init)


Model.runner = staticmethod(run)


def last_steps(plan: Plan) -> list[Step]:
    """The steps of a plan for a tape that is used for the last time; made once."""
    if plan.consuming is None:
        block = 1 + len(plan.steps) // 100
        dropped, tapes = find_dropped(plan, block), find_inner_tapes(plan)
        plan.consuming = [(drop, None, dropped[-1])] if -1 in dropped else []
        for i, step in enumerate(plan.steps):
            if i in tapes:
                plan.consuming.append((consume, None, tapes[i]))
            plan.consuming.append(give_record_away(plan, i, step))
            if i % block == block - 1 and i // block in dropped:
                plan.consuming.append((drop, None, dropped[i // block]))
    return plan.consuming


def find_dropped(plan: Plan, block: int) -> dict[int, list[int]]:
    """The slots of the tape that are not needed after a block of steps, by its number; -1 is before the first."""
    dropped: dict[int, list[int]] = {}
    for slot in range(plan.base.size if plan.base else 0):
        dropped.setdefault(plan.last_reads.get(slot, -1) // block, []).append(slot)
    return dropped


def drop(s: Slots, step: Step) -> None:
    for slot in step[2]:
        s[slot] = None


def find_inner_tapes(plan: Plan) -> dict[int, list[int]]:
    """The slots of extras, among which are tapes of inner models, by the steps that read them last."""
    tapes: dict[int, list[int]] = {}
    for node, record in plan.base.records.items() if plan.base else ():
        for name in node.primitive.operator.extras if type(record) is dict else ():
            last = plan.last_reads.get(record[name])
            if last is not None:
                tapes.setdefault(last, []).append(record[name])
    return tapes


def consume(s: Slots, step: Step) -> None:
    for slot in step[2]:
        use_up = getattr(s[slot], "consume", None)
        if use_up is not None:
            use_up()


def give_record_away(plan: Plan, i: int, step: Step) -> Step:
    """A step whose node owns what it has recorded, if it is the last to read it."""
    node = step[1]
    if node is None or not node.operator.inplace:
        return step
    record = record_of(node, plan.base)
    if type(record) is not int or plan.last_reads.get(record) != i:
        return step
    return give_away(step, set(node.operator.inplace).difference(node.primitive.ain))


def with_steps(plan: Plan, wrap: Callable[[Step], Step]) -> Plan:
    """A copy of a plan with other steps; also with other ones for a tape that is used for the last time."""
    other = copy(plan)
    other.steps = [wrap(step) for step in plan.steps]
    other.consuming = [wrap(step) for step in last_steps(plan)] if plan.base else None
    return other
