"""What all benchmarks share: clocks, tables, and a description of the machine."""

import gc
import importlib
import json
import os
import platform
import time
from importlib import metadata


def clock(function, timer=time.perf_counter):
    """The seconds that one call takes."""
    start = timer()
    function()
    return timer() - start


def best(functions, repeat=5, budget=2.0, timer=time.perf_counter):
    """The least time in seconds of each of some functions, called in turns.

    Parameters
    ----------
    functions : dict
        By name, what is measured.
    repeat : int
        The number of turns.
    budget : float
        Seconds after which no further turn begins.
    timer : callable
        `time.process_time` for work in one thread: other programs on the machine disturb it less.
    """
    least = dict.fromkeys(functions, float("inf"))
    begin = time.perf_counter()
    for turn in range(repeat):
        for name, function in functions.items():
            gc.collect()
            least[name] = min(least[name], clock(function, timer))
        if time.perf_counter() - begin > budget:
            break
    return least


def optional(name):
    """A module, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except Exception:  # a peer that does not work here is no reason to fail
        return None


def machine(*packages):
    """What the numbers depend on: cores, threads, and versions."""
    versions = {}
    for name in ("numpy", *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(
        cores=cores,
        threads=int(os.environ.get("OMP_NUM_THREADS", cores)),
        architecture=platform.machine(),
        python=platform.python_version(),
        versions=versions,
        load=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    )


def describe(host):
    """A line about the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    return (
        f"{host['cores']} cores ({host['threads']} threads), Python {host['python']}, {versions}; "
        f"load {host['load']} at the start"
    )


def table(header, rows):
    """Print rows of texts and numbers under a header, in columns."""
    cells = [[*header], *([show(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
            ).rstrip()
        )


def show(cell):
    if isinstance(cell, str):
        return cell
    if cell is None:
        return "-"
    if isinstance(cell, int):
        return str(cell)
    return f"{cell:.3g}" if cell < 1000 else f"{cell:.0f}"


def save(path, host, **numbers):
    """Write the numbers of a benchmark to a file: beside it first, then renamed."""
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with open(path + ".part", "w") as f:
        json.dump(dict(machine=host, **numbers), f, indent=1)
        f.write("\n")
    os.replace(path + ".part", path)
