"""Operators: functions with derivatives, and how they are declared and called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from .error import BadArgument, MissingArgument, OverwritePrecaution, did_you_mean
from .graph import NAME_OF_RESULT, Graph, Node, Symbols, caller, find_graph
from .symbol import BaseSymbol, ListPlaceholder, Symbol, Value, assymbol, leaves

PACKAGE = __name__.partition(".")[0]
Patterns = dict[str, Any]  # the type patterns of arguments or results, by name


class ZeroGradientType(int):
    """The type of `ZeroGradient`, the zero cotangent or tangent of a value of any type."""

    __slots__ = ()
    # Asked by pmesh: a field takes what a ufunc returns for its values, unless the dtype is this one.
    dtype = "?"

    def __repr__(self) -> str:
        return "ZeroGradient"

    def __reduce__(self) -> str:
        return "ZeroGradient"

    @staticmethod
    def is_zero(value: Value) -> bool:
        """Whether a cotangent or tangent is known to be zero: ZeroGradient or the number 0, not an
        array of zeros."""
        return type(value) is ZeroGradientType or (type(value) in (int, float) and value == 0)

    def _zero(self, *others: Any) -> Any:
        return self

    __neg__ = __pos__ = __abs__ = _zero
    __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __truediv__ = _zero
    __getitem__ = conj = conjugate = _zero
    real = imag = property(_zero)

    def __add__(self, other: Value) -> Any:
        return other

    __radd__ = __rsub__ = __add__

    def __sub__(self, other: Value) -> Any:
        return -other

    def __iter__(self) -> Iterator[ZeroGradientType]:
        """An endless supply of zeros, for use with `zip`."""
        while True:
            yield self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy

        return numpy.zeros((), dtype=dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method == "__call__" and not kwargs:
            # Answer to a linear operation
            if ufunc.__name__ in ("negative", "positive", "conjugate", "multiply", "matmul"):
                return self
            if ufunc.__name__ == "add":
                return inputs[1] if inputs[0] is self else inputs[0]
            if ufunc.__name__ == "subtract":
                return -inputs[1] if inputs[0] is self else inputs[0]
            if ufunc.__name__ == "divide" and inputs[0] is self:
                return self
        return getattr(ufunc, method)(*(0 if x is self else x for x in inputs), **kwargs)


ZeroGradient: Any = ZeroGradientType()  # a value of any type, for type checkers too


class Primitive:
    """One function of an operator: its application, or one of its derivatives.

    Attributes
    ----------
    impl : callable
        The bare function; its first argument is a node.
    argnames, outnames : tuple of str
        All arguments, in the order of `impl`, and all results.
    ain, aout : dict
        Those of them that are differentiable (for a derivative: the cotangents or tangents), with
        their type patterns.
    factors : tuple of collections of str
        For a derivative: groups of names in each of which it is linear.
    defaults : dict
        Default values of hyper-parameters.
    call, recording_call : callable
        What the engine calls, with the node and the arguments in order; the latter if what is
        computed is also recorded.
    from_record : tuple of str
        The arguments of a derivative that come from the record, if they are the last ones.
    calls : int
        How often it was called, as far as somebody counts.
    """

    def __init__(
        self,
        operator: Operator,
        kind: str,
        impl: Callable[..., Any],
        argnames: Collection[str] | None = None,
        recording_impl: Callable[..., Any] | None = None,
    ) -> None:
        self.operator = operator
        self.kind = kind
        self.calls = 0
        self.name = operator.__name__ if kind == "apl" else f"{operator.__name__}-{kind}"
        self.impl = impl
        # Read the signature
        parameters = list(inspect.signature(impl).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.argnames = tuple(p.name for p in named) if argnames is None else tuple(argnames)
        self.defaults = {p.name: p.default for p in named if p.default is not p.empty}
        positional: bool = argnames is None and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in named)
        # Tell the differentiable arguments from the others
        self.ain: Patterns
        self.aout: Patterns
        ain, aout = operator.ain, operator.aout
        if kind == "vjp":
            self.ain = {"_" + name: p for name, p in aout.items() if "_" + name in self.argnames}
            self.aout = {"_" + name: p for name, p in ain.items()}
        elif kind == "jvp":
            self.ain = {name + "_": p for name, p in ain.items() if name + "_" in self.argnames}
            self.aout = {name + "_": p for name, p in aout.items()}
        elif kind == "hvp":
            cotangents = {"_" + name: p for name, p in aout.items() if "_" + name in self.argnames}
            tangents = {name + "_": p for name, p in ain.items() if name + "_" in self.argnames}
            self.ain = {**cotangents, **tangents}
            self.aout = {f"_{name}_": p for name, p in ain.items()}
        else:
            self.ain, self.aout = ain, aout
        self.factors: tuple[Patterns, ...] = (cotangents, tangents) if kind == "hvp" else (self.ain,)
        # Prepare to be called
        # Watch a function that nobody vouches for
        if not operator.trusted:
            self.impl = impl = watched(self, impl)
        self.call, self.recording_call = impl, recording_impl or impl
        if not positional:
            both = self.call, self.recording_call
            self.call, self.recording_call = (by_keyword(f, self.argnames) for f in both)
        first, last = self.argnames[: len(self.ain)], self.argnames[len(self.ain) :]
        in_order = kind != "apl" and positional and set(first) == set(self.ain)
        self.from_record = last if in_order else ()
        if in_order:  # the order of the arguments is the one that counts
            self.ain = {name: self.ain[name] for name in first}
        self.outnames = tuple(self.aout)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(self.argnames)})"

    def create_node(self, given: Mapping[str, Any], places: Mapping[str, Any] | None = None) -> Symbols:
        """Append a node to the model of the arguments.

        Parameters
        ----------
        given : dict
            Values or symbols for the arguments, by name.
        places : dict, optional
            Fresh symbols to hold results, by name; for the others symbols are made.

        Returns
        -------
        dict
            The symbols of the results, by name.
        """
        varin = {name: given[name] for name in self.argnames if name in given}
        # Make symbols of the arguments
        for name, value in varin.items():
            if not isinstance(value, BaseSymbol):
                # Ask a constant for its meaning
                if name in self.ain:
                    value = admit(name, value)
                varin[name] = assymbol(value)
        graph = find_graph(varin.values())
        varout: Symbols = {}
        for name in self.outnames:
            # Make a symbol for the result
            if places and name in places:
                varout[name] = claim(places[name], graph, (NAME_OF_RESULT, self.name, len(graph), name))
            else:
                varout[name] = symbol = Symbol.__new__(Symbol)
                symbol._label = (NAME_OF_RESULT, self.name, len(graph), name)
                symbol._graph = graph._ref
        special = self.operator.special and self.operator.special(varin)
        graph.append(Node(special.apl if special else self, varin, varout, caller(3)))
        return varout


def claim(given: Any, graph: Graph, label: tuple[Any, ...]) -> BaseSymbol:
    """Take a symbol, or a List of them, as the place for a result of a node in `graph`."""
    place = assymbol(given)
    for i, leaf in enumerate(leaves(place)):
        if not isinstance(leaf, Symbol):
            raise BadArgument(f"a result can only be stored in a symbol, not in {leaf!r}")
        if leaf._graph is not None:
            raise OverwritePrecaution(
                f"the symbol '{leaf._name}' has a value already; overwriting it would break the "
                "derivatives of those who use it"
            )
        leaf._graph = graph._ref
        if isinstance(place, ListPlaceholder):
            leaf._label = (*label[:-1], f"{label[-1]}[{i}]")
    return place


def by_keyword(function: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """A function that takes arguments in order and passes them on by name."""

    def call(node: Node, *args: Any) -> Any:
        return function(node, **dict(zip(names, args)))

    return call


def declare(spec: Any) -> Patterns:
    """Bring a declaration of arguments into the form of a dict from names to type patterns, in order."""
    if isinstance(spec, str):
        spec = [name.strip() for name in spec.split(",") if name.strip()]
    if isinstance(spec, dict):
        return dict(spec)
    return dict(item if isinstance(item, tuple) else (item, "*") for item in spec)


#: Functions of (operator, vjp) that return the vjp to be used, added by the libraries of types of values.
REVISIONS: list[Callable[[Operator, Callable[..., Any]], Callable[..., Any]]] = []


class Operator:
    """A function with derivatives. Made by the decorators `operator` and `autooperator`.

    Attributes
    ----------
    ain, aout : dict
        The differentiable arguments and the results, with their type patterns.
    apl, vjp, jvp : Primitive
        The functions; `vjp` is None if the declaration has none.
    hvp : Primitive, ZeroGradient or None
        The derivative of `vjp`; ZeroGradient if it is known to vanish, None if it is not known.
    prototype : type
        The class of the declaration. Its static methods are attributes of the operator as well.
    collective : bool
        Whether the functions talk to other ranks, so that all ranks must call them together, even if
        all that goes in is zero. Set it to True in the class of the declaration. Such functions get
        `ZeroGradient` too, and return a dict.
    transparent : bool
        Whether both derivatives are the identity, from one argument to one result, so that the sweeps
        may leave them out.
    fresh, alias : bool
        Whether the results of `apl` and `vjp` are new arrays which nobody else holds; whether the cotangent
        that a `vjp` returns may be the one that it got. See `core.ownership`, also for
    inplace : collection of str
        Arguments of `apl` and `vjp` that these overwrite if `node.owns(name)` says that they may.
    trusted : bool
        Whether nobody looks at what the functions return when they run. It is True for the operators of this
        package, whose tests have looked; others may say so in their class, to save the microsecond.
    placements : str, callable or None
        On many ranks, where arguments have to live and where the results do, as in 'partitioned -> partial';
        by default element by element. See `core.placement`.
    own : collection of str
        Hyper-parameters that may be others on each rank, see `core.agreement`.
    special : callable or None
        Given the symbols of a call by name, an operator to be used in the place of this one, or None.
    grow : callable or None
        For sums of cotangents only: how to add in place, see `core.autodiff`.
    """

    collective = False
    transparent = False
    fresh = False
    alias = False
    inplace: Collection[str] = ()
    trusted = False
    placements: str | Callable[..., Any] | None = None
    own: Collection[str] = ()
    special: Callable[[Symbols], Operator | None] | None = None
    grow: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None
    apl: Primitive
    vjp: Primitive | None
    jvp: Primitive
    hvp: Primitive | ZeroGradientType | None = None
    rcd: Callable[..., Any] | None

    def __init__(self, prototype: Any) -> None:
        for cls in reversed(prototype.__mro__):
            for name, value in vars(cls).items():
                if isinstance(value, staticmethod):
                    setattr(self, name, getattr(prototype, name))
        self.prototype = prototype
        self.trusted = self.trusted or prototype.__module__.partition(".")[0] == PACKAGE
        for name in "collective", "transparent", "fresh", "alias", "inplace", "placements", "own", "trusted":
            setattr(self, name, getattr(prototype, name, getattr(self, name)))
        self.__name__ = prototype.__name__
        self.__qualname__ = prototype.__qualname__
        self.__module__ = prototype.__module__
        self.__doc__ = prototype.__doc__
        self.ain = declare(prototype.ain)
        self.aout = declare(prototype.aout)
        self._make_primitives()

    def _make_primitives(self) -> None:
        prototype = self.prototype
        # Check the functions of the declaration
        check_functions(prototype, self.ain, self.aout)
        self.apl = Primitive(self, "apl", prototype.apl)
        self.vjp = None
        if hasattr(prototype, "vjp"):
            vjp = prototype.vjp
            for revise in REVISIONS:
                vjp = revise(self, vjp)
            self.vjp = Primitive(self, "vjp", vjp)
        # Make the jvp, by linearity if need be
        if hasattr(prototype, "jvp"):
            self.jvp = Primitive(self, "jvp", prototype.jvp)
        else:
            names = [name + "_" if name in self.ain else name for name in self.apl.argnames]
            self.jvp = Primitive(self, "jvp", self._apply_to_tangents, argnames=names)
        # Make the derivative of the vjp, if there is one
        self.hvp = getattr(prototype, "hvp", None if hasattr(prototype, "jvp") else ZeroGradient)
        if callable(self.hvp):
            self.hvp = Primitive(self, "hvp", self.hvp)
        # Take the function that records
        self.rcd = getattr(prototype, "rcd", None)
        if self.rcd is not None:
            names = list(inspect.signature(self.rcd).parameters)[1:]
            self.rcd_in_order = names == [*self.apl.argnames, *self.aout]
        self._find_recorded()

    def _find_recorded(self) -> None:
        derivatives = [p for p in (self.vjp, self.jvp, self.hvp) if isinstance(p, Primitive)]
        taken = dict.fromkeys(name for p in derivatives for name in p.argnames if name not in p.ain)
        available = {*self.apl.argnames, *self.aout}
        self.recorded = tuple(taken)
        self.extras = tuple(name for name in taken if name not in available)

    def _apply_to_tangents(self, node: Node, **kwargs: Any) -> Any:
        given = {name: kwargs[name + "_" if name in self.ain else name] for name in self.apl.argnames}
        result = self.apl.impl(node, **given)
        if not isinstance(result, dict):
            return result
        return {name + "_" if name in self.aout else name: value for name, value in result.items()}

    def fresh_results(self, node: Node, plan: Any) -> Collection[str]:
        """The names of the results of a node in a plan that are fresh: what the operator declares, unless its
        class knows better."""
        return node.varout if self.fresh and node.primitive.kind in ("apl", "vjp") else ()

    def model_of(self, node: Node) -> Graph | None:
        """The model inside a node of this operator, if there is one and it is known before the run."""
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        apl = self.apl
        if not kwargs and len(args) == len(apl.argnames):
            varout = apl.create_node(dict(zip(apl.argnames, args)))
        else:
            varout = apl.create_node(*self._bind(args, kwargs))
        if len(varout) == 1:
            (symbol,) = varout.values()
            return symbol
        return list(varout.values()) or None

    def _bind(
        self, args: Collection[Any], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        apl = self.apl
        if len(args) > len(apl.argnames):
            # Complain about too many arguments
            raise BadArgument(
                f"{self.__name__} takes {len(apl.argnames)} arguments {apl.argnames}, got {len(args)}; "
                "the first parameter of its functions is the node, which is not given"
            )
        given = dict(zip(apl.argnames, args))
        places: dict[str, Any] = {}
        for name, value in kwargs.items():
            # Sort a keyword argument in
            if name in given:
                raise BadArgument(
                    f"{self.__name__} got the argument '{name}' twice, by position and by keyword"
                )
            if name in apl.argnames:
                given[name] = value
            elif name in apl.outnames:
                places[name] = value
            else:
                raise BadArgument(
                    f"{self.__name__} has no argument '{name}'{did_you_mean(name, apl.argnames)}"
                )
        for name in apl.argnames:
            # Fill in a default, or complain
            if name not in given:
                if name not in apl.defaults:
                    raise MissingArgument(
                        f"{self.__name__} needs the argument '{name}'; its arguments are {apl.argnames}"
                    )
                given[name] = apl.defaults[name]
        return given, places

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else InstanceOperator(self, instance)

    def __repr__(self) -> str:
        return f"operator {self.__name__}({', '.join(self.apl.argnames)} -> {', '.join(self.aout)})"


class InstanceOperator:
    """An operator as a method: the instance is passed as the first argument."""

    def __init__(self, base: Any, instance: Any) -> None:
        self.base = base
        self.instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(self.instance, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)


def operator(prototype: Any) -> Operator:
    """Declare an operator by a class.

    The class has the attributes

    ain, aout : the differentiable arguments and the results: a name, a sequence of names or of (name,
        type pattern) pairs, or a mapping from names to patterns;

    and the functions, whose first parameter is the node,

    apl(node, ...) : the application. Parameters that are not in `ain` are hyper-parameters and may
        have defaults. Returns a dict with every name of `aout`, and further names for the record; for
        one output the value itself will do;
    vjp(node, _y, ...) : the vector-Jacobian product. Takes cotangents of results and recorded names,
        returns a dict of the cotangents of the inputs. Optional;
    jvp(node, x_, ...) : the Jacobian-vector product. Takes tangents of inputs and recorded names,
        returns a dict of the tangents of the results. Optional for linear operators;
    hvp(node, _y, x_, ...) : the derivative of `vjp` along tangents of the inputs, at the same `_y`. Takes
        cotangents of results, tangents of inputs and recorded names, returns a dict of the changes `_x_` of
        the cotangents of the inputs. `hvp = ZeroGradient` for an operator without curvature. Optional:
        only exact second derivatives need it, and a linear operator without `jvp` has it;
    rcd(node, ...) : what to record. Takes all arguments and results of `apl` by name, returns a dict.
        Optional: by default those names are recorded that the derivatives take.
    """
    # Check the class of the declaration
    check_class(prototype)
    return Operator(prototype)


from .declaration import check_class, check_functions, watched

from .doors import admit
