"""A headless Chromium, for those tools of the book that need to see a page as a reader does.

The browser is driven by the DevTools protocol through a pair of pipes (``--remote-debugging-pipe``): JSON texts with
zero bytes between them.  That is little enough to need no library.  No name but ``127.0.0.1`` is resolved, so that the
result is the same with and without a network.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import http.server
import json
import os
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"


class NoBrowser(Exception):
    """There is no browser to look with, or it does not answer."""


# -- A browser ----------------------------------------------------------------------------------------------


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, program: str | None = None) -> None:
        program = program or next(filter(None, map(shutil.which, BROWSERS)), None)
        if program is None:
            raise NoBrowser("found no Chromium; Debian has it as `apt install chromium`")
        self.folder = tempfile.mkdtemp(prefix="check-book-")
        self.incoming, self.count, self.events = b"", 0, []
        theirs_in, self.output = os.pipe()
        self.input, theirs_out = os.pipe()
        # Above 9, so that 3 and 4, where Chromium looks for the pipes, are free to be given
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={self.folder}",
        ]
        nothing = os.open(os.devnull, os.O_RDWR)
        moves = [
            (os.POSIX_SPAWN_DUP2, end, number) for end, number in zip([*ends, nothing, nothing], (3, 4, 1, 2))
        ]
        self.process = os.posix_spawn(
            program, [program, *options], os.environ, file_actions=moves, setpgroup=0
        )
        for end in (theirs_in, theirs_out, nothing, *ends):
            os.close(end)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Runtime", "Network":
            self.ask(f"{domain}.enable")

    session: str | None = None
    patience = 120.0  # seconds for an answer

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command, and wait for its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.patience
        while True:
            answer = self.receive(deadline, method)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise NoBrowser(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait(self, event: str) -> None:
        """Wait for an event that comes after what was said last."""
        deadline = time.monotonic() + self.patience
        while not any(found.get("method") == event for found in self.events):
            self.events.append(self.receive(deadline, event))

    def receive(self, deadline: float, what: str) -> Any:
        seen = 0
        while self.incoming.find(b"\0", seen) < 0:
            seen = len(self.incoming)
            ready, _, _ = select.select([self.input], [], [], max(deadline - time.monotonic(), 0))
            part = os.read(self.input, 1 << 16) if ready else b""
            if not part:
                raise NoBrowser(f"the browser {'ended' if ready else 'gave no answer'} at {what}")
            self.incoming += part
        message, _, self.incoming = self.incoming.partition(b"\0")
        return json.loads(message)

    def read_stream(self, handle: str) -> bytes:
        """What the browser has put into a stream, such as a PDF."""
        parts = []
        while True:
            got = self.ask("IO.read", handle=handle, size=1 << 20)
            parts.append(base64.b64decode(got["data"]) if got["base64Encoded"] else got["data"].encode())
            if got["eof"]:
                self.ask("IO.close", handle=handle)
                return b"".join(parts)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        done = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise NoBrowser(f"a script failed: {done['exceptionDetails']}")
        return done["result"].get("value")

    def resize(self, width: int, height: int = 1000) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, address: str) -> None:
        self.events.clear()
        self.ask("Page.navigate", url=address)
        self.wait("Page.loadEventFired")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.output)
        os.close(self.input)
        try:
            os.killpg(self.process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(self.process, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that keeps to itself what it does."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of a server of a folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=root))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
