"""Nodes, and the linear list of them that a model is."""

from __future__ import annotations

import html
import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

from .error import BadArgument, DuplicatedOutput, InferError
from .symbol import BaseSymbol, Ignored, List, Literal, Recorded, Symbol, assymbol, leaves

if TYPE_CHECKING:
    from .operator import Operator, Primitive

Symbols = dict[str, BaseSymbol]  # arguments or results, by name


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
    """

    __slots__ = ("primitive", "varin", "varout", "number", "forward", "cache", "_origin", "_owned")

    def __init__(
        self,
        primitive: Primitive,
        varin: Symbols,
        varout: Symbols,
        origin: tuple[CodeType, int] | None,
        forward: Node | None = None,
    ) -> None:
        self.primitive = primitive
        self.varin = varin
        self.varout = varout
        self.number = -1
        self.forward = forward
        self.cache: Any = None
        self._origin = origin
        self._owned: Collection[str] = ()

    def __getitem__(self, argname: str) -> BaseSymbol:
        """The symbol that was given for an argument."""
        varin = self.varin if argname in self.varin or self.forward is None else self.forward.varin
        return varin[argname]

    def is_literal(self, argname: str) -> bool:
        """Whether a constant was given for the argument, so that nobody wants its derivative."""
        varin = self.varin if self.forward is None else self.forward.varin
        return isinstance(varin[argname], Literal)

    def needs(self, name: str) -> bool:
        """Whether anybody wants a result; in a jvp its tangent, in a vjp or hvp the cotangent of an
        argument, or the tangent of that."""
        form = {"apl": "{}", "jvp": "{}_", "vjp": "_{}", "hvp": "_{}_"}[self.primitive.kind]
        return self.varout[form.format(name)] is not Ignored

    @property
    def used(self) -> list[str]:
        """The names of the results that somebody wants."""
        return [name for name, symbol in self.varout.items() if symbol is not Ignored]

    def owns(self, name: str) -> bool:
        """Whether the value of an argument may be overwritten; only of one that the operator declares in
        `inplace`."""
        return name in self._owned

    def acting(self, used: Collection[str], owned: Collection[str]) -> Node:
        """A node that stands for this one in a run which needs only some results, and gives some arguments away."""
        varout = {name: symbol if name in used else Ignored for name, symbol in self.varout.items()}
        node = Node(self.primitive, self.varin, varout, self._origin, self.forward or self)
        node.number, node._owned = self.number, owned
        return node

    @property
    def operator(self) -> Operator:
        return self.primitive.operator

    @property
    def graph(self) -> Graph | None:
        """The graph that the node belongs to, or None for a node without results."""
        for symbol in self.varout.values():
            for leaf in leaves(symbol):
                if isinstance(leaf, Symbol):
                    return leaf._model
        return None

    @property
    def prototype(self) -> Any:
        return self.primitive.operator.prototype

    @property
    def name(self) -> str:
        return f"{self.primitive.name}-{self.number}"

    @property
    def place(self) -> tuple[str, int]:
        """File and line of the program where the node was built, as (str, int)."""
        if self.forward is not None:
            return self.forward.place
        assert self._origin is not None
        code, instruction = self._origin
        position = list(code.co_positions())[instruction // 2] if instruction >= 0 else (None,)
        return code.co_filename, position[0] or code.co_firstlineno

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
    """A list of nodes in the order in which they were built, with named inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[str, Symbol] = {}
        self._outputs: Symbols = {}
        self.shared: dict[Any, Any] = {}
        self._ref: Callable[[], Graph | None] | None = weakref.ref(self)

    # A list compares by content; a model is itself and no other.
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def input(self, *names: str | Symbol) -> Any:
        """Declare inputs; one name gives one symbol, several give a list of symbols.

        A name may be a str, or a fresh instance of a subclass of `Symbol`.
        """
        symbols = []
        for name in names:
            symbol = name if isinstance(name, Symbol) else Symbol(name)
            if symbol._name in self._inputs:
                raise BadArgument(f"the model already has an input '{symbol._name}'")
            self.anchor(symbol)
            self._inputs[symbol._name] = symbol
            symbols.append(symbol)
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

    # How a graph shows itself
    def __repr__(self) -> str:
        ins, outs = ", ".join(self._inputs), ", ".join(self._outputs)
        return f"{type(self).__name__}: {ins or '()'} -> {outs or '()'} ({len(self)} nodes)"

    def _repr_html_(self) -> str:
        def show(symbol: BaseSymbol) -> str:
            return f"<code>{html.escape(clip(repr(symbol)))}</code>"

        def cells(node: Node) -> list[str]:
            filename, line = node.place
            ins = ", ".join(f"{html.escape(key)}={show(symbol)}" for key, symbol in node.arguments.items())
            outs = ", ".join(show(symbol) for symbol in node.varout.values())
            return [html.escape(node.name), ins, outs, html.escape(f"{os.path.basename(filename)}:{line}")]

        return fold(repr(self), ("node", "inputs", "results", "built at"), self, cells)

    def to_dot(self, depth: int = 0) -> str:
        """The source text of a Graphviz picture of the model.

        Parameters
        ----------
        depth : int
            How many levels of autooperators are opened; their models are drawn as clusters. One whose model is
            only known when it runs stays closed.
        """
        lines = ["digraph model {", "  rankdir=LR; node [shape=box, fontname=monospace];"]
        self._draw(lines, "", depth)
        return "\n".join([*lines, "}"]) + "\n"

    def _draw(self, lines: list[str], prefix: str, depth: int) -> None:
        """Append the lines for all nodes, whose names in the picture begin with a prefix."""
        made_by: dict[BaseSymbol, str] = {}

        # Draw the inputs, the nodes and the outputs
        def arrows(symbol: BaseSymbol, target: str) -> None:
            for leaf in leaves(symbol):
                if leaf in made_by:
                    lines.append(f"  {made_by[leaf]} -> {target} [label={quote(repr(leaf))}];")
                elif isinstance(leaf, Recorded):
                    lines.append(f"  {quote(prefix + repr(leaf))} [label={quote(repr(leaf))}, shape=note];")
                    lines.append(f"  {quote(prefix + repr(leaf))} -> {target};")

        for name, given in self._inputs.items():
            made_by[given] = quote(f"{prefix}in: {name}")
            lines.append(f"  {made_by[given]} [label={quote(name)}, style=rounded];")
        for node in self:
            inner = node.operator.model_of(node) if depth and node.forward is None else None
            if inner is not None:
                # Draw a cluster
                inside = f"{prefix}{node.name}/"
                lines.append(f"  subgraph {quote(f'cluster {prefix}{node.name}')} {{")
                lines.append(f"  label={quote(node.name)};")
                inner._draw(lines, inside, depth - 1)
                lines.append("  }")
                for name in inner._inputs:
                    arrows(node.varin[name], quote(f"{inside}in: {name}"))
                for name, symbol in node.varout.items():
                    made_by.update((leaf, quote(f"{inside}out: {name}")) for leaf in leaves(symbol))
            else:
                box = quote(prefix + node.name)
                lines.append(f"  {box} [label={quote(node.name)}];")
                for symbol in node.arguments.values():
                    arrows(symbol, box)
                made_by.update((leaf, box) for symbol in node.varout.values() for leaf in leaves(symbol))
        for name, symbol in self._outputs.items():
            lines.append(f"  {quote(f'{prefix}out: {name}')} [label={quote(name)}, style=rounded];")
            arrows(symbol, quote(f"{prefix}out: {name}"))


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


# Tables that unfold
SHOWN = 50  # rows at either end of a long table


def fold(
    summary: str, columns: Iterable[str], items: Sequence[Any], cells: Callable[[Any], Iterable[str]]
) -> str:
    """A table in HTML that unfolds from a line of text; of many items it shows the first and the last.

    `cells` makes the HTML of the cells in the row of an item.
    """
    n = len(items)
    left_out = max(n - 2 * SHOWN, 0)
    columns = list(columns)
    rows = []
    for i in range(n):
        if left_out and i == SHOWN:
            rows.append(f"<tr><td colspan={len(columns)}>({left_out} more rows)</td></tr>")
        if not left_out or not SHOWN <= i < n - SHOWN:
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells(items[i])) + "</tr>")
    header = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    return (
        f"<details><summary>{html.escape(clip(summary))}</summary><table><tr>{header}</tr>"
        + "".join(rows)
        + "</table></details>"
    )


def clip(text: str, length: int = 160) -> str:
    """A text, or the beginning of it."""
    return text if len(text) <= length else text[:length] + "..."


def in_bytes(size: float) -> str:
    """A number of bytes in a unit that leaves at most four digits before the point."""
    for unit in "B", "kB", "MB", "GB":
        if size < 9999.5:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def quote(text: str) -> str:
    """A string of the language of Graphviz."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
