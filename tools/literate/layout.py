"""How blocks become a file: one after the other, with what they include, and blank lines between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tools.literate.chapters import Block


def _begins_definition(lines: Sequence[str]) -> bool:
    """Whether a block opens with a function or class, perhaps after comments and decorators."""
    for line in lines:
        if line and not line.startswith("#"):
            return line.startswith(("def ", "class ", "async def ", "@"))
    return False


def _ends_definition(lines: Sequence[str]) -> bool:
    """Whether the last statement of a block at the outer level is a function or class."""
    for line in reversed(lines):
        if line and not line.startswith((" ", "\t", "#", ")", "]", "}", '"""', "'''")):
            return line.startswith(("def ", "class ", "async def ", "@"))
    return True  # an indented block continues a definition


def _blank_lines(path: str, before: Sequence[str], after: Sequence[str]) -> int:
    """Blank lines between two blocks of a file, as PEP 8 wants them."""
    if not path.endswith((".py", ".pyi")) or after[0].startswith((" ", "\t")):
        return 1
    return 2 if _ends_definition(before) or _begins_definition(after) else 1


class Place:
    """One of the places into which a block goes: how far it is indented there, and what it includes there."""

    def __init__(self, block: Block, indent: str, chunks: Mapping[str, Sequence[Block]]):
        self.block = block
        self.indent = indent
        self.lines = block.lines
        self.references = {reference.line - block.body_line: reference for reference in block.references}
        self.parts = {
            number: [Place(part, indent + reference.indent, chunks) for part in chunks.get(reference.id, ())]
            for number, reference in self.references.items()
        }

    def __str__(self) -> str:
        return f"#{self.block.id} at {self.block.chapter}:{self.block.line}"


class Row(NamedTuple):
    """A line of a tangled file: the line of a block's body, by its number there, in one of the block's places.

    A line that separates two blocks has no place, and one that is being put in has no number yet.
    """

    text: str
    place: Place | None = None
    number: int | None = None


#: The bodies of some blocks in some of their places as they would be: numbers of lines that stay, and new lines.
Bodies = Mapping[Place, Sequence["int | str"]]


def lay_out(path: str, places: Iterable[Place], bodies: Bodies) -> list[Row]:
    """The lines of blocks that follow each other, with what they include, and blank lines between them."""
    rows: list[Row] = []
    before: list[Row] = []
    for place in places:
        piece = _strip(_fill_in(path, place, bodies))
        if before and piece:
            texts = [row.text for row in before], [row.text for row in piece]
            rows += [Row("")] * (1 if place.indent else _blank_lines(path, *texts))
        rows += piece
        before = piece or before
    return rows


def _fill_in(path: str, place: Place, bodies: Bodies) -> list[Row]:
    """The lines of a block in one of its places, with its references replaced by what they name."""
    rows: list[Row] = []
    for item in bodies.get(place, range(len(place.lines))):
        if isinstance(item, str):
            rows.append(Row(place.indent + item if item.strip() else "", place))
            continue
        text, reference = place.lines[item], place.references.get(item)
        if reference is not None:
            text = f"{reference.indent}# {reference.title}"
        rows.append(Row(place.indent + text if text.strip() else "", place, item))
        rows += lay_out(path, place.parts.get(item, ()), bodies)
    return rows


def _strip(rows: list[Row]) -> list[Row]:
    """Without the blank lines at both ends."""
    first, last = 0, len(rows)
    while first < last and not rows[first].text:
        first += 1
    while last > first and not rows[last - 1].text:
        last -= 1
    return rows[first:last]
