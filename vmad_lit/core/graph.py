"""Nodes, and the linear list of them that a model is."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from types import CodeType
from typing import Any, ClassVar, Protocol

import numpy

from .error import BadArgument, DuplicatedOutput, InferError
from .runs import current_run
from .symbol import BaseSymbol, Ignored, List, Literal, Symbol, assymbol, leaves

Symbols = dict[str, BaseSymbol]  # arguments or results, by name
NOWHERE: Mapping[str, Any] = {}  # nothing is known of where values live


class Callee(Protocol):
    """What a node calls: one of the functions of an operator. The next chapter makes them."""

    operator: Any
    name: str
    kind: str
    ain: dict[str, Any]
    factors: tuple[dict[str, Any], ...]
    argnames: tuple[str, ...]
    outnames: tuple[str, ...]
    defaults: dict[str, Any]
    call: Callable[..., Any]
    recording_call: Callable[..., Any]
    from_record: tuple[str, ...]


class Node:
    """One step of a model.

    Attributes
    ----------
    primitive : Primitive
        What is called. It belongs to `operator`, which was declared by the class `prototype`.
    varin, varout : dict
        From argument names to the symbols that go in, and from result names to the symbols that come out.
    number : int
        The position in the model.
    forward : Node or None
        In a derived model, the node of the original model that this one is the derivative of.
    cache : object
        Room for the operator to remember something about this node between runs.
    donated : tuple of str
        The arguments whose values a run gives away to this node; see `owns`.
    placed : dict
        Where the values of arguments live, as far as a run on many ranks knows it; see `placement`.
    """

    __slots__ = ("primitive", "varin", "varout", "number", "forward", "cache", "donated", "placed", "_origin")

    def __init__(
        self,
        primitive: Callee,
        varin: Symbols,
        varout: Symbols,
        origin: tuple[CodeType | str, int] | None,
        forward: Node | None = None,
        placed: Mapping[str, Any] = NOWHERE,
    ) -> None:
        self.primitive = primitive
        self.varin = varin
        self.varout = varout
        self.number = -1
        self.forward = forward
        self.cache: Any = None
        self.donated: tuple[str, ...] = ()
        self.placed = placed
        self._origin = origin

    def __getitem__(self, argname: str) -> BaseSymbol:
        """The symbol that was given for an argument."""
        varin = self.varin if argname in self.varin or self.forward is None else self.forward.varin
        return varin[argname]

    def is_literal(self, argname: str) -> bool:
        """Whether a constant was given for the argument, so that nobody wants its derivative."""
        varin = self.varin if self.forward is None else self.forward.varin
        return isinstance(varin[argname], Literal)

    @property
    def operator(self) -> Any:
        return self.primitive.operator

    @property
    def prototype(self) -> Any:
        return self.primitive.operator.prototype

    @property
    def name(self) -> str:
        return f"{self.primitive.name}-{self.number}"

    @property
    def graph(self) -> Graph | None:
        """The graph that the node belongs to, or None for a node without results."""
        for symbol in self.varout.values():
            for leaf in leaves(symbol):
                if isinstance(leaf, Symbol):
                    graph: Graph | None = leaf._model
                    return graph
        return None

    def needs(self, name: str) -> bool:
        """Whether the run needs a result: `name` is that of a result in `apl`; in a jvp that of the result whose
        tangent is meant, in a vjp or hvp that of the argument whose cotangent is, or the tangent of that."""
        form = {"apl": "{}", "jvp": "{}_", "vjp": "_{}", "hvp": "_{}_"}[self.primitive.kind]
        return self.varout[form.format(name)] is not Ignored

    def owns(self, name: str) -> bool:
        """Whether the function may overwrite the value of an argument, since nobody else holds it any more. Only
        an argument that the operator declares in `inplace` is ever given away like that."""
        return name in self.donated

    @property
    def used(self) -> list[str]:
        """The names of the results that the run needs."""
        return [name for name, symbol in self.varout.items() if symbol is not Ignored]

    def stand_in(
        self, used: Collection[str], donated: Collection[str] = (), placed: Mapping[str, Any] | None = None
    ) -> Node:
        """A node to be called in the place of this one, in a run that needs only the results `used`, gives the
        arguments `donated` away, and knows where arguments live."""
        varout = {name: symbol if name in used else Ignored for name, symbol in self.varout.items()}
        placed = self.placed if placed is None else placed
        node = Node(self.primitive, self.varin, varout, self._origin, self.forward or self, placed)
        node.number, node.donated = self.number, tuple(donated)
        return node

    @property
    def rng(self) -> numpy.random.Generator:
        """Random numbers for the function that is running: the same on all ranks, and the same again whenever this
        run is repeated, and in the derivatives of the node."""
        return current_run().generator(self)

    def rng_of(self, comm: Any) -> numpy.random.Generator:
        """As `rng`, with other numbers on each rank of a communicator."""
        return current_run().generator(self, comm.rank)

    def placement(self, name: str) -> str | None:
        """Where the value of an argument lives: 'replicated', 'partitioned', 'partial' or 'root-only'; None if
        that is not known, or if there is only one rank."""
        placed = self.placed.get(name)
        return None if placed is None else placed.kind

    @property
    def place(self) -> tuple[str, int]:
        """File and line of the program where the node was built, as (str, int)."""
        if self.forward is not None:
            return self.forward.place
        assert self._origin is not None
        code, instruction = self._origin
        if isinstance(code, str):  # of a copy, which has no more than this
            return code, instruction
        position = list(code.co_positions())[instruction // 2] if instruction >= 0 else (None,)
        return code.co_filename, position[0] or code.co_firstlineno

    @property
    def name_and_place(self) -> str:
        """The node in a message: its name, and where it was built."""
        filename, line = self.place
        return f"{self.name}, built at {filename}:{line}"

    @property
    def arguments(self) -> Symbols:
        """All arguments by name; in a derived model with those that are found on the tape."""
        if self.forward is None:
            return self.varin
        varin, forward = self.varin, self.forward
        return {
            name: varin[name] if name in varin else Recorded(forward, name)
            for name in self.primitive.argnames
        }

    def __repr__(self) -> str:
        ins = ", ".join(repr(symbol) for symbol in self.arguments.values())
        outs = ", ".join(repr(symbol) for symbol in self.varout.values())
        filename, line = self.place
        return f"{self.name}({ins}) -> {outs or '()'} at {os.path.basename(filename)}:{line}"


class Recorded(BaseSymbol):
    """In a derived model, for the eye: what a node of the original model recorded under a name."""

    __slots__ = ("_node", "_key")

    def __init__(self, node: Node, key: str) -> None:
        self._node = node
        self._key = key

    def __repr__(self) -> str:
        return f"tape[{self._node.name}].{self._key}"


_engine = os.path.dirname(__file__)
_is_engine: dict[str, bool] = {}


def caller(depth: int = 1) -> tuple[CodeType, int]:
    """The place in the program that called into the engine: a code object and an instruction in it.

    The nearest `depth` callers are known to belong to the engine.
    """
    frame = sys._getframe(depth)
    while True:
        filename = frame.f_code.co_filename
        inside = _is_engine.get(filename)
        if inside is None:
            inside = _is_engine[filename] = filename.startswith(_engine)
        if not inside or frame.f_back is None:
            return frame.f_code, frame.f_lasti
        frame = frame.f_back


class Graph(list[Node]):
    """A list of nodes in the order in which they were built, with named inputs and outputs.

    How it looks in a notebook, and `to_dot`, which makes a picture of it, come from `core.draw`; how it prints,
    and `declare`, which makes a placement, from `core.placement`.
    """

    declare: ClassVar[Callable[..., Any]]
    to_dot: ClassVar[Callable[..., str]]
    _repr_html_: ClassVar[Callable[..., str]]

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[str, Symbol] = {}
        self._outputs: Symbols = {}
        self.placed: dict[str, Any] = {}
        self.shared: dict[Any, Any] = {}
        self._ref: Callable[[], Graph | None] | None = weakref.ref(self)

    # A list compares by content; a model is itself and no other.
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def input(self, *names: str | Symbol, placement: Any = None, comm: Any = None) -> Any:
        """Declare inputs; one name gives one symbol, several give a list of symbols.

        A name may be a str, or a fresh instance of a subclass of `Symbol`. The `placement`, 'replicated',
        'partitioned', 'partial' or 'root-only', tells where their values live when the model runs on the ranks
        of the communicator `comm`, by default all; see `core.placement`.
        """
        symbols = []
        for name in names:
            symbol = name if isinstance(name, Symbol) else Symbol(name)
            if symbol._name in self._inputs:
                raise BadArgument(f"the model already has an input '{symbol._name}'")
            self.anchor(symbol)
            self._inputs[symbol._name] = symbol
            symbols.append(symbol)
            if placement is not None:
                self.placed[symbol._name] = self.declare(placement, comm)
        return symbols[0] if len(symbols) == 1 else symbols

    def output(self, **values: Any) -> None:
        """Name the results of the model: `m.output(y=y)`; a value may be any symbol, a constant or a
        list of these."""
        for name, value in values.items():
            if name in self._outputs:
                raise DuplicatedOutput(f"the model already has an output '{name}'")
            symbol = assymbol(value)
            for leaf in leaves(symbol):
                if isinstance(leaf, Symbol):
                    self.anchor(leaf)
            self._outputs[name] = symbol

    def append(self, node: Node) -> None:
        """Add a node at the end; from now on its results belong to this graph."""
        node.number = len(self)
        list.append(self, node)

    def anchor(self, symbol: Symbol) -> None:
        """Tie a symbol to this graph; if it belongs to a fragment, the whole fragment comes along."""
        if symbol._graph is None:
            symbol._graph = self._ref
        elif symbol._graph is not self._ref:
            other = symbol._graph()
            if not isinstance(other, Fragment):
                raise InferError(
                    f"the symbol '{symbol._name}' belongs to another model ({other!r}); "
                    "an operator can only join symbols of one model"
                )
            self.absorb(other)

    def absorb(self, fragment: Graph) -> None:
        """Append all nodes of a fragment."""
        for node in fragment:
            self.append(node)
            for key, symbol in node.varout.items():
                for leaf in leaves(symbol):
                    assert isinstance(leaf, Symbol)
                    leaf._graph = self._ref
                    if type(leaf._label) is tuple:
                        leaf._label = (NAME_OF_RESULT, node.primitive.name, node.number, key)
        fragment._ref = None

    def __repr__(self) -> str:
        ins, outs = ", ".join(self._inputs), ", ".join(self._outputs)
        return f"{type(self).__name__}: {ins or '()'} -> {outs or '()'} ({len(self)} nodes)"


class Fragment(Graph):
    """A piece of a model that no model has claimed yet; its symbols keep it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._ref = lambda: self


NAME_OF_RESULT = "{}-{}.{}"  # of a symbol that nobody named: operator, number, name of the result


def find_graph(arguments: Iterable[BaseSymbol]) -> Graph:
    """The graph that the symbols in `arguments` belong to, after joining their fragments.

    A model is preferred to a fragment. Raises InferError for symbols of two models.
    """
    refs: list[Callable[[], Graph | None]] = []
    for argument in arguments:
        # Note the graphs of an argument
        if type(argument) is Literal:
            continue
        if isinstance(argument, Symbol):
            ref = argument._graph
            if ref is not None and ref not in refs:
                refs.append(ref)
        elif isinstance(argument, List):
            for leaf in leaves(argument):
                if isinstance(leaf, Symbol) and leaf._graph is not None and leaf._graph not in refs:
                    refs.append(leaf._graph)
    if len(refs) == 1:
        return alive(refs[0])
    # Join several graphs into one
    if not refs:
        return Fragment()
    graphs = [alive(ref) for ref in refs]
    models = [graph for graph in graphs if not isinstance(graph, Fragment)]
    if len(models) > 1:
        raise InferError(
            "symbols of different models cannot be joined by an operator: " + ", ".join(map(repr, models))
        )
    target = models[0] if models else graphs[0]
    for graph in graphs:
        if graph is not target:
            target.absorb(graph)
    return target


def alive(ref: Callable[[], Graph | None]) -> Graph:
    graph = ref()
    if graph is None:
        raise InferError("the model of these symbols no longer exists; keep a reference to it while building")
    return graph
