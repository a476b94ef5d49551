"""Messages and tracebacks that name lines of the chapters."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import IO

from tools.literate.book import COLLECTIONS, Book


class Tracer:
    """Rewrites places in the package, as tools print them, to places in the chapters.

    Known forms: ``File "…/vmad_lit/x.py", line 12``, ``vmad_lit/x.py:12`` (with a column too), the debugger's
    ``x.py(12)f()``, ``vmad_lit/x.py, line 12`` and ``vmad_lit/x.py line 12``; absolute paths, paths into an
    installed copy and coloured output included.
    """

    def __init__(self, book: Book):
        self.book = book
        self.made = book.tangle()
        self.alias = {_installed_name(path): path for path in self.made}
        self.alias |= {path: path for path in self.made}
        names = sorted(self.alias, key=len, reverse=True)
        known = "|".join("[\\\\/]".join(map(re.escape, name.split("/"))) for name in names)
        self.known = re.compile(known)
        colour = r"(?:\x1b\[[\d;]*m)*"
        self.pattern = re.compile(
            r'(?P<open>(?<=File ")[^"\n]*[\\/])?'
            rf'(?P<prefix>(?:(?<=m)(?<=\dm)|(?<![\w.\-\\/])(?<!\x1b\[))(?:[^\s"\'<>()\[|:\x1b]*[\\/])?)?'
            rf"(?P<file>{known})"
            rf'(?P<between>{colour}["\']?{colour}(?::|\(|,? line ){colour})'
            r"(?P<line>\d+)(?!\d)(?P<column>:\d+(?!\d))?"
        )

    def rewrite(self, text: str) -> str:
        return self.pattern.sub(self._replace, text) if self.alias and self.known.search(text) else text

    def _replace(self, match: re.Match[str]) -> str:
        start = match.start("file")
        if match["open"] is None and match["prefix"] is None and start:
            return match[0]  # the tail of another word: not_vmad_lit/x.py
        path = self.alias[match["file"].replace("\\", "/")]
        number = int(match["line"])
        try:
            chapter, line = self.book.where(path, number)
        except LookupError:
            return match[0]
        column = match["column"] or ""
        if column:
            column = f":{max(1, int(column[1:]) - self._shift(path, number))}"
        return f"{chapter}{match['between']}{line}{column}"

    def _shift(self, path: str, number: int) -> int:
        """By how much a chunk's line is indented more in the package than in its chapter."""
        origin = self.made[path].lines[number - 1]
        if origin is None:
            return 0
        block = self.book.block_at(*origin)
        source = block.lines[origin.line - block.body_line]
        made = self.made[path].text.split("\n")[number - 1]
        return (len(made) - len(made.lstrip())) - (len(source) - len(source.lstrip()))


def _installed_name(path: str) -> str:
    """The name of a distribution's file where it is installed: without the distribution's folder."""
    parts = path.split("/")
    return "/".join(parts[2:]) if parts[0] in COLLECTIONS and len(parts) > 3 else path


def trace_stream(tracer: Tracer, source: Iterable[str], target: IO[str]) -> None:
    for line in source:
        target.write(tracer.rewrite(line))
        target.flush()


def trace_command(tracer: Tracer, command: Sequence[str]) -> int:
    """Run a command, rewrite what it prints, and return its exit status."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        print(f"trace: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    streams = {process.stdout: sys.stdout.buffer, process.stderr: sys.stderr.buffer}
    pending = {stream: b"" for stream in streams}

    def show(stream: IO[bytes], data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        streams[stream].write(tracer.rewrite(text).encode("utf-8", "surrogateescape"))
        streams[stream].flush()

    sys.stdout.flush()
    sys.stderr.flush()
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            try:
                ready = selector.select(0.2)
            except KeyboardInterrupt:  # the command got it too: let it say its last words
                continue
            for key, _ in ready:
                stream = key.fileobj
                data = os.read(stream.fileno(), 65536)
                pending[stream] += data
                cut = max(pending[stream].rfind(b"\n"), pending[stream].rfind(b"\r")) + 1
                if not data:
                    cut = len(pending[stream])
                    selector.unregister(stream)
                if cut:
                    show(stream, pending[stream][:cut])
                    pending[stream] = pending[stream][cut:]
            if not ready:  # a prompt, or a bar that waits: show the unfinished line
                for stream, data in pending.items():
                    if data:
                        show(stream, data)
                        pending[stream] = b""
    status = process.wait()
    return status if status >= 0 else 128 - status
