"""An autodiff in 150 lines: symbols, operators, a linear list of nodes, a tape, and two sweeps."""

import inspect

import numpy as np


class Symbol:
    """A name for a value that does not exist yet."""

    __array_ufunc__ = None  # an array leaves `array * symbol` to the symbol

    def __init__(self, name, model):
        self.name, self.model = name, model

    def __repr__(self):
        return self.name

    # Write a minus sign as a product
    def __neg__(self):
        return -1.0 * self

    # Refuse what needs a value
    def no_value_yet(self, *other):
        raise TypeError(f"'{self}' has no value while the model is built; nothing can depend on it yet")

    __bool__ = __float__ = __iter__ = __eq__ = __lt__ = __gt__ = no_value_yet
    __hash__ = object.__hash__


class Builder(list):
    """A model: its nodes, in the order in which a program wrote them down, its inputs and its outputs."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def input(self, *names):
        """Declare inputs; one name gives a symbol, several give a list of symbols."""
        symbols = [Symbol(name, self) for name in names]
        self.inputs.update(zip(names, symbols))
        return symbols if len(symbols) > 1 else symbols[0]

    def output(self, **symbols):
        """Name symbols as results: `m.output(y=y)`."""
        self.outputs.update(symbols)

    # Run the list
    def run(self, init):
        """The values of all symbols, from those of the inputs, by name."""
        require(self.inputs, init, "value for the input")
        values = {symbol: init[name] for name, symbol in self.inputs.items()}
        for node in self:
            values[node.varout] = node.call("apl", node.arguments(values))
        return values

    def compute(self, vout, init):
        """The output of one name, or a list of outputs for a list of names."""
        return self.pick(vout, self.run(init))

    def pick(self, vout, values):
        if not isinstance(vout, str):
            return [self.pick(name, values) for name in vout]
        require([vout], self.outputs, "output")
        return values[self.outputs[vout]]

    # Pull cotangents back
    def compute_with_vjp(self, init, v):
        """The outputs whose cotangents `v` gives, as in `v=dict(_y=1.0)`, and the cotangents of `init`."""
        tape = Tape(self, init)
        cotangent = reverse_sweep(tape, v)
        out = self.pick([name[1:] for name in v], tape.values)
        return out, [cotangent.get(self.inputs[name], zero(init[name])) for name in init]

    # Push tangents forward
    def compute_with_jvp(self, vout, init, v):
        """The outputs `vout` and their tangents, from those of inputs, `v=dict(x_=1.0)`."""
        tape = Tape(self, init)
        return self.pick(vout, tape.values), self.pick(vout, forward_sweep(tape, v))


class Node:
    """One step of a model: an operator, what goes in, by name, and the symbol of what comes out."""

    def __init__(self, operator, varin, varout):
        self.operator, self.varin, self.varout = operator, varin, varout

    def __repr__(self):
        return f"{self.varout} = {self.operator.name}({', '.join(map(repr, self.varin.values()))})"

    # Call a function of the operator
    def arguments(self, values):
        """The values of the arguments, by name; a constant is its own."""
        return {name: values[x] if isinstance(x, Symbol) else x for name, x in self.varin.items()}

    def call(self, kind, known):
        """Call `apl`, `vjp` or `jvp` with those of the known values that it asks for by name."""
        function = getattr(self.operator.prototype, kind)
        _, *names = inspect.signature(function).parameters
        require(names, known, f"value for the {kind} of {self.operator.name}:")
        return function(self, **{name: known[name] for name in names})


class operator:
    """A function with derivatives: decorates a class with `ain`, `aout`, `apl`, `vjp` and `jvp`."""

    def __init__(self, prototype):
        self.name, self.aout, self.prototype = prototype.__name__, prototype.aout, prototype
        self.ain = (prototype.ain,) if isinstance(prototype.ain, str) else prototype.ain

    def __call__(self, *args, **kwargs):
        """Compute nothing: append a node to the model of the arguments, and return the symbol of its result."""
        bound = inspect.signature(self.prototype.apl).bind(None, *args, **kwargs)
        bound.apply_defaults()
        _, *varin = bound.arguments.items()
        # Find the model
        symbols = {name: x for name, x in varin if isinstance(x, Symbol)}
        require(symbols, self.ain, f"derivative of {self.name} with respect to")
        models = {id(x.model): x.model for x in symbols.values()}
        if len(models) != 1:
            raise TypeError(f"{self.name} needs symbols of one model among its arguments, got {dict(varin)}")
        (model,) = models.values()
        varout = Symbol(f"{self.name}{len(model)}", model)
        model.append(Node(self, dict(varin), varout))
        return varout


def require(names, known, what):
    """Complain about the first of some names that is not known."""
    for name in names:
        if name not in known:
            raise LookupError(f"no {what} '{name}'; known are {', '.join(known) or 'none'}")


@operator
class add:
    ain, aout = ("x1", "x2"), "y"

    def apl(node, x1, x2):
        return x1 + x2

    # The derivatives of a sum
    def vjp(node, _y):
        return dict(_x1=_y, _x2=_y)

    def jvp(node, x1_, x2_):
        return x1_ + x2_


@operator
class sub:
    ain, aout = ("x1", "x2"), "y"

    def apl(node, x1, x2):
        return x1 - x2

    # The derivatives of a difference
    def vjp(node, _y):
        return dict(_x1=_y, _x2=-_y)

    def jvp(node, x1_, x2_):
        return x1_ - x2_


@operator
class mul:
    ain, aout = ("x1", "x2"), "y"

    def apl(node, x1, x2):
        return x1 * x2

    # The derivatives of a product
    def vjp(node, _y, x1, x2):
        return dict(_x1=_y * x2, _x2=_y * x1)

    def jvp(node, x1_, x2_, x1, x2):
        return x1_ * x2 + x1 * x2_


for name, op in dict(add=add, sub=sub, mul=mul).items():
    setattr(Symbol, f"__{name}__", lambda x1, x2, op=op: op(x1, x2))
    setattr(Symbol, f"__r{name}__", lambda x1, x2, op=op: op(x2, x1))


class Tape(list):
    """What a run leaves behind: each node, and by name what went into it and what came out."""

    def __init__(self, model, init):
        self.model, self.values = model, model.run(init)
        for node in model:
            self.append((node, node.arguments(self.values) | {node.operator.aout: self.values[node.varout]}))


def reverse_sweep(tape, v):
    """The cotangents of all symbols that the outputs depend on, from those of the outputs, `v=dict(_y=...)`."""
    outputs = {"_" + name: symbol for name, symbol in tape.model.outputs.items()}
    require(v, outputs, "cotangent")
    cotangent = {}
    for name, _y in v.items():
        accumulate(cotangent, outputs[name], _y, tape.values[outputs[name]])
    for node, record in reversed(tape):
        if node.varout in cotangent:
            # Pull the cotangent back through the node
            partials = node.call("vjp", record | {"_" + node.operator.aout: cotangent[node.varout]})
            for name in node.operator.ain:
                accumulate(cotangent, node.varin[name], partials["_" + name], record[name])
    return cotangent


def accumulate(cotangent, symbol, partial, value):
    """Add a partial cotangent to what has arrived at a symbol so far; constants want none."""
    if isinstance(symbol, Symbol):
        partial = unbroadcast(partial, value)
        cotangent[symbol] = cotangent[symbol] + partial if symbol in cotangent else partial


def zero(x):
    """The derivative of a value that nothing reaches."""
    return np.zeros(np.shape(x)) if np.shape(x) else 0.0


def unbroadcast(_x, x):
    """Sum a cotangent over the axes along which NumPy has repeated the value, so that it has its shape."""
    shape, repeated = np.shape(x), np.shape(_x)
    if shape == repeated:
        return _x
    padded = (1,) * (len(repeated) - len(shape)) + shape
    if len(padded) > len(repeated) or any(n not in (1, m) for n, m in zip(padded, repeated)):
        raise ValueError(f"a cotangent of shape {repeated} does not fit a value of shape {shape}")
    return np.sum(_x, axis=tuple(i for i, n in enumerate(padded) if n == 1)).reshape(shape)[()]


def forward_sweep(tape, v):
    """The tangents of all symbols, from those of inputs, `v=dict(x_=...)`; what is not given is zero."""
    inputs = {name + "_": symbol for name, symbol in tape.model.inputs.items()}
    require(v, inputs, "tangent")
    tangent = {symbol: v.get(name, 0.0) + zero(tape.values[symbol]) for name, symbol in inputs.items()}
    for node, record in tape:
        pushed = {x + "_": tangent[s] if isinstance(s, Symbol) else zero(s) for x, s in node.varin.items()}
        tangent[node.varout] = node.call("jvp", record | pushed)
    return tangent
