"""The other way: edits by hand, from the files of a book back into its chapters."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tools.literate.book import Book, decode, did_you_mean, lines_of
from tools.literate.chapters import Block, Problem, TangleError
from tools.literate.layout import Place, lay_out
from tools.literate.writing import WriteError, Writer, follow, lock, replace_with


class StitchError(TangleError):
    """An edit by hand cannot be carried into the chapters. Each problem names the file and its line."""


class Stitched(NamedTuple):
    """What a run of ``Book.stitch`` did, or would do: the edited files, the chapters, and how these change."""

    files: list[str]
    chapters: list[str]
    diff: str


class _Hole(NamedTuple):
    """Where lines of an edited file may come from: these lines of a block's body, which they replace."""

    place: Place
    start: int
    stop: int

    def takes(self, lines: Iterable[str]) -> bool:
        return all(line.startswith(self.place.indent) or not line.strip() for line in lines)

    def put(self, lines: Sequence[str]) -> list[str]:
        """The lines as the block has them: without the indentation of the place."""
        return [line[len(self.place.indent) :] if line.strip() else "" for line in lines]


#: A way to carry an edit: what goes into which holes.
_Way = list[tuple[_Hole, list[str]]]


def _hunks(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """The differences, as ranges of lines of one text and of the other."""
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    return [hunk for kind, *hunk in matcher.get_opcodes() if kind != "equal"]


def _paragraphs(lines: Sequence[str]) -> int:
    """The number of runs of lines that are not blank."""
    return sum(filled for filled, _ in itertools.groupby(lines, key=lambda line: bool(line.strip())))


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _alike(line: str, other: str) -> bool:
    return difflib.SequenceMatcher(a=line.strip(), b=other.strip(), autojunk=False).ratio() > 0.6


def _bodies(ways: Iterable[_Way]) -> dict[Place, list[int | str]]:
    """The bodies of blocks with edits made in them."""
    edits: dict[Place, list[tuple[_Hole, list[str]]]] = {}
    for way in ways:
        for hole, lines in way:
            if lines or hole.start < hole.stop:
                edits.setdefault(hole.place, []).append((hole, hole.put(lines)))
    bodies = {}
    for place, changes in edits.items():
        body: list[int | str] = []
        at = 0
        for hole, lines in sorted(changes, key=lambda change: change[0].start):
            body += [*range(at, hole.start), *lines]
            at = hole.stop
        bodies[place] = _trim(place, [*body, *range(at, len(place.lines))])
    return bodies


def _trim(place: Place, body: list[int | str]) -> list[int | str]:
    """Without new blank lines at the ends, where they would mean nothing."""
    filled = [
        n for n, item in enumerate(body) if (place.lines[item] if isinstance(item, int) else item).strip()
    ]
    first, last = (filled[0], filled[-1]) if filled else (len(body), len(body))
    return [item for n, item in enumerate(body) if first <= n <= last or isinstance(item, int)]


def _text(place: Place, body: Sequence[int | str] | None = None) -> tuple[str, ...]:
    """What a body says (as it is, without another one), but for the blank lines at its ends."""
    items = range(len(place.lines)) if body is None else body
    lines = (place.lines[item] if isinstance(item, int) else item for item in items)
    return tuple("".join(line + "\n" if line.strip() else "\n" for line in lines).strip("\n").split("\n"))


def _hangs(hole: _Hole, lines: Sequence[str]) -> bool:
    """Whether lines would begin a block, but are indented more than what it begins with: they continue another."""
    own = [line for line in hole.place.lines[hole.stop :] if line.strip()]
    new = [line for line in hole.put(lines) if line]
    if not own or not new or any(line.strip() for line in hole.place.lines[: hole.start]):
        return False
    return _depth(new[0]) > _depth(own[0])


class _Edit:
    """The edit of one file: which lines of it go where."""

    def __init__(self, book: Book, path: str, text: str):
        self.path = path
        self.roots = book.places[path]
        self.rows = book.rows[path]
        self.old = [row.text for row in self.rows]
        self.new = text.split("\n")[:-1]
        self.problems: list[Problem] = []
        self.lines: dict[Place, int] = {}  # where in the file an edit of each place begins
        shown = {(row.place, row.number): at for at, row in enumerate(self.rows) if row.place}
        self.stream = list(self._stream(self.roots))  # all lines of the blocks, and the gaps between them
        self.places = list(dict.fromkeys(place for place, _, _ in self.stream))
        self.at = {shown[step[:2]]: n for n, step in enumerate(self.stream) if step[2] and step[:2] in shown}
        self.shown = shown
        self.ways = [way for region in self._regions() if (way := self._carry(*region))]

    def _stream(self, places: Iterable[Place]) -> Iterator[tuple[Place, int, bool]]:
        for place in places:
            for number in range(len(place.lines)):
                yield place, number, False
                yield place, number, True
                yield from self._stream(place.parts.get(number, ()))
            yield place, len(place.lines), False

    def _regions(self) -> Iterator[tuple[int, int, int, int]]:
        """What differs, from one line that a block owns and that stays to the next, as ranges of lines."""
        matcher = difflib.SequenceMatcher(a=self.old, b=self.new, autojunk=False)
        same = [(a + n, b + n) for a, b, size in matcher.get_matching_blocks() for n in range(size)]
        self.same = {a for a, _ in same}
        same = [(a, b) for a, b in same if self.rows[a].place]
        same = [(-1, -1), *same, (len(self.old), len(self.new))]
        for (a, b), (c, d) in itertools.pairwise(same):
            if self.old[a + 1 : c] != self.new[b + 1 : d]:
                yield a + 1, c, b + 1, d

    def _carry(self, first: int, last: int, start: int, stop: int) -> _Way | None:
        """The one way to carry a difference into the blocks; a problem if there is none, or a choice."""
        lines = self.new[start:stop]
        blank = not any(line.strip() for line in lines)
        if blank and first < last and not any(row.place for row in self.rows[first:last]):
            return None  # the space between two blocks: the layout decides, and will be compared
        skip = next((n for n, line in enumerate(lines) if line.strip()), 0)
        where = max(1, min(start + skip + 1, len(self.new)))
        found: dict[frozenset, _Way] = {}
        reasons: list[str] = []
        for way in self._ways(first, last, lines, reasons):
            texts = {(place, _text(place, body)) for place, body in _bodies([way]).items()}
            found.setdefault(frozenset(text for text in texts if text != (text[0], _text(text[0]))), way)
            if len(found) > 1:
                places = {place for key in found for place, _ in key}
                names = [str(place) for place in sorted(places, key=self.places.index)]
                reasons = [f"belongs to {' or to '.join(names)}, and nothing tells to which"]
                break
        if len(found) == 1:
            for place in _bodies([way]):
                self.lines.setdefault(place, where)
            return way
        self.problems.append(Problem(self.path, where, reasons[0]))
        return None

    def _ways(self, first: int, last: int, lines: list[str], reasons: list[str]) -> Iterator[_Way]:
        """All ways to carry a difference, also where it could as well be one a few lines further up or down."""
        for a, b, new in self._alignments(first, last, lines):
            holes = self._holes(a, b)
            gone = [
                (hole.place.block.chapter, hole.place.references[number])
                for hole in holes
                for number in range(hole.start, hole.stop)
                if number in hole.place.references
            ]
            if gone:
                chapter, reference = gone[0]
                reasons.append(
                    f"'# {reference.title}' stands for a chunk: change it at {chapter}:{reference.line}"
                )
                continue
            wanted = self.old[:a] + new + self.old[b:]
            for way in self._shares(holes, a, b, new, wanted) if len(holes) > 1 else [[(holes[0], new)]]:
                if not all(hole.takes(put) for hole, put in way):
                    place = next(hole.place for hole, put in way if not hole.takes(put))
                    reasons.append(f"is indented less than the block {place}, which it stands in")
                elif len(holes) > 1 and (
                    any(map(_hangs, *zip(*way, strict=True))) or self._made(way) != wanted
                ):
                    reasons.append("fits no block: the blank lines between blocks are set by the tangler")
                else:
                    yield way

    def _made(self, way: _Way) -> list[str]:
        return [row.text for row in lay_out(self.path, self.roots, _bodies([way]))]

    def _alignments(self, first: int, last: int, lines: list[str]) -> Iterator[tuple[int, int, list[str]]]:
        """A difference as it was found; and lines that are only added, or only removed, slid up and down."""
        old, size = self.old, min(last - first, len(lines))
        head = len(os.path.commonprefix([old[first:last], lines]))
        tail = len(os.path.commonprefix([old[first:last][::-1], lines[::-1]]))
        tail = min(tail, size - head)
        begin, end, new = first + head, last - tail, lines[head : len(lines) - tail]
        if begin < end and new:
            yield first, last, lines
            return
        span = new or old[begin:end]  # what comes, or goes
        up = down = 0
        while begin - up - 1 in self.same and old[begin - up - 1] == span[-1 - up % len(span)]:
            up += 1
        while end + down in self.same and old[end + down] == span[down % len(span)]:
            down += 1
        seen = set()
        for shift in range(-up, down + 1):
            turn = shift % len(span)
            put = span[turn:] + span[:turn] if new else []
            a, b = begin + shift, end + shift
            above = next((n + 1 for n in range(a - 1, -1, -1) if self.rows[n].place), 0)
            below = next((n for n in range(b, len(old)) if self.rows[n].place), len(old))
            put = old[above:a] + put + old[b:below]
            if (above, below) not in seen:
                seen.add((above, below))
                yield above, below, put

    def _holes(self, first: int, last: int) -> list[_Hole]:
        """The places between two lines that stay, in the order of the file, each with its lines there."""
        begin = self.at[first - 1] + 1 if first else 0
        end = self.at[last] if last < len(self.rows) else len(self.stream)
        gaps: dict[Place, list[int]] = {}
        owned: dict[Place, list[int]] = {}
        for place, number, line in self.stream[begin:end]:
            if not line:
                gaps.setdefault(place, []).append(number)
            elif (place, number) in self.shown:
                owned.setdefault(place, []).append(number)
        holes = []
        for place, numbers in gaps.items():
            if place in owned:
                holes.append(_Hole(place, owned[place][0], owned[place][-1] + 1))
            else:  # next to the text of the block, within the blank lines that it may begin or end with
                at = numbers[0] if (place, numbers[0] - 1) in self.shown else numbers[-1]
                holes.append(_Hole(place, at, at))
        return holes

    def _shares(
        self, holes: list[_Hole], first: int, last: int, lines: list[str], wanted: list[str]
    ) -> Iterator[_Way]:
        """The ways to deal out lines to several holes, one after the other."""
        apart = any(not row.place for row in self.rows[first:last])
        if apart and not any(line.strip() for line in lines):
            lines = []  # the layout sets them
        owners = [hole for hole in holes if hole.start < hole.stop]
        owned = [row.text for row in self.rows[first:last] if row.place]
        filled = [n for n, line in enumerate(lines) if line.strip()]
        likely = None
        depth = min(map(_depth, filter(str.strip, owned)), default=0)
        within = depth and all(_depth(lines[n]) >= depth for n in filled)  # the same suite goes on
        if len(owners) == 1 and (within or _paragraphs(lines) <= max(1, _paragraphs(owned))):
            likely = [(hole, lines if hole is owners[0] else []) for hole in holes]
        elif (
            len(owners) > 1
            and len(filled) == len(owned)
            and all(_alike(old, lines[n]) for old, n in zip(owned, filled, strict=True))
        ):
            sizes = itertools.accumulate(hole.stop - hole.start for hole in holes[:-1])
            edges = [0, *(filled[size - 1] + 1 if size else 0 for size in sizes), len(lines)]
            likely = [
                (hole, lines[a:b]) for hole, (a, b) in zip(holes, itertools.pairwise(edges), strict=True)
            ]
        if likely and all(hole.takes(put) for hole, put in likely) and self._made(likely) == wanted:
            yield likely
            return
        cuts = [0, *range(1, len(lines)), len(lines)] if lines else [0]
        if apart:
            cuts = [
                c for c in cuts if c in (0, len(lines)) or not (lines[c - 1].strip() and lines[c].strip())
            ]
        for places in itertools.combinations_with_replacement(cuts, len(holes) - 1):
            edges = itertools.pairwise([0, *places, len(lines)])
            yield [(hole, lines[a:b]) for hole, (a, b) in zip(holes, edges, strict=True)]


class Stitcher:
    """One run of ``Book.stitch``."""

    def __init__(self, book: Book):
        self.book = book
        self.writer = Writer(book, book.root)
        self.problems: list[Problem] = []

    def run(self, paths: Iterable[str] | None, dry_run: bool) -> Stitched:
        with lock(self.book.root):
            edits = [edit for path in paths or self.writer.new if (edit := self._edit(path, bool(paths)))]
            self.problems += [problem for edit in edits for problem in edit.problems]
            self._raise()
            sources = self._rewrite(self._agree(edits))
            self._raise()
            after = self._prove(edits, self.book.sources | sources)
            self._raise()
            diff = "".join(
                _chapter_diff(name, self.book.sources[name], data) for name, data in sources.items()
            )
            if not dry_run:
                self._write(sources)
                writer = Writer(after, self.book.root)
                for edit in edits:  # the files are what the book makes now, but for the line ends of Windows
                    writer.remember(edit.path)
                    if self.writer.old[edit.path] != writer.new[edit.path]:
                        replace_with(self.book.root / edit.path, writer.new[edit.path])
        return Stitched([edit.path for edit in edits], list(sources), diff)

    def _raise(self) -> None:
        if self.problems:
            raise StitchError(self.problems)

    def _edit(self, path: str, named: bool) -> _Edit | None:
        """The edit of a file, if it was edited by hand."""
        if path not in self.writer.new:
            raise LookupError(f"no chapter makes {path}" + did_you_mean(path, self.writer.new))
        data = self.writer.old[path] = self.writer.read(path)
        if data is None or not self.writer.edited(path):
            if data is None and named:
                self.problems.append(Problem(path, 1, "the file is missing"))
            return None
        try:
            text = data.decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.problems.append(Problem(path, line, f"not UTF-8: {error.reason}"))
            return None
        if text and not text.endswith("\n"):
            self.problems.append(Problem(path, text.count("\n") + 1, "the last line does not end"))
        elif problem := self._both(path, text.split("\n")[:-1]):
            self.problems.append(problem)
        else:
            return _Edit(self.book, path, text)
        return None

    def _both(self, path: str, now: list[str]) -> Problem | None:
        """Where the book changed as well since the file was tangled, unless the file has that change, too."""
        bases = self.writer.bases(path)
        if not bases:
            return Problem(
                path, 1, "nobody knows what was tangled into this file last: it may be the book that changed"
            )
        book = lines_of(decode(self.writer.new[path]))
        for base in map(lines_of, map(decode, bases)):
            ours, theirs = (
                {(a, b, tuple(text[c:d])) for a, b, c, d in _hunks(base, text)} for text in (book, now)
            )
            if ours - theirs:
                at = min(ours - theirs)[0]
                line = min(follow(base, book, at) + 1, len(book))
                place = "{}:{}".format(*self.book.where(path, line)) if line else self.book.roots[path]
                return Problem(
                    path,
                    min(follow(base, now, at) + 1, max(len(now), 1)),
                    f"the book has changed here, too, since it was tangled last (at {place}): "
                    "save the edit, tangle with --force, and edit anew",
                )
        return None

    def _agree(self, edits: Sequence[_Edit]) -> dict[Block, list[int | str]]:
        """The new bodies of the blocks: a block that goes to several places must be changed alike in all."""
        uses: dict[Block, list[tuple[str, Place]]] = {}

        def visit(path: str, places: Iterable[Place]) -> None:
            for place in places:
                uses.setdefault(place.block, []).append((path, place))
                for parts in place.parts.values():
                    visit(path, parts)

        for path, places in self.book.places.items():
            visit(path, places)
        bodies = {place: body for edit in edits for place, body in _bodies(edit.ways).items()}
        changed = {}
        for edit in edits:
            for place, line in edit.lines.items():
                changed[place.block] = bodies[place]
                for path, other in uses[place.block]:
                    if _text(place, bodies[place]) != _text(other, bodies.get(other)):
                        rows = self.book.rows[path]
                        number = next((n for n, row in enumerate(rows, 1) if row.place is other), 1)
                        self.problems.append(
                            Problem(
                                edit.path,
                                line,
                                f"#{place.block.id} goes into {len(uses[place.block])} places, and "
                                f"{path}:{number} is not changed in the same way",
                            )
                        )
                        break
        return changed

    def _rewrite(self, changed: Mapping[Block, Sequence[int | str]]) -> dict[str, bytes]:
        """The chapters with new bodies of these blocks; all else stays byte for byte."""
        pages: dict[str, list[str]] = {}
        for block in sorted(changed, key=lambda block: -block.line):
            text = self.book.sources[block.chapter].decode()
            page = pages.setdefault(block.chapter, re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text))
            fence = page[block.line - 1].removeprefix("\ufeff")
            end = fence[len(fence.rstrip("\r\n")) :]
            margin = re.sub(
                r"[^>\s]", " ", fence[: re.search("```|~~~", fence).start()]
            )  # of a list or quotation
            body = page[block.body_line - 1 : block.end_line - 1]
            page[block.body_line - 1 : block.end_line - 1] = [
                body[item] if isinstance(item, int) else (margin + item if item else margin.rstrip()) + end
                for item in changed[block]
            ]
        return {name: "".join(pages[name]).encode() for name in sorted(pages)}

    def _prove(self, edits: Sequence[_Edit], sources: Mapping[str, bytes]) -> Book:
        """Tangle the new chapters in memory: do they make the edited files, and all others as before?"""
        after = Book.read(self.book.root, sources)
        first = {
            place.block.chapter: (edit.path, line) for edit in edits for place, line in edit.lines.items()
        }
        for problem in after.problems[:1]:  # others may only follow from it
            path, line = first.get(problem.chapter) or next(iter(first.values()))
            self.problems.append(Problem(path, line, f"the chapter would be wrong: {problem}"))
        self._raise()
        wanted = {path: tangled.text for path, tangled in self.book.tangle().items()}
        wanted |= {edit.path: "".join(line + "\n" for line in edit.new) for edit in edits}
        for path, tangled in after.tangle().items():
            if tangled.text != wanted[path]:
                made, lines = lines_of(tangled.text), lines_of(wanted[path])
                at = len(os.path.commonprefix([made, lines]))
                texts = [text[at] if at < len(text) else None for text in (made, lines)]
                why = "the blank lines here are set by the tangler"
                if all(text and text.strip() for text in texts):
                    why = f"would be tangled as {texts[0]!r}"
                self.problems.append(Problem(path, min(at + 1, max(1, len(lines))), why))
        return after

    def _write(self, sources: Mapping[str, bytes]) -> None:
        paths = {name: self.book.root / name for name in sources}
        try:
            stale = [name for name, path in paths.items() if path.read_bytes() != self.book.sources[name]]
            if stale:
                raise WriteError([f"{name} was changed a moment ago: stitch again" for name in stale])
            for name, data in sources.items():
                replace_with(paths[name], data)
        except OSError as error:
            raise WriteError(
                [f"{error.filename}: {error.strerror}; stitch again to go on from there"]
            ) from error


def _chapter_diff(name: str, before: bytes, after: bytes) -> str:
    texts = (lines_of(data.decode("utf-8-sig").replace("\r\n", "\n")) for data in (before, after))
    diff = difflib.unified_diff(*texts, name, f"{name} (stitched)", lineterm="")
    return "".join(line + "\n" for line in diff)
