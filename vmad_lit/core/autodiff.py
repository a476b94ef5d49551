"""The two sweeps, written down as models."""

from .error import BrokenPrimitive
from .execution import flatten, undisturbed
from .graph import Node, caller
from .operator import ZeroGradient, operator
from .symbol import Ignored, List, Literal, Symbol, leaves

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

    def __init__(self, plan, graph, model):
        self.plan = plan
        self.graph = graph
        self.model = model
        self.derivative = {}

    def get(self, symbol):
        """The derivative of a symbol, as a symbol of the derived model."""
        derivative = self.derivative.get(symbol)
        if derivative is None:
            return List([self.get(item) for item in symbol]) if isinstance(symbol, List) else ZERO
        return derivative

    def arrives(self, symbols):
        """Whether the derivative of any of the symbols in a dict is not zero."""
        return not self.derivative.keys().isdisjoint(flatten(symbols))

    def add_node(self, primitive, node, derivatives, varout):
        """Append a call of a derivative of a node, unless all that goes in is zero. Returns whether
        it was appended."""
        varin = {name: derivatives[name] for name in primitive.ain}
        for symbol in flatten(varin):
            if symbol is not ZERO:
                self.model.append(Node(primitive, varin, varout, None, node))
                return True
        return False

    def fresh(self, *label):
        """A new symbol in the derived model, with the ingredients of its name."""
        symbol = Symbol.__new__(Symbol)
        symbol._label = label
        symbol._graph = self.model._ref
        return symbol


class ForwardSweep(Sweep):
    """Tangents of all values, from those of the inputs: J v."""

    def run(self):
        for name, symbol in self.graph._inputs.items():
            self.derivative[symbol] = self.model.input(name + "_")
        for node in self.plan.nodes:
            self.push_forward(node)
        for name in self.plan.vout:
            self.model.output(**{name + "_": self.get(self.graph._outputs[name])})

    def push_forward(self, node):
        operator = node.operator
        if not self.arrives(node.varin) or self.plan.active.isdisjoint(flatten(node.varout)):
            return
        tangents = {name + "_": self.get(node.varin[name]) for name in operator.ain}
        varout = {name + "_": self.place(symbol) for name, symbol in node.varout.items()}
        if self.add_node(operator.jvp, node, tangents, varout):
            self.derivative.update(zip(flatten(node.varout), flatten(varout)))

    def place(self, symbol):
        if isinstance(symbol, List):
            return List([self.place(item) for item in symbol])
        return self.fresh("{}_", symbol)


class ReverseSweep(Sweep):
    """Cotangents of all values, from those of the outputs: J^T v."""

    def run(self):
        for name in self.plan.vout:
            # Seed the cotangent of an output
            symbol, cotangent = self.graph._outputs[name], self.model.input("_" + name)
            if isinstance(symbol, List):
                parts = List([self.place(item, None) for item in symbol])
                self.model.append(Node(items.apl, dict(x=cotangent), dict(y=parts), caller()))
                self.add(symbol, parts, None)
            elif symbol in self.plan.active:
                self.add(symbol, cotangent, None)
        for node in reversed(self.plan.nodes):
            self.pull_back(node)
        for name, symbol in self.graph._inputs.items():
            self.model.output(**{"_" + name: self.get(symbol)})

    def pull_back(self, node):
        operator = node.primitive.operator
        if not self.arrives(node.varout):
            return
        varout = {"_" + name: self.place(node.varin[name], node) for name in operator.ain}
        if all(symbol is Ignored for symbol in flatten(varout)):
            return
        # Complain if there is no vjp
        if operator.vjp is None:
            raise BrokenPrimitive(
                f"operator {operator.__name__} has no vjp, and a gradient is wanted through the node {node!r}"
            )
        cotangents = {"_" + name: self.get(symbol) for name, symbol in node.varout.items()}
        if self.add_node(operator.vjp, node, cotangents, varout):
            for name, partial in zip(operator.ain, varout.values()):
                if partial is not Ignored:
                    self.add(node.varin[name], partial, node)

    def place(self, symbol, node):
        if symbol in self.plan.active:
            return self.fresh("_{}@{.name}", symbol, node) if node else self.fresh("_{}@output", symbol)
        return List([self.place(item, node) for item in symbol]) if isinstance(symbol, List) else Ignored

    def add(self, symbol, partial, node):
        """Add a partial cotangent to what is known of the cotangent of a symbol."""
        if isinstance(symbol, List):
            for item, part in zip(symbol, partial):
                self.add(item, part, node)
        elif partial is not Ignored:
            so_far = self.derivative.get(symbol)
            if so_far is not None:
                total = self.fresh("_{}", symbol)
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

    def apl(node, a, b):
        if a is ZeroGradient:
            return b
        return a if b is ZeroGradient else a + b


@operator
class items:
    """The items of a list, each as a value of its own."""

    ain = "x"
    aout = "y"

    def apl(node, x):
        return dict(y=x)


def derive(plan, graph, kind):
    """The model of the derivative `kind`, 'vjp' or 'jvp', for all runs of a recording plan of a graph."""
    model = plan.derived.get(kind)
    if model is None:
        model = type(graph)()
        model._base = plan
        sweep = ReverseSweep if kind == "vjp" else ForwardSweep
        with undisturbed():
            sweep(plan, graph, model).run()
        plan.derived[kind] = model
    return model
