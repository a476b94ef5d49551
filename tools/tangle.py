#!/usr/bin/env python3
"""Make the package out of the book, and find the way back.

The chapters under ``book/`` are the source of this project. A fence whose info string carries an id is
*canonical*; everything else on a page is prose, illustration, or an example::

    ```python {#tape file="vmad_lit/core/tape.py"}      the first block of a file
    ```python {#tape}                                   appends to it, also from a later chapter
    ```python {#walk-the-tape-backwards}                a named chunk, used as a comment line:
            # <<Walk the tape backwards>>               "# Walk the tape ..." and the chunk, indented

Commands (from the root of the repository)::

    python tools/tangle.py                    write the files that changed, and say which
    python tools/tangle.py --check            write nothing; diff and exit status 1 if package and book differ
    python tools/tangle.py --check-marks      is code that is neither tangled nor run marked as illustration?
    python tools/tangle.py --check-order      does a module use only what earlier chapters have built?
    python tools/tangle.py --force            write also over files that were edited by hand
    python tools/tangle.py --watch            write again whenever a chapter changes, until Ctrl-C
    python tools/tangle.py --upto NN          the files as of chapter NN, in _build/upto/NN (or --output DIR)
    python tools/tangle.py stitch [FILE...]   carry edits by hand from the package back into the chapters
    python tools/tangle.py where FILE:LINE    the chapter line of a package line, or the reverse
    python tools/tangle.py trace -- COMMAND   run a command; its messages and tracebacks name chapter lines
    python tools/tangle.py list               the files, and the chapters they come from

Exit status: 0 all is well; 1 the package and the book differ (``--check``); 2 the book has errors, or a file
cannot be written, was edited by hand, or cannot be stitched. ``trace`` passes on the status of the command.

The same things are there for programs: ``Book.load(root)`` reads the chapters once; its blocks, its files and
the map between lines of the package and lines of the chapters serve Sphinx, pytest and coverage alike.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a program: its parts are found from here
# ruff: noqa: E402

from tools.literate import book as literate
from tools.literate.book import COLLECTIONS, HAND_WRITTEN, Drift, Tangled, module_of
from tools.literate.chapters import FORBIDDEN, Block, Problem, Reference, TangleError, slug
from tools.literate.order import Order
from tools.literate.stitching import Stitched, Stitcher, StitchError
from tools.literate.tracing import Tracer, trace_command, trace_stream
from tools.literate.writing import WriteError, Writer, Written

__all__ = [
    "Block",
    "Book",
    "Drift",
    "Problem",
    "Reference",
    "StitchError",
    "Stitched",
    "TangleError",
    "Tangled",
    "Tracer",
    "WriteError",
    "Written",
    "main",
    "module_of",
    "slug",
    "watch",
]

#: Where ``--upto`` writes.
PARTS = "_build/upto"

#: Whether ``--check`` asks for the order of dependence, too.
ORDER_IN_CHECK = True

#: Whether ``--check``, and so the build, asks that code which is neither tangled nor run be marked as illustration.
MARKS_IN_CHECK = True


class Book(literate.Book):
    """All chapters of a book, read and cross-checked, with all that can be done with them."""

    def write(self, force: bool = False) -> Written:
        """Write the files that changed, one after the other, each beside its target and then renamed.

        A file that was edited by hand since it was written is not touched, and then no other is:
        ``WriteError`` says which of its lines differ and from which blocks they come; ``force`` overwrites it.
        Files that an earlier run wrote and that no chapter makes any more are removed, if they are as they
        were written.
        """
        if self.whole is not None:
            raise WriteError(["a part of the book is written into a folder of its own: see Book.export"])
        return Writer(self, self.root, force).run()

    def export(self, folder: str | os.PathLike[str], force: bool = False) -> Written:
        """Write the files as :meth:`write` does, but into another folder, which must not be a book's own."""
        folder = Path(folder).resolve()
        book = self.whole or self
        own = {path.split("/")[0] for path in book.roots} | FORBIDDEN | HAND_WRITTEN | COLLECTIONS
        if (
            self.root.is_relative_to(folder)
            or (folder / "book").is_dir()
            or (folder.is_relative_to(self.root) and folder.relative_to(self.root).parts[0] in own)
        ):
            raise WriteError([f"{folder} holds files of a book: choose another folder for this part of one"])
        return Writer(self, folder, force).run()

    # -- the other way ---------------------------------------------------------------------------------------

    def stitch(self, paths: Iterable[str] | None = None, dry_run: bool = False) -> Stitched:
        """Carry edits by hand from files of the package (by default all of them) back into the chapters.

        The chapters are rewritten only if tangling them gives each edited file again, line by line, and every
        other file as it was; otherwise, and where it is not certain to which block a line belongs,
        ``StitchError`` says why, for all edits at once, and nothing is written. ``dry_run`` writes nothing
        either. This object is out of date afterwards: load the book again.
        """
        if self.whole is not None:
            raise WriteError(["a part of the book cannot be stitched: load the whole"])
        return Stitcher(self).run(paths, dry_run)

    # -- the order of dependence -----------------------------------------------------------------------------

    def check_order(self) -> list[Problem]:
        """Where a module imports what a later chapter builds, or modules import each other in a circle.

        All imports among the files of the book count, also those within functions and for type checkers; so
        do names that are reached through an imported module. A name is built by the block that binds it, be
        it by a definition, an assignment or an import.
        """
        self.tangle()
        return sorted(set(Order(self).problems()))

    # -- what is only to be looked at ------------------------------------------------------------------------

    def check_marks(self) -> list[Problem]:
        """Code of which a reader cannot tell what it is: Python that is neither tangled nor run, and no marked illustration.

        An illustration is a fence ```` ```python {.illustration} ````. Fences of other languages need no mark;
        those without a language, and code that is set off by its indentation alone, are reported as well.
        """
        return sorted(set(self.unmarked))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tangle",
        description="Make the package out of the book.",
        epilog="Exit status: 0 all is well, 1 drift (--check), 2 errors or edits by hand.",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=ROOT,
        metavar="DIR",
        help="root of the repository (default: the folder above this program)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; diff and status 1 on drift")
    parser.add_argument("--check-order", action="store_true", help="report what is used before it is built")
    parser.add_argument("--check-marks", action="store_true", help="report illustrations that are not marked")
    parser.add_argument("--force", action="store_true", help="overwrite files that were edited by hand")
    parser.add_argument("--watch", action="store_true", help="write again whenever a chapter changes")
    parser.add_argument("--upto", type=int, metavar="NN", help="write the files as of chapter NN elsewhere")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"folder for --upto (default: {PARTS}/NN)")
    commands = parser.add_subparsers(dest="command", metavar="stitch | where | trace | list")
    stitch = commands.add_parser("stitch", help="carry edits by hand from the package into the chapters")
    stitch.add_argument("file", nargs="*", metavar="FILE", help="edited files (default: all of them)")
    stitch.add_argument("--dry-run", action="store_true", help="only show how the chapters would change")
    where = commands.add_parser("where", help="the chapter line of a package line, or the reverse")
    where.add_argument("place", nargs="+", metavar="FILE:LINE")
    trace = commands.add_parser("trace", help="rewrite places to chapter lines (a filter, or a command)")
    trace.add_argument("run", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    commands.add_parser("list", help="the files, and the chapters they come from")
    return parser


def _find(book: Book, file: str) -> str:
    """A file as the book names it: as seen from the current folder if it is known there, else from the root."""
    here = book.relative(Path(file).absolute())
    return here if here in {*book.tangle(), *book.chapters} else book.relative(file)


def _where(book: Book, place: str) -> list[str]:
    file, _, line = place.rpartition(":")
    if not file or not line.isdecimal():
        raise LookupError(f"{place!r} is not of the form FILE:LINE")
    here = _find(book, file)
    if here not in book.chapters:
        return ["{}:{}".format(*book.where(here, int(line)))]
    found = book.tangled_at(here, int(line))
    if not found:
        block = book.block_at(here, int(line))
        raise LookupError(
            f"{here}:{line} is not a line of the package: "
            + ("it stands in " + repr(block)[1:-1] if block else "it stands in the prose")
        )
    return [f"{path}:{number}" for path, number in found]


def _list(book: Book) -> Iterator[str]:
    made = book.tangle()
    for path, tangled in made.items():
        chapters = dict.fromkeys(origin.chapter for origin in tangled.lines if origin)
        chapters = chapters or {book.chunks[book.roots[path]][0].chapter: None}
        yield f"{path}  ({len(tangled.lines)} lines)  " + ", ".join(chapters)


def _check(book: Book, drift: bool, order: bool, marks: bool) -> int:
    drifts = book.check() if drift else []
    for found in drifts:
        sys.stdout.write(found.diff)
    sys.stdout.flush()
    for found in drifts:
        print(found.message, file=sys.stderr)
    if drifts:
        print(
            "The chapters are the source: 'python tools/tangle.py' writes the package anew, and "
            "'python tools/tangle.py stitch' takes an edit by hand into the chapters.",
            file=sys.stderr,
        )
    problems = [*(book.check_order() if order else []), *(book.check_marks() if marks else [])]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if problems else 1 if drifts else 0


def _write(book: Book, force: bool, folder: Path | None = None) -> int:
    done = book.write(force) if folder is None else book.export(folder, force)
    within = "" if folder is None else f" in {folder}"
    for path in done.written:
        print(f"wrote {path}{within}", flush=True)
    for path in done.removed:
        print(f"removed {path}{within}: no chapter makes it any more", flush=True)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _stitch(book: Book, files: Sequence[str], dry_run: bool) -> int:
    done = book.stitch([_find(book, file) for file in files], dry_run)
    if dry_run:
        sys.stdout.write(done.diff)
    elif done.files:
        print(f"stitched {', '.join(done.files)} into {', '.join(done.chapters)}")
    if not done.files:
        print("no file was edited by hand", file=sys.stderr)
    return 0


def watch(root: str | os.PathLike[str], pause: Callable[[], None] = lambda: time.sleep(0.3)) -> int:
    """Tangle, and again whenever a chapter has changed and has been left alone since the last look.

    What was written is printed, and so is what is wrong with the book: the next change may mend it. Ends with
    Ctrl-C; ``pause`` is what happens between two looks.
    """
    done = before = None
    try:
        while True:
            now = {}
            for path in (Path(root) / "book").rglob("*.md"):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    now[path] = status.st_mtime_ns, status.st_size, status.st_ino
            if now != done and (now == before or done is None):
                done = now
                try:
                    _write(Book.load(root), force=False)
                except (TangleError, WriteError, OSError) as error:
                    print(error, file=sys.stderr, flush=True)
            before = now
            pause()
    except KeyboardInterrupt:
        return 0


def _trace(book: Book, run: Sequence[str]) -> int:
    try:
        tracer = Tracer(book)
    except TangleError as error:  # show the tool's own words rather than nothing
        print(f"trace: the book has errors, so places stay as they are\n{error}", file=sys.stderr)
        tracer = Tracer(Book(book.root, [], []))
    else:
        stale = [drift.path for drift in book.check() if drift.path in tracer.made]
        if stale:
            print(
                f"trace: not what the book makes now: {', '.join(stale)}; run 'python tools/tangle.py' first",
                file=sys.stderr,
            )
    command = run[1:] if run[:1] == ["--"] else run
    if command:
        return trace_command(tracer, command)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="surrogateescape", newline="")
    trace_stream(tracer, sys.stdin, sys.stdout)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    checks = options.check or options.check_order or options.check_marks
    if options.command and (checks or options.force or options.watch or options.upto is not None):
        parser.error(f"{options.command} goes with no option but --root")
    if checks + options.watch + (options.upto is not None) > 1:
        parser.error("--check, --watch and --upto exclude each other")
    if options.force and (checks or options.watch):
        parser.error("--force goes only with writing once")
    if options.output and options.upto is None:
        parser.error("--output goes with --upto")
    if options.watch:
        return watch(options.root)
    book = Book.load(options.root, options.upto)
    try:
        if options.command == "trace":
            return _trace(book, options.run)
        if options.command == "where":
            for place in options.place:
                print("\n".join(_where(book, place)))
            return 0
        if options.command == "list":
            print("\n".join(_list(book)))
            return 0
        if options.command == "stitch":
            return _stitch(book, options.file, options.dry_run)
        if checks:
            order = options.check_order or (options.check and ORDER_IN_CHECK)
            marks = options.check_marks or (options.check and MARKS_IN_CHECK)
            return _check(book, options.check, order, marks)
        folder = None
        if options.upto is not None:
            folder = options.output or book.root / PARTS / f"{options.upto:02}"
        return _write(book, options.force, folder)
    except (TangleError, WriteError, LookupError) as error:
        print(error.args[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
