"""Jobs that are started, disturbed, and ended if they hang."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.mpirun import environment, launcher

#: In the environment of every process of a job, so that it is found wherever the launcher has put it.
MARK = "VMAD_LIT_SOAK_JOB"
#: Ranks that wait for each other look out, and do not wait for ever.
WATCHED = {"VMAD_LIT_CHECK": "1", "VMAD_LIT_TIMEOUT": "20"}
#: How the launchers number their processes.
RANK = re.compile(rb"(?:^|\0)(?:PMI_RANK|OMPI_COMM_WORLD_RANK|PMIX_RANK)=(\d+)(?:\0|$)")
#: Seconds that processes may take to vanish after their launcher.
LINGER = 10.0


@dataclass
class Ended:
    """How a job ended: its status, None if it hung; what all its ranks printed; how long it took; how often it was
    disturbed."""

    status: int | None
    text: str
    seconds: float
    disturbed: int = 0

    @property
    def hung(self) -> bool:
        return self.status is None


class Job:
    """A program on some ranks, in a folder of its own; what it prints goes to a file beside that."""

    def __init__(
        self, command: list[str], folder: Path, ranks: int, variables: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ranks, self.mark, self.begun = ranks, uuid.uuid4().hex, time.monotonic()
        self.log = (
            folder.parent / f"printed.{self.mark}.txt"
        )  # where there is room, however small the folder's disk is
        if ranks > 1:
            command = [launcher(), "-n", str(ranks), *command]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment() | WATCHED | {MARK: self.mark} | dict(variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def processes(self) -> Iterator[tuple[int, int | None]]:
        """The processes of the job, and which rank each is; None for the launcher and its helpers."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    variables = file.read()
                with open(f"/proc/{name}/stat") as file:
                    gone = file.read().rpartition(")")[2].split()[0] == "Z"
            except OSError:  # gone meanwhile, or not ours
                continue
            if f"{MARK}={self.mark}".encode() in variables and not gone:
                rank = RANK.search(variables)
                yield int(name), int(rank[1]) if rank else 0 if self.ranks == 1 else None

    def send(self, number: int, whom: str, rng: random.Random) -> bool:
        """Send a signal to one rank, to all `ranks`, to the `launcher`, or to the whole `job`; False if nobody is there."""
        known = sorted(self.processes())
        ranks = [pid for pid, rank in known if rank is not None]
        wanted = dict(
            one=[rng.choice(ranks)] if ranks else [],
            ranks=ranks,
            launcher=[self.process.pid],
            job=[pid for pid, _ in known],
        )[whom]
        for pid in wanted:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return bool(wanted)

    def sleep(self, seconds: float) -> bool:
        """Wait until the job is so old; whether it is still running."""
        self.wait(self.begun + seconds - time.monotonic(), lambda: not self.running, 0.005)
        return self.running

    def wait(self, limit: float, done: Callable[[], bool], step: float = 0.01) -> bool:
        """Wait until something is true, for `limit` seconds; time in which this process was stopped does not count,
        as the job may have been stopped, too."""
        waited, before = 0.0, time.monotonic()
        while not (found := done()) and waited < limit:
            time.sleep(step)
            now = time.monotonic()
            waited, before = waited + min(now - before, 20 * step), now
        return found

    def exhausted(self, limit: float) -> bool:
        """Whether a rank has used `limit` seconds of a processor: those that wait for another one do."""
        spent = [processor_time(pid) for pid, rank in self.processes() if rank is not None]
        return max(spent, default=0.0) > limit

    def end(self, limit: float) -> Ended:
        """Wait for the end, and make one if there is none.

        On a busy machine a job may take long, so the `limit` is one of processor time, and six times as long for what
        sleeps.
        """
        over = False

        def done() -> bool:
            nonlocal over
            over = self.exhausted(limit)
            return over or not self.running

        hung = not self.wait(6 * limit, done, 0.1) or over
        hung = hung or not self.wait(LINGER, lambda: not any(self.processes()), 0.05)
        if hung:
            for pid, _ in [*self.processes()]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.wait()
        return Ended(None if hung else self.process.returncode, self.text, time.monotonic() - self.begun)


def processor_time(pid: int) -> float:
    """The seconds of processors that a process has used; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(
    command: list[str],
    folder: Path,
    ranks: int,
    limit: float,
    disturb: Callable[[Job], bool] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Ended:
    """Run a program to its end; `disturb` is called when it has started, and tells whether it did something."""
    job = Job(command, folder, ranks, variables)
    disturbed = disturb is not None and disturb(job)
    ended = job.end(limit)
    ended.disturbed = int(disturbed)
    return ended


def python(*arguments: str) -> list[str]:
    """The command of a program in Python; warnings of the interpreter at its own end do not matter."""
    return [sys.executable, *arguments]
