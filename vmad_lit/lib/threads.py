"""The threads of this process: how many there are, and how they share a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
import os
from queue import SimpleQueue
from threading import Thread
from typing import Any

#: No more threads than bits in a word, so that a set of them fits into one.
MAX_THREADS = 64

_threads: int | None = None


def set_threads(n: int | None) -> None:
    """Use `n` threads in this process; None goes back to what the environment says."""
    global _threads
    if n is not None and not 1 <= n <= MAX_THREADS:
        raise ValueError(f"the number of threads must be between 1 and {MAX_THREADS}, not {n}")
    _threads = n


def get_threads() -> int:
    """The number of threads in use: `set_threads`, else the environment, else the cores for each rank."""
    if _threads is not None:
        return _threads
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0]
        if value.isdigit() and int(value) > 0:
            return min(int(value), MAX_THREADS)
    # Share the cores among the ranks of the node
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = 1
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            ranks = max(1, int(os.environ[name]))
            break
    return max(1, min(cores // ranks, MAX_THREADS))


@lru_cache(maxsize=None)
def _crew(pid: int, threads: int) -> SimpleQueue[Any]:
    """The queue of the worker threads of the process `pid`; the calling thread works too."""
    tasks: SimpleQueue[Any] = SimpleQueue()
    for _ in range(threads - 1):
        Thread(target=_work, args=(tasks,), name="vmad_lit", daemon=True).start()
    return tasks


def _work(tasks: SimpleQueue[Any]) -> None:
    """Take a function, its arguments, and the queue for its error, or None; forever."""
    while True:
        function, arguments, done = tasks.get()
        error = None
        try:
            function(*arguments)
        except BaseException as e:
            error = e
        del function, arguments
        done.put(error)
        del done, error


def run_on_threads(function: Callable[..., object], tasks: Sequence[tuple[Any, ...]]) -> None:
    """Call `function` with each tuple of `tasks`, one of them here and the rest on other threads."""
    if len(tasks) < 2:
        for task in tasks:
            function(*task)
        return
    done: SimpleQueue[Any] = SimpleQueue()
    crew = _crew(os.getpid(), len(tasks))
    for task in tasks[1:]:
        crew.put((function, task, done))
    try:
        function(*tasks[0])
    finally:
        errors = [done.get() for _ in tasks[1:]]
    for error in errors:
        if error is not None:
            raise error


def share_out(n: int, least: int) -> list[int]:
    """Edges that cut `range(n)` into about equal parts of at least `least`, one for each thread."""
    parts = min(get_threads(), n // least) if n >= 2 * least else 1
    return [n * t // parts for t in range(parts + 1)]


def share(loop: Callable[[int, int], object], n: int, least: int = 1 << 17) -> None:
    """Call a loop with the two ends of each thread's part of `range(n)`, of at least `least`."""
    edges = share_out(n, least)
    run_on_threads(loop, list(zip(edges[:-1], edges[1:])))
