"""Writing the files of a book, and not over what somebody has edited by hand."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from tools.literate.book import Book, decode, lines_of
from tools.literate.chapters import TangleError, path_error

STATE = ".tangle"
TEMPORARY = ".tangling"


class WriteError(Exception):
    """The book is sound, but its files were not written: edited by hand, or unwritable; see ``messages``."""

    def __init__(self, messages: Iterable[str]):
        self.messages = list(messages)
        super().__init__("\n".join(self.messages))


class Written(NamedTuple):
    """What a run of ``Book.write`` did."""

    written: list[str]
    removed: list[str]
    notes: list[str]


class Memory:
    """The text that each file was given last, kept in ``.tangle/`` so that an edit by hand is seen as one.

    ``last`` holds it, a file for a file. ``next`` holds the text of a file that is about to be renamed into its
    place, so that a run which is cut short knows its own work again, whichever text it left there.
    """

    def __init__(self, root: Path):
        self.last, self.next = root / STATE / "last", root / STATE / "next"

    def files(self) -> list[str]:
        """The files that were written."""
        names = {
            path.name for folder in (self.last, self.next) if folder.is_dir() for path in folder.iterdir()
        }
        return sorted(path for path in map(unquote, names) if path_error(path) is None)

    def texts(self, path: str) -> list[bytes]:
        """What was written to a file, or about to be."""
        found = []
        for folder in (self.last, self.next):
            with contextlib.suppress(OSError):
                found.append((folder / quote(path, safe="")).read_bytes())
        return found

    def announce(self, path: str, data: bytes) -> None:
        self.next.mkdir(parents=True, exist_ok=True)
        replace_with(self.next / quote(path, safe=""), data)

    def keep(self, path: str) -> None:
        """What was announced has happened."""
        self.last.mkdir(parents=True, exist_ok=True)
        name = quote(path, safe="")
        os.replace(self.next / name, self.last / name)

    def forget(self, path: str) -> None:
        for folder in (self.last, self.next):
            discard(folder / quote(path, safe=""))


def beside(target: Path) -> Path:
    return target.with_name(f".{target.name}{TEMPORARY}")


def discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def replace_with(target: Path, data: bytes) -> None:
    """Write beside the target, with the target's permissions, and rename: the file is never half written."""
    temporary = beside(target)
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        discard(temporary)
        raise


@contextlib.contextmanager
def lock(root: Path) -> Iterator[None]:
    """One tangler at a time (where the system can lock a file)."""
    try:
        import fcntl

        (root / STATE).mkdir(parents=True, exist_ok=True)
        stream = open(root / STATE / "lock", "w")
    except (ImportError, OSError):  # another system, or a read-only tree that is up to date
        yield
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class Writer:
    """Writes a book's files into a folder."""

    def __init__(self, book: Book, root: Path, force: bool = False):
        self.book = book
        self.root = root
        self.force = force
        self.memory = Memory(root)
        self.new = {path: tangled.text.encode() for path, tangled in book.tangle().items()}
        self.old: dict[str, bytes | None] = {}

    def run(self) -> Written:
        with lock(self.root):
            known = self.memory.files()
            self.old = {path: self.read(path) for path in [*self.new, *known]}
            changed = [path for path in self.new if self.old[path] != self.new[path]]
            self._refuse(changed)
            for path in changed:
                self._write(path)
            for path in self.new:
                self.remember(path)
            removed, notes = self._clear(known)
        return Written(changed, removed, notes)

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            if path not in self.new:
                return None
            raise WriteError([f"{path} cannot be written: a folder of this name is in the way"]) from None
        except OSError as error:
            raise WriteError([f"{path} cannot be read: {error.strerror}"]) from None

    def _write(self, path: str) -> None:
        target = self.root / path
        try:
            self.memory.announce(path, self.new[path])
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_with(target, self.new[path])
            self.memory.keep(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise WriteError(
                [f"{path} cannot be written: {reason}; tangle again to go on from there"]
            ) from error

    def remember(self, path: str) -> None:
        """Note that a file is as the book makes it."""
        discard(beside(self.root / path))  # what a run that was cut short may have left
        if self.memory.texts(path) != [self.new[path]]:
            with contextlib.suppress(OSError):
                self.memory.announce(path, self.new[path])
                self.memory.keep(path)

    def _clear(self, known: Sequence[str]) -> tuple[list[str], list[str]]:
        """Remove the files of earlier runs that the book makes no more; remarks on those that stay."""
        removed, notes = [], []
        for path in known:
            if path in self.new:
                continue
            if self.old[path] is None:
                self.memory.forget(path)
            elif self.old[path] not in self.memory.texts(path):
                notes.append(f"{path} is made by no chapter any more, but was edited by hand: it stays")
            else:
                with contextlib.suppress(OSError):
                    (self.root / path).unlink()
                    removed.append(path)
                    self.memory.forget(path)
                    os.removedirs((self.root / path).parent)  # the folders that are empty now
        if self.root == self.book.root:
            notes += [f"{path} is made by no chapter" for path in self.book.strays() if path not in known]
        return removed, notes

    # -- edits by hand ---------------------------------------------------------------------------------------

    def _refuse(self, changed: Sequence[str]) -> None:
        """Raise if a file must not be overwritten."""
        messages = []
        for path in changed:
            target = self.root / path
            real = Path(os.path.realpath(target.parent))
            above = next(folder for folder in target.parents if folder.exists())
            if not real.is_relative_to(self.root):
                messages.append(f"{path} cannot be written: a link leads out of the repository, to {real}")
            elif not above.is_dir():
                messages.append(f"{path} cannot be written: {above.name} is a file, not a folder")
            elif self.old[path] is not None and not target.stat().st_mode & 0o222:
                messages.append(f"{path} cannot be written: the file is read-only")
            elif self.old[path] is not None and not self.force and self.edited(path):
                messages += self._explain(path)
        if messages:
            raise WriteError(messages)

    def edited(self, path: str) -> bool:
        """Whether a file holds anything but what a run wrote, or what the last commit's chapters make."""
        old = self.old[path].replace(b"\r\n", b"\n")
        return old not in (self.new[path], *self.memory.texts(path)) and old != self.committed.get(path)

    @cached_property
    def committed(self) -> dict[str, bytes]:
        """The files that the chapters of the last commit make: in a fresh clone there is no other memory."""
        if self.root != self.book.root:
            return {}
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), "archive", "--format=tar", "HEAD", "book"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
            )
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
                pages = [page for page in archive if page.isfile() and page.name.endswith(".md")]
                sources = {page.name: archive.extractfile(page).read() for page in pages}
            made = Book.read(self.root, sources).tangle()
        except (OSError, subprocess.CalledProcessError, tarfile.TarError, TangleError):
            return {}
        return {path: tangled.text.encode() for path, tangled in made.items()}

    def bases(self, path: str) -> list[bytes]:
        """The texts that somebody may have begun from who edited a file."""
        return self.memory.texts(path) or [text for text in [self.committed.get(path)] if text is not None]

    def _explain(self, path: str) -> list[str]:
        """Which lines of an edited file differ, and whose they are."""
        base = next(iter(self.bases(path)), self.new[path])
        before, now = lines_of(decode(base)), lines_of(decode(self.old[path]))
        out = [f"{path} was edited by hand, and tangling would overwrite that:"]
        matcher = difflib.SequenceMatcher(a=before, b=now, autojunk=False)
        for kind, first, _, start, stop in matcher.get_opcodes():
            if kind == "equal":
                continue
            lines = f"line {start + 1}" if stop - start <= 1 else f"lines {start + 1} to {stop}"
            verb = {"insert": "added", "delete": "removed before", "replace": "changed"}[kind]
            lines = f"{verb} {lines}" if kind == "delete" else f"{lines} {verb}"
            out.append(f"    {lines}: {self._owner(path, before, first)}")
        out.append(
            f"  'python tools/tangle.py stitch {path}' takes the edit into the chapter, "
            f"'git checkout -- {path}' drops it; --force overwrites it."
        )
        return out

    def _owner(self, path: str, before: Sequence[str], line: int) -> str:
        """The block from which a line of the text that was edited comes, as the chapters are today."""
        tangled = self.book.tangle()[path]
        if not tangled.lines:
            return "the book leaves the file empty"
        number = follow(before, lines_of(tangled.text), line) + 1
        chapter, number = self.book.where(path, min(number, len(tangled.lines)))
        block = self.book.block_at(chapter, number)
        return f"{chapter}:{number}, in the block #{block.id} that begins at line {block.line}"


def follow(before: Sequence[str], after: Sequence[str], line: int) -> int:
    """Where a line of one text is in another one, or what stands there instead; both counted from 0."""
    found = 0
    for a, b, size in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_matching_blocks():
        if line < a or size == 0:
            break
        found = b + min(line - a, size)
    return found
