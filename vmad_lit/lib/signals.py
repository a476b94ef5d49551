"""A program that is asked to end by a signal, on one rank or on all, ends at a good moment, on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
import os
import select
import signal
import threading
import time
from typing import Any

#: Seconds within which several signals are one, which came by several ways.
ECHO = 1.0


class Interrupt:
    """What a program knows of the signals that it has got.

    Attributes
    ----------
    signum : int
        The number of the first signal that this rank got or was told of; 0 before.
    grace : float
        Seconds from then until the process ends itself, wherever it is.
    """

    def __init__(self, comm: Any, grace: float, signals: Sequence[int]) -> None:
        self.comm, self.grace, self.signals = comm, grace, tuple(signals)
        self.signum = 0
        self._pipe: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The name of the signal, such as SIGTERM; empty if there was none."""
        return signal.Signals(self.signum).name if self.signum else ""

    @property
    def status(self) -> int:
        """With what status to leave: 0, or 128 and the number of the signal."""
        return 128 + self.signum if self.signum else 0

    # Let the ranks agree
    def agree(self, comm: Any = None, wish: bool = False) -> bool:
        """Whether any rank of `comm` has got a signal, or has a `wish` to stop: then all know. Collective.

        Without a communicator the process decides for itself.
        """
        number = int(bool(wish))
        if self.signum in self.signals:
            number += BASE ** (1 + self.signals.index(self.signum))
        if comm is not None and comm.size > 1:
            number = comm.allreduce(number)
        for i, signum in enumerate(self.signals):
            if number // BASE ** (1 + i) % BASE:
                self._be_told(signum)
                break
        return number > 0

    def _be_told(self, signum: int) -> None:
        """Take over a signal that another rank has got."""
        if not self.signum:
            self.signum = signum
            if self._pipe is not None:
                os.write(self._pipe[1], bytes([signum]))

    # Watch for signals
    def _watch(self) -> None:
        """Read the numbers of signals from the pipe until a 0 comes; end the process when there is no more time."""
        assert self._pipe is not None
        first = None
        while True:
            left = None if first is None else max(0.0, first + self.grace - time.monotonic())
            if not select.select([self._pipe[0]], [], [], left)[0]:
                self._end_at_once(f"has not ended within {self.grace:g} s of {self.name}")
            for signum in os.read(self._pipe[0], 256):
                if signum == 0:
                    return
                if signum not in self.signals:
                    continue
                if first is not None and time.monotonic() - first > ECHO:
                    self._end_at_once("was told to end a second time")
                if first is None:
                    self.signum, first = self.signum or signum, time.monotonic()

    def _end_at_once(self, why: str) -> None:
        """End this process, and, since the others cannot go on without it, the job."""
        os.write(2, f"vmad_lit: this process {why}, and ends now\n".encode())
        if self.comm is not None and self.comm.size > 1:
            abort = threading.Thread(target=self.comm.Abort, args=(self.status,), daemon=True)
            abort.start()
            abort.join(1.0)
        os._exit(self.status)


BASE = 1 << 40

_active: list[Interrupt] = []


def current_interrupt() -> Interrupt | None:
    """That of the innermost block of :func:`heed_signals`; None outside."""
    return _active[-1] if _active else None


@contextmanager
def heed_signals(
    comm: Any = None,
    grace: float = 20.0,
    leave: bool = True,
    signals: Sequence[int] | None = None,
) -> Iterator[Interrupt]:
    """In this block a signal asks the program to end at the next good moment, on all ranks of `comm`.

    The signals are SIGTERM and SIGINT, unless others are given.

    Optimisers end with the iteration, and `autosave` saves then; other programs ask ``interrupt.agree(comm)``.
    After the block the process leaves, by `SystemExit` with the status 128 + signal, unless `leave` is false. A second
    signal, or `grace` seconds, end the process wherever it is. On other threads than the main one signals stay as they are.
    """
    interrupt = Interrupt(comm, grace, (signal.SIGTERM, signal.SIGINT) if signals is None else signals)
    with _handlers_of(interrupt):
        _active.append(interrupt)
        try:
            yield interrupt
        finally:
            _active.remove(interrupt)
        interrupt.agree(comm)
    if leave and interrupt.signum:
        raise SystemExit(interrupt.status)


@contextmanager
def _handlers_of(interrupt: Interrupt) -> Iterator[None]:
    """Have the numbers of signals written to a pipe, and watch it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = interrupt._pipe = os.pipe()
    os.set_blocking(writing, False)
    before = {signum: signal.signal(signum, _do_nothing) for signum in interrupt.signals}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=interrupt._watch, daemon=True)
    watch.start()

    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        os.write(writing, b"\0")
        watch.join()
        interrupt._pipe = None
        for end in reading, writing:
            with suppress(OSError):
                os.close(end)


def _do_nothing(signum: int, frame: Any) -> None:
    """The handler on the main thread: the thread that watches the pipe has seen the signal already."""
