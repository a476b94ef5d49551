"""What models and tapes look like: pictures by Graphviz, and tables for notebooks.

Graphs gain the method `to_dot` here; graphs, tapes and records gain their looks in a notebook.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .execution import collect, describe
from .graph import Graph, Node, Recorded
from .symbol import BaseSymbol, Literal, leaves
from .tape import Record, Tape
from .valuetypes import Form, nbytes_of


def to_dot(graph: Graph, depth: int = 0) -> str:
    """The source text of a Graphviz picture of a model; also a method of models.

    Parameters
    ----------
    depth : int
        How many levels of autooperators are opened; their models are drawn as clusters. One whose model is
        only known when it runs stays closed.
    """
    lines = ["digraph model {", "  rankdir=LR; node [shape=box, fontname=monospace];"]
    draw(graph, lines, "", depth)
    return "\n".join([*lines, "}"]) + "\n"


Graph.to_dot = to_dot


def draw(graph: Graph, lines: list[str], prefix: str, depth: int) -> None:
    """Append the lines for all nodes of a graph, whose names in the picture begin with a prefix."""
    made_by: dict[BaseSymbol, str] = {}

    # Draw arrows to what a node is given
    def arrows(symbol: BaseSymbol, target: str) -> None:
        for leaf in leaves(symbol):
            if leaf in made_by:
                lines.append(f"  {made_by[leaf]} -> {target} [label={quote(repr(leaf))}];")
            elif isinstance(leaf, Recorded):
                lines.append(f"  {quote(prefix + repr(leaf))} [label={quote(repr(leaf))}, shape=note];")
                lines.append(f"  {quote(prefix + repr(leaf))} -> {target};")

    for name, given in graph._inputs.items():
        made_by[given] = quote(f"{prefix}in: {name}")
        lines.append(f"  {made_by[given]} [label={quote(name)}, style=rounded];")
    for node in graph:
        # Draw a node, or what is inside
        inner = node.operator.model_of(node) if depth and node.forward is None else None
        if inner is not None:
            # Draw a cluster
            inside = f"{prefix}{node.name}/"
            lines.append(f"  subgraph {quote(f'cluster {prefix}{node.name}')} {{")
            lines.append(f"  label={quote(node.name)};")
            draw(inner, lines, inside, depth - 1)
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
    for name, symbol in graph._outputs.items():
        lines.append(f"  {quote(f'{prefix}out: {name}')} [label={quote(name)}, style=rounded];")
        arrows(symbol, quote(f"{prefix}out: {name}"))


def quote(text: str) -> str:
    """A string of the language of Graphviz."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def in_bytes(size: float) -> str:
    """A number of bytes in a unit that leaves at most four digits before the point."""
    for unit in "B", "kB", "MB", "GB":
        if size < 9999.5:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


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
    # Write the rows, and how many are left out
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


def table_of_graph(graph: Graph) -> str:
    """The nodes of a graph as a table that unfolds, in HTML."""

    def show(symbol: BaseSymbol) -> str:
        return f"<code>{html.escape(clip(repr(symbol)))}</code>"

    def cells(node: Node) -> list[str]:
        ins = ", ".join(f"{html.escape(key)}={show(symbol)}" for key, symbol in node.arguments.items())
        outs = ", ".join(show(symbol) for symbol in node.varout.values())
        return [html.escape(node.name), ins, outs, place_of(node)]

    return fold(repr(graph), ("node", "inputs", "results", "built at"), graph, cells)


def place_of(node: Node) -> str:
    """The file and the line where a node was built, in HTML."""
    filename, line = node.place
    return html.escape(f"{os.path.basename(filename)}:{line}")


Graph._repr_html_ = table_of_graph

NESTED = 30  # how many inner tapes are written out in the table of a tape


def table_of_tape(tape: Tape, budget: list[int] | None = None) -> str:
    """What the nodes of a tape recorded, as a table that unfolds, in HTML.

    `budget` holds the number of inner tapes that may still be written out.
    """
    budget = [NESTED] if budget is None else budget
    looks = looks_of(tape)
    seen: dict[int, Any] = {}
    sizes = [nbytes_of(values, seen) for values in tape.held()]

    # Write the row of a node on a tape
    def show(name: str, symbol: BaseSymbol) -> str:
        text = f"{symbol!r}: {looks[symbol]}" if symbol in looks else repr(symbol)
        return f"{html.escape(name)} = <code>{html.escape(clip(text))}</code>"

    def cells(i: int) -> list[str]:
        node = tape.plan.nodes[i]
        return [
            html.escape(node.name),
            "<br>".join(show(name, symbol) for name, symbol in node.arguments.items()),
            "<br>".join(show(name, symbol) for name, symbol in node.varout.items()),
            "<br>".join(show_recorded(tape[i], budget)),
            in_bytes(sizes[i]) if sizes[i] else "",
            place_of(node),
        ]

    summary = f"{tape!r}, {in_bytes(sum(sizes))} recorded"
    columns = "node", "inputs", "results", "recorded", "bytes", "built at"
    return fold(summary, columns, range(len(tape)), cells)


Tape._repr_html_ = table_of_tape


def show_recorded(record: Record, budget: list[int]) -> list[str]:
    """What a node recorded, each value as a line of HTML, or an inner tape as a table."""
    lines = []
    for name, value in record.impl_kwargs.items():
        if isinstance(value, Tape) and budget[0] > 0:
            budget[0] -= 1
            lines.append(table_of_tape(value, budget))
        else:
            lines.append(html.escape(f"{name}: {clip(describe(value))}"))
    return lines


def table_of_record(record: Record) -> str:
    """What one node recorded, as a table that unfolds, in HTML."""
    return fold(repr(record.node), ["recorded"], show_recorded(record, [NESTED]), lambda line: [line])


Record._repr_html_ = table_of_record


def looks_of(tape: Tape) -> dict[BaseSymbol, str]:
    """What is known of the values of symbols: of inputs, outputs, and what somebody recorded."""
    looks: dict[BaseSymbol, str] = {}
    for node, record in tape.plan.records.items():
        symbols = {**node.varout, **node.varin}
        for name, target in record.items() if type(record) is dict else ():
            if name in symbols and symbols[name] not in looks:
                looks[symbols[name]] = describe(collect(tape.slots, target))
    for name, symbol in tape.model._inputs.items():
        if name in tape.forms:
            looks[symbol] = look_of(tape.forms[name])
    looks.update((tape.model._outputs[name], look_of(value)) for name, value in tape.out.items())
    return {symbol: look for symbol, look in looks.items() if not isinstance(symbol, Literal)}


def look_of(form: Any) -> str:
    """What is known of a value from its form."""
    if type(form) is list:
        return f"list of {len(form)}"
    return str(form) if type(form) is Form else describe(form)
