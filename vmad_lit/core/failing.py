"""What ends on one rank in an error ends the whole job.

A job of several ranks that uses this package is ended on all of them, with the traceback of the rank that is to blame,
by an exception that nobody catches, in a thread too; and ranks meet at the end of the program. Not under pytest, in a
notebook or an interactive session, nor with ``python -m mpi4py``, which sees to it by itself.

Environment
-----------
VMAD_LIT_ABORT : with 0, all of this is left out
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import Any
from zlib import crc32

import numpy

from .error import Disagreement, LeftAlone
from .meeting import Place, Watch, channel_of_all
from .placement import WHEN_MANY, many_ranks

#: Set by the launchers of MPICH, Open MPI and Slurm.
LAUNCHERS = "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"
GRACE = 3.0  # seconds for the other ranks to come to the end, too, if one leaves with an error
LONG = 10.0  # seconds after which a rank that waits for others at its end says so
ENOUGH = 30.0  # seconds to wait for others who have never met


class Ending:
    """How a rank of a job ends, from `install` on."""

    installed = False
    failed = False
    status = 0
    pid = 0  # a child that is forked off is no rank


def abort_on_failure(on: bool = True) -> None:
    """Whether an exception that nobody catches on one rank ends the job on all; as it does by default.

    What is told at the end of a rank is left out as well.
    """
    Ending.installed, Ending.pid = on, os.getpid()
    if on and sys.excepthook is not report:
        BEFORE.update(main=sys.excepthook, thread=threading.excepthook, exit=sys.exit)
        sys.excepthook, threading.excepthook = report, report_thread
        sys.exit = leave
        atexit.register(meet_at_the_end)


BEFORE: dict[str, Any] = {}


def someone_else_sees_to_it() -> bool:
    """Whether an exception does not end this process, or ends all of them without us."""
    under_pytest = "_pytest.config" in sys.modules and "PYTEST_VERSION" in os.environ
    interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
    return under_pytest or interactive or "ipykernel" in sys.modules or "mpi4py.run" in sys.modules


def find_mpi() -> Any:
    """The module MPI, if this is one of several ranks that can still talk; or None."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not Ending.installed or Ending.pid != os.getpid():
        return None
    if not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.Get_size() == 1:
        return None
    return mpi


def report(kind: Any, error: Any, trace: Any) -> None:
    """Show an exception as before, and end the job."""
    Ending.failed = True
    mpi = find_mpi()
    if mpi is not None:
        say(f"rank {mpi.COMM_WORLD.Get_rank()} of {mpi.COMM_WORLD.Get_size()} has failed")
    BEFORE["main"](kind, error, trace)
    if mpi is not None:
        end_job(mpi, 130 if issubclass(kind, KeyboardInterrupt) else 1)


def report_thread(arguments: Any) -> None:
    """The same for an exception in a thread."""
    BEFORE["thread"](arguments)
    mpi = find_mpi()
    if mpi is not None and arguments.exc_type is not SystemExit:
        say(f"rank {mpi.COMM_WORLD.Get_rank()} of {mpi.COMM_WORLD.Get_size()} has failed in a thread")
        end_job(mpi, 1)


def say(text: str) -> None:
    try:
        print(f"vmad_lit: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody listens any more
        pass


def end_job(mpi: Any, status: int) -> None:
    """End all ranks."""
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
    time.sleep(0.1)  # for the launcher to pass on what was printed
    mpi.COMM_WORLD.Abort(status or 1)


class Leaving(SystemExit):
    """What `sys.exit` raises; knows whether the program ended by it, and nobody caught it."""

    def __del__(self) -> None:
        try:
            sys._getframe(1)
        except ValueError:  # nothing of the program is left
            code = self.code
            Ending.status = code if isinstance(code, int) else 0 if code is None else 1


def leave(status: Any = None, /) -> Any:
    """sys.exit"""
    raise Leaving(status)


def meet_at_the_end() -> None:
    """Wait for the other ranks at the end of the program, and tell those who wait elsewhere that this one has left."""
    mpi = None if Ending.failed else find_mpi()
    if mpi is None:
        return
    status = Ending.status & 255
    place = Place(END, "at the end of the program" + (f", with the status {status}" if status else ""))
    channel = channel_of_all(mpi)
    warned: list[bool] = []

    # Decide how long to wait
    def meanwhile(waited: float) -> None:
        if waited > (GRACE if status else Watch.timeout or numpy.inf):
            raise LeftAlone(channel.report(waited, place))
        if waited > LONG and not warned:
            warned.append(True)
            say(f"{channel.report(waited, place)}; it goes on waiting")
        if waited > ENOUGH and not channel.made:
            raise Strangers

    try:
        channel.meet(False, place, meanwhile)
    except Strangers:
        pass
    except (Disagreement, LeftAlone) as error:
        say(str(error))
        time.sleep(GRACE if isinstance(error, Disagreement) else 0)  # for the others to show where they are
        end_job(mpi, status)


class Strangers(Exception):
    """The other ranks seem not to know of meetings."""


END = crc32(b"the end of the program")


def begin() -> None:
    """Install this where there are several ranks, unless it was switched off, or someone else sees to it."""
    if (
        os.environ.get("VMAD_LIT_ABORT", "1") != "0"
        and not Ending.installed
        and not someone_else_sees_to_it()
    ):
        abort_on_failure()


WHEN_MANY.append(begin)
if many_ranks() or any(name in os.environ for name in LAUNCHERS):
    begin()
