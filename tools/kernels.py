"""Kernels that are born with their libraries: the pages of the book run in forks of one process that has imported them.

A kernel of its own for each of a hundred pages imports IPython, Matplotlib, numba and SciPy a hundred times.  Here one
process, the *nursery*, imports them once, and each kernel is a fork of it.  No MPI, no threads, no sockets of ZeroMQ
exist in the nursery, so that nothing is shared that must not be.

The builder of the book (``conf.py``) names :class:`Nursling` as the provisioner of its kernels.  The nursery ends with the
process that has started it, and its kernels end with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import LocalProvisioner

ROOT = Path(__file__).resolve().parent.parent

#: What most pages import, and what may be imported before a fork.  pyplot looks for IPython's shell when it is imported,
#: and finds it in the kernel alone: only its parts can be had before.
LIBRARIES = [
    "ipykernel.kernelapp", "ipykernel.ipkernel", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
    "matplotlib.figure", "matplotlib.projections", "mpi4py", "numba", "numpy", "scipy.interpolate", "scipy.special",
]  # fmt: skip


# -- In the builder of the book --------------------------------------------------------------------------------------


class Nursery:
    """The process whose forks are kernels, seen from outside: a question and an answer at a time, lines of JSON."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as in a kernel
            command = [sys.executable, "-m", "tools.kernels", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                env=os.environ | inline,
                stdin=subprocess.DEVNULL,
            )
        self.file = ours.makefile("rw", encoding="utf-8")

    def ask(self, **question: Any) -> Any:
        self.file.write(json.dumps(question) + "\n")
        self.file.flush()
        return json.loads(self.file.readline())


@lru_cache
def nursery(_pid: int) -> Nursery:
    """The nursery of this process, which is started when it is first asked for."""
    return Nursery()


class Kernel:
    """A kernel in the nursery, with the methods of a `subprocess.Popen` that its manager needs."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], env: dict[str, str], cwd: str | None) -> None:
        self.nursery, self.status = nursery(os.getpid()), None
        self.pid = self.nursery.ask(arguments=command[command.index("-f") :], env=env, cwd=cwd)

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.nursery.ask(poll=self.pid)
        return self.status

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.status is not None
        return self.status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursling(LocalProvisioner):
    """Provides kernels from the nursery."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        env, cwd = options.get("env") or dict(os.environ), options.get("cwd")
        self.process = Kernel(cmd, dict(env), cwd and os.fspath(cwd))
        self.pid = self.pgid = self.process.pid  # the leader of a session of its own
        self.cwd = cwd or Path.cwd()
        return self.connection_info


# -- In the nursery ---------------------------------------------------------------------------------------------------


def serve(channel: socket.socket) -> None:
    """Import the libraries, then answer questions until nobody is left to ask them."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    children: set[int] = set()
    with channel, channel.makefile("rw", encoding="utf-8") as file:
        for line in file:
            question = json.loads(line)
            if "poll" in question:
                answer = reap(question["poll"], children)
            else:
                answer = os.fork()
                if answer == 0:
                    os.close(channel.fileno())
                    become(**question)
                children.add(answer)
            file.write(json.dumps(answer) + "\n")
            file.flush()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def reap(child: int, children: set[int]) -> int | None:
    """The exit status of a child, as `subprocess` tells it, or None if it is running."""
    if child not in children:
        return 0
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid == 0:
        return None
    children.discard(child)
    return os.waitstatus_to_exitcode(status)


def become(arguments: list[str], env: dict[str, str], cwd: str | None) -> None:
    """Turn this fork into the kernel with these arguments; does not return."""
    status = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd or os.getcwd())
        parent = f"--IPKernelApp.parent_handle={os.getppid()}"  # the kernel ends when the nursery does
        sys.argv = ["ipykernel_launcher", *arguments, parent]
        sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
        from ipykernel import kernelapp

        kernelapp.launch_new_instance()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
