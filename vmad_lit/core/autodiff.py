"""The sweeps, written down as models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .error import BrokenPrimitive
from .execution import Plan, flatten, undisturbed
from .graph import NOWHERE, Graph, Node, Symbols, caller
from .operator import Operator, Primitive, ZeroGradient, operator
from .symbol import BaseSymbol, Ignored, List, Literal, Symbol, Value, leaves
from .valuetypes import PLAIN, VALUE_TYPES

ZERO = Literal(ZeroGradient)


class Sweep:
    """A derived model in the making.

    Parameters
    ----------
    plan : Plan
        The recording plan of a run: which nodes run, which symbols are active, where the records are.
    graph : Graph
        The original model.
    model : Graph
        An empty model, to which the derivative is written.
    """

    def __init__(self, plan: Plan, graph: Graph, model: Graph) -> None:
        self.plan = plan
        self.graph = graph
        self.model = model
        self.derivative: dict[BaseSymbol, BaseSymbol] = {}

    def run(self) -> None:
        """Write the model. The kinds of sweeps differ in how."""
        raise NotImplementedError

    def get(self, symbol: BaseSymbol) -> BaseSymbol:
        """The derivative of a symbol, as a symbol of the derived model."""
        derivative = self.derivative.get(symbol)
        if derivative is None:
            return List([self.get(item) for item in symbol]) if isinstance(symbol, List) else ZERO
        return derivative

    def arrives(self, symbols: Symbols) -> bool:
        """Whether the derivative of any of the symbols in a dict is not zero."""
        known = self.derivative.keys()
        return not known.isdisjoint(symbols.values()) or not known.isdisjoint(flatten(symbols))

    def add_node(self, primitive: Primitive, node: Node, derivatives: Symbols, varout: Symbols) -> bool:
        """Append a call of a derivative of a node, unless all that goes in is zero. Returns whether
        it was appended."""
        varin = {name: derivatives[name] for name in primitive.ain}
        for symbol in flatten(varin):
            if symbol is not ZERO:
                placed = self.plan.places.seen.get(node, NOWHERE)
                self.model.append(Node(primitive, varin, varout, None, node, placed))
                return True
        return False

    def new_symbol(self, *label: Any) -> Symbol:
        """A new symbol in the derived model, with the ingredients of its name."""
        symbol = Symbol.__new__(Symbol)
        symbol._label = label
        symbol._graph = self.model._ref
        return symbol


class ForwardSweep(Sweep):
    """Tangents of all values, from those of the inputs: J v."""

    def run(self) -> None:
        self.push_all()
        for name in self.plan.vout:
            self.model.output(**{name + "_": self.get(self.graph._outputs[name])})

    def push_all(self) -> None:
        for name, symbol in self.graph._inputs.items():
            self.derivative[symbol] = self.model.input(name + "_")
        for node in self.plan.nodes:
            self.push_forward(node)

    def push_forward(self, node: Node) -> None:
        operator = node.operator
        if not self.arrives(node.varin) or self.plan.active.isdisjoint(flatten(node.varout)):
            return
        # Pass a tangent on
        if operator.transparent:
            self.derivative[only(node.varout.values())] = self.get(node.varin[only(operator.ain)])
            return
        tangents = {name + "_": self.get(node.varin[name]) for name in operator.ain}
        varout = {name + "_": self.place(symbol) for name, symbol in node.varout.items()}
        if self.add_node(operator.jvp, node, tangents, varout):
            self.derivative.update(zip(flatten(node.varout), flatten(varout)))

    def place(self, symbol: BaseSymbol) -> BaseSymbol:
        if isinstance(symbol, List):
            return List([self.place(item) for item in symbol])
        return self.new_symbol("{}_", symbol)


class ReverseSweep(Sweep):
    """Cotangents of all values, from those of the outputs: J^T v."""

    form = "_{}"

    def run(self) -> None:
        self.seed()
        for node in reversed(self.plan.nodes):
            self.pull_back(node)
        self.finish()

    def seed(self) -> None:
        for name in self.plan.vout:
            # Seed the cotangent of an output
            symbol, cotangent = self.graph._outputs[name], self.model.input(self.form.format(name))
            if isinstance(symbol, List):
                parts = List([self.place(item, None) for item in symbol])
                self.model.append(Node(items.apl, dict(x=cotangent), dict(y=parts), caller()))
                self.add(symbol, parts, None)
            elif symbol in self.plan.active:
                self.add(symbol, cotangent, None)

    def finish(self) -> None:
        for name, symbol in self.graph._inputs.items():
            self.model.output(**{self.form.format(name): self.get(symbol)})

    def pull_back(self, node: Node) -> None:
        operator = node.primitive.operator
        if not self.arrives(node.varout):
            return
        # Pass a cotangent on
        if operator.transparent:
            self.add(node.varin[only(operator.ain)], self.get(only(node.varout.values())), node)
            return
        partials = self.places(node)
        if not partials:
            return
        # Complain if there is no vjp
        if operator.vjp is None:
            raise BrokenPrimitive(
                f"operator {operator.__name__} has no vjp, and a gradient is wanted through the node {node!r}"
            )
        cotangents = {"_" + name: self.get(symbol) for name, symbol in node.varout.items()}
        self.hand_out(operator.vjp, node, cotangents, partials)

    def hand_out(
        self, primitive: Primitive, node: Node, derivatives: Symbols, partials: list[BaseSymbol]
    ) -> None:
        """Append a derivative of a node, and add what it returns to the cotangents of the inputs."""
        if self.add_node(primitive, node, derivatives, dict(zip(primitive.outnames, partials))):
            for name, partial in zip(primitive.operator.ain, partials):
                self.add(node.varin[name], partial, node)

    def places(self, node: Node, mark: str = "") -> list[BaseSymbol]:
        """Symbols for the partial cotangents of the inputs of a node; none if nobody wants any."""
        symbols = [self.place(node.varin[name], node, mark) for name in node.primitive.operator.ain]
        for symbol in symbols:
            if type(symbol) is Symbol or any(leaf is not Ignored for leaf in leaves(symbol)):
                return symbols
        return []

    def place(self, symbol: BaseSymbol, node: Node | None, mark: str = "") -> BaseSymbol:
        if symbol in self.plan.active:
            if node is None:
                return self.new_symbol(self.form + "@output", symbol)
            return self.new_symbol(self.form + "@{.name}" + mark, symbol, node)
        if isinstance(symbol, List):
            return List([self.place(item, node, mark) for item in symbol])
        return Ignored

    def add(self, symbol: BaseSymbol, partial: BaseSymbol, node: Node | None) -> None:
        """Add a partial cotangent to what is known of the cotangent of a symbol."""
        if isinstance(symbol, List) and isinstance(partial, List):
            for item, part in zip(symbol, partial):
                self.add(item, part, node)
        elif partial is not Ignored:
            so_far = self.derivative.get(symbol)
            if so_far is not None:
                # Write a sum
                total = self.new_symbol(self.form, symbol)
                origin = None if node else caller()
                self.model.append(
                    Node(accumulate.apl, dict(a=so_far, b=partial), dict(y=total), origin, node)
                )
                partial = total
            self.derivative[symbol] = partial


@operator
class accumulate:
    """The sum of two partial cotangents of the same value."""

    ain = "a", "b"
    aout = "y"

    def apl(node: Any, a: Value, b: Value) -> Value:
        return add_cotangents(a, b, None)[0]

    @staticmethod
    def grow(a: Value, b: Value, own: Any) -> tuple[Value, Any]:
        return add_cotangents(a, b, own)


@operator
class items:
    """The items of a list, each as a value of its own."""

    ain = "x"
    aout = "y"

    def apl(node: Any, x: Value) -> dict[str, Value]:
        return dict(y=x)


def only(items: Iterable[Any]) -> Any:
    """The only one of some items."""
    (item,) = items
    return item


# Add two cotangents
def add_cotangents(a: Value, b: Value, own: Any) -> tuple[Value, Any]:
    """The sum of a total `a` and a partial cotangent `b`, and what of it is our own.

    `own` is what the previous call returned with the total: an object that this function has made by
    an addition, which may be changed in place; None; or, if the total is a list, a list of these.
    """
    if b is ZeroGradient:
        return a, own
    if a is ZeroGradient:
        return b, None
    cls = type(a)
    if cls is float:
        return a + b, None
    # Add lists item by item
    if cls is list:
        pairs = [add_cotangents(*items) for items in zip(a, b, own or [None] * len(a), strict=True)]
        return [total for total, _ in pairs], [mine for _, mine in pairs]
    if a is own is not None and cls is type(b) and VALUE_TYPES[cls].add_in_place(a, b):
        return a, own
    total = a + b if cls in PLAIN or cls is not type(b) else VALUE_TYPES[cls].add(a, b)
    return total, total if type(total) is type(b) is cls else None


SWEEPS: dict[str, Any] = dict(vjp=ReverseSweep, jvp=ForwardSweep)


def write_sweep(kind: str, plan: Plan, graph: Graph, model: Graph) -> None:
    """Write the derivative `kind`, one of SWEEPS, of the runs of a recording plan of a graph to an empty model."""
    with undisturbed():
        SWEEPS[kind](plan, graph, model).run()


def no_second_derivative(operator: Operator, node: Node) -> BrokenPrimitive:
    """The error for an operator that does not tell the derivative of its vjp."""
    return BrokenPrimitive(
        f"operator {operator.__name__} has no hvp, and an exact second derivative is wanted through "
        f"the node {node!r}; declare one, or use the Gauss-Newton product (compute_with_gnDp), which "
        f"does not need it"
    )


class SecondOrderSweep(ReverseSweep):
    """Tangents of the cotangents of all values, from tangents of inputs and cotangents of outputs: H v."""

    form = "_{}_"

    def run(self) -> None:
        self.tangents = ForwardSweep(self.plan, self.graph, self.model)
        self.cotangents = SWEEPS["vjp"](self.plan, self.graph, self.model)
        self.tangents.push_all()
        self.cotangents.seed()
        self.seed()
        # Pull cotangents and their changes back, node by node
        for node in reversed(self.plan.nodes):
            self.cotangents.pull_back(node)
            self.pull_back(node)
        self.cotangents.finish()
        self.finish()

    def pull_back(self, node: Node) -> None:
        super().pull_back(node)
        operator = node.primitive.operator
        arrives = self.cotangents.arrives(node.varout) and self.tangents.arrives(node.varin)
        if operator.hvp is ZeroGradient or not arrives:
            return
        partials = self.places(node, "-hvp")
        if not partials:
            return
        if not isinstance(operator.hvp, Primitive):
            raise no_second_derivative(operator, node)
        # Append the curvature
        derivatives = {"_" + name: self.cotangents.get(symbol) for name, symbol in node.varout.items()}
        derivatives.update((name + "_", self.tangents.get(node.varin[name])) for name in operator.ain)
        self.hand_out(operator.hvp, node, derivatives, partials)


SWEEPS["hvp"] = SecondOrderSweep
