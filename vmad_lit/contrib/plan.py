"""What a reconstruction will need, before it begins: memory, time, and how many ranks pay."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy

from vmad_lit.contrib.configuration import Configuration, free_of, options_of
from vmad_lit.contrib.survey import Survey
from vmad_lit.lib.costs import Division, Machine, available_memory, check_simulation, choose_processes
from vmad_lit.lib.costs import in_gigabytes, plan_memory
from vmad_lit.lib.fastpm import ParticleMesh
from vmad_lit.lib.mpi import MPI, on_root

VECTORS = 32  # fields that a minimisation holds: ten pairs of steps, the point, the direction, the data, ...
PROBE = 32  # cells along a side of the mesh on which a gradient is measured


def three(x: Any) -> list[Any]:
    """A list of three, of one number or of three."""
    return list(x) if isinstance(x, (list, tuple)) else [x] * 3


def steps_of(c: Configuration) -> int:
    """The N-body steps of a configuration."""
    return int(c.model.steps) if c.model.evolution == "nbody" else 0


def epochs_of(c: Configuration) -> list[tuple[float, dict[str, Any]]]:
    """The smoothing of each epoch, and the options of its solver."""
    known = options_of(c.solver.name)
    common = {k: v for k, v in c.values.get("solver", {}).items() if k in known}
    said = c.values.get("epochs") or [{}]
    return [
        (
            entry.get("smoothing", c.data.smoothing),
            {**common, **{k: v for k, v in entry.items() if k in known}},
        )
        for entry in ([said] if isinstance(said, dict) else said)
    ]


def check_memory(c: Configuration, comm: MPI.Comm, switch: str = "memory_check = false in [run]") -> None:
    """Raise ConfigurationError on all ranks if the gradient and the solver's vectors will not fit. Collective."""
    if not c.run.memory_check:
        return
    nmesh = three(c.mesh.cells)
    cells = int(numpy.prod(nmesh, dtype=float))
    vectors = VECTORS * 8 * cells // comm.size
    try:
        check_simulation(comm, nmesh, cells, steps_of(c), extra=vectors, switch=switch)
    except MemoryError as error:
        raise c.error((("mesh", "cells"), str(error))) from None


def memory_per_rank(nmesh: Sequence[int], steps: int, ranks: int) -> float:
    """The bytes that a rank needs for a gradient, and for the vectors of the solver."""
    cells = int(numpy.prod(nmesh, dtype=float))
    return plan_memory(nmesh, cells, steps, ranks).gradient + VECTORS * 8 * cells / ranks


def measure_gradient(c: Configuration) -> float:
    """Seconds for a gradient of the model of a configuration, for each cell, on a small mesh and on this rank alone."""
    nmesh, box = three(c.mesh.cells), three(c.mesh.box)
    small = [min(n, PROBE) for n in nmesh]
    part = [length * m / n for length, m, n in zip(box, small, nmesh)]
    values = {k: v for k, v in c.values.items() if k in ("model", "bias", "cosmology")}
    values |= dict(mesh=dict(cells=small, box=part), data=dict(kind="mock"), noise=dict(sigma=1.0))
    pm = ParticleMesh(Nmesh=small, BoxSize=part, comm=MPI.COMM_SELF, dtype="f8")
    problem = Survey(Configuration(values), pm).posterior()

    times = []
    for seed in range(3):
        z = problem.draw(seed)
        begin = time.perf_counter()
        problem.gradient(z)
        times.append(time.perf_counter() - begin)
    return min(times) / float(numpy.prod(small))


def gradient_seconds(nmesh: Sequence[int], ranks: int, forces: int, per_cell: float) -> float:
    """Seconds for a gradient on so many ranks, by the model of costs, for cores of which one takes `per_cell`."""
    machine = Machine()
    work = (machine.forward + machine.gradient) * forces
    machine = machine._replace(memory=machine.ranks * work / per_cell)
    division = Division(nmesh, choose_processes(nmesh, ranks, machine=machine))
    return forces * sum(sum(machine.force(division, 4, back).values()) for back in (False, True))


def ranks_that_pay(nmesh: Sequence[int], forces: int, per_cell: float) -> int:
    """The largest power of two of ranks that still saves a quarter of the time of half as many."""
    ranks, before = 1, gradient_seconds(nmesh, 1, forces, per_cell)
    while 2 * ranks <= nmesh[0] * nmesh[1] // 4:
        now = gradient_seconds(nmesh, 2 * ranks, forces, per_cell)
        if now > 0.75 * before:
            break
        ranks, before = 2 * ranks, now
    return ranks


def plan(c: Configuration, comm: MPI.Comm) -> str:
    """What a reconstruction will need, in lines of text. Collective."""
    nmesh, steps = three(c.mesh.cells), steps_of(c)
    forces = steps + 2
    per_cell = on_root(comm, lambda: measure_gradient(c))
    best = ranks_that_pay(nmesh, forces, per_cell)
    counts = sorted({1, comm.size, best, *(n for n in (2, 4, 16, 64, 256, 1024) if n < best)})
    rows = {
        n: (gradient_seconds(nmesh, n, forces, per_cell), memory_per_rank(nmesh, steps, n)) for n in counts
    }
    seconds, memory = rows[comm.size]
    work = gradients_of(c)
    most = sum(dict(options).get("maxiter", 200) for _, options in epochs_of(c))
    looks = most // c.validation.every if c.validation.kind else 0

    told = {
        "mesh": f"{' x '.join(map(str, nmesh))} cells, box {c.mesh.box} Mpc/h",
        "data": f"{c.data.kind}{f' from {c.path(c.data.file)}' if c.data.file else ''}, noise {c.noise.kind}",
        "model": f"{c.model.evolution}{f', {steps} steps' if steps else ''}, bias {c.bias.kind}",
        "free": ", ".join(["the initial conditions", *free_of(c)]),
        "memory": f"{in_gigabytes(memory)} on each of {comm.size}; {in_gigabytes(available_memory())} are free here",
        "gradient": f"{seconds:.3g} s on {comm.size}, from that of a mesh of {min(PROBE, *nmesh)}^3 measured here",
        **{name: f"about {number} gradients, {in_words(number * seconds)}" for name, number in work.items()},
        **(
            {"validation": f"{c.validation.kind}, at most {looks} runs of the model without gradient"}
            if looks
            else {}
        ),
        "ranks": f"up to {best} pay: each doubling saves a quarter of the time or more",
    }
    lines = [f"plan of {c.name}", *(f"  {name:10} {text}" for name, text in told.items()), ""]
    lines += [f"  {'ranks':>6} {'s / gradient':>13} {'GB / rank':>10}"]
    lines += [f"  {n:6d} {t:13.3g} {m / 1e9:10.3g}" for n, (t, m) in rows.items()]
    return "\n".join(lines)


ERRORS = 150  # gradients for the error of a parameter, about


def wants_errors(c: Configuration) -> bool:
    """Whether free parameters get errors by Laplace's approximation: no sampler, and a posterior at the end."""
    last, _ = epochs_of(c)[-1]
    return bool(c.output.errors and free_of(c) and c.sampler.name is None and last == 0)


def gradients_of(c: Configuration) -> dict[str, int]:
    """About how many gradients the solver, at most, and the sampler take."""
    solver = sum(dict(options).get("maxiter", 200) for _, options in epochs_of(c))
    s = c.sampler
    if s.name is None:
        errors = ERRORS * len(free_of(c)) if wants_errors(c) else 0
        return dict(solver=solver, errors=errors) if errors else dict(solver=solver)
    if s.name == "Laplace":
        return dict(solver=solver, sampler=(s.powers + 2) * (s.rank + s.oversampling))
    each = {"HMC": 10, "NUTS": 15, "MCLMC": 2, "MAMS": 10}[s.name]  # gradients of an iteration, about
    return dict(solver=solver, sampler=each * s.chains * (s.warmup + s.draws * s.thin))


def in_words(seconds: float) -> str:
    """A time as one says it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
