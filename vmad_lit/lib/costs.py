"""What a simulation costs: messages and bytes between ranks, time by a model of a machine, and memory.

Bytes and messages are those that one rank sends, counted as `core.traffic` counts them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy

from vmad_lit.core.arguments import one_of, positive, whole_number
from vmad_lit.core.schedules import Actions, multistage
from vmad_lit.core.traffic import count_to_all
from vmad_lit.lib import memory
from vmad_lit.lib.mpi import MPI, run_together


def block(n: int, parts: int, part: int) -> tuple[int, int]:
    """Where a block of n planes in so many parts begins and ends."""
    size = -(-n // parts)
    return min(part * size, n), min((part + 1) * size, n)


def length(n: int, parts: int, part: int) -> int:
    begin, end = block(n, parts, part)
    return end - begin


class Sent(NamedTuple):
    """Messages that a rank sends, and their bytes."""

    messages: int = 0
    nbytes: int = 0

    def plus(self, other: Sent, times: int = 1) -> Sent:
        """The sum with another, taken so many times."""
        return Sent(self.messages + times * other.messages, self.nbytes + times * other.nbytes)


Planes: TypeAlias = int | Sequence[int]  # along each axis that is divided, or along each


class Division:
    """A mesh that is divided among ranks, as one of them sees it.

    Parameters
    ----------
    nmesh : the points along each axis
    np : the ranks along the first axes, fewer than there are axes
    rank : by whose eyes
    itemsize : bytes of a real number
    """

    def __init__(self, nmesh: Sequence[int], np: Sequence[int], rank: int = 0, itemsize: int = 8) -> None:
        self.nmesh = tuple(whole_number("nmesh", n, 1) for n in nmesh)
        self.np = tuple(whole_number("np", n, 1) for n in np)
        if len(self.np) >= len(self.nmesh):
            raise ValueError(f"{len(self.nmesh)} axes can be divided along fewer of them, not as {list(np)}")
        self.ranks, self.itemsize = math.prod(self.np), itemsize
        rank = whole_number("rank", rank, 0, self.ranks - 1)
        self.place = [int(p) for p in numpy.unravel_index(rank, self.np)]
        self.parts = self.np + (1,) * (len(self.nmesh) - len(self.np))
        self.place += [0] * (len(self.nmesh) - len(self.np))
        self.own = [length(n, p, i) for n, p, i in zip(self.nmesh, self.parts, self.place)]
        self.divided = [axis for axis, parts in enumerate(self.np) if parts > 1]

    # What is sent for a division of a mesh
    def transform(self, backward: bool = False) -> Sent:
        """What a Fourier transform sends, from real to complex, or back."""
        n, total = (*self.nmesh[:-1], self.nmesh[-1] // 2 + 1), Sent()
        for d, parts in enumerate(self.np):
            # The hole moves from axis d + 1 to axis d, or back; the others are divided as they are then
            rest = 1
            for axis in range(len(n)):
                owner = axis if axis < d else axis - 1
                if axis not in (d, d + 1):
                    divided = owner < len(self.np)
                    rest *= length(n[axis], self.np[owner], self.place[owner]) if divided else n[axis]

            # Move the hole by an axis
            kept, cut = (d + 1, d) if backward else (d, d + 1)
            own = length(n[kept], parts, self.place[d]) * rest * 2 * self.itemsize
            pieces = [own * length(n[cut], parts, p) for p in range(parts) if p != self.place[d]]
            total = total.plus(Sent(sum(piece > 0 for piece in pieces), sum(pieces)))
        return total

    def halo(self, low: Planes, high: Planes, fold: bool = False) -> Sent:
        """What is sent for `low` planes before and `high` planes behind each domain, along all axes that are divided.

        The planes along an axis include the halo along the axes before it. When a halo is added to its owners (`fold`),
        what was received is sent back.
        """
        total = Sent()
        for axis in self.divided:
            other = math.prod(
                self.wide(d, low, high) if d < axis else own for d, own in enumerate(self.own) if d != axis
            )
            for planes in self._planes(axis, low, high, fold):
                total = total.plus(Sent(int(other > 0), planes * other * self.itemsize))
        return total

    def wide(self, axis: int, low: Planes, high: Planes) -> int:
        """The planes of this rank along an axis, with their halo, each counted once."""
        begin, end = block(self.nmesh[axis], self.parts[axis], self.place[axis])
        return (
            end - begin + sum(stop - start for start, stop in self._around(axis, self.place[axis], low, high))
        )

    def _around(self, axis: int, part: int, low: Planes, high: Planes) -> list[tuple[int, int]]:
        """The planes around a domain, as two intervals, which may reach beyond the ends of the mesh."""
        n, parts = self.nmesh[axis], self.parts[axis]
        before, behind = (x if isinstance(x, int) else int(x[axis]) for x in (low, high))
        begin, end = block(n, parts, part)
        if axis not in self.divided or begin == end:
            return []
        if before + behind - (-n // parts) >= n:
            return [(0, begin), (end, n)]
        return [(begin - before, begin), (end, end + behind)]

    def _planes(self, axis: int, low: Planes, high: Planes, fold: bool) -> Iterator[int]:
        """How many planes there are in each message to the others along an axis."""
        n, parts, me = self.nmesh[axis], self.parts[axis], self.place[axis]
        for other in range(parts):
            asker, owner = (me, other) if fold else (other, me)
            first, last = block(n, parts, owner)
            for start, stop in self._around(axis, asker, low, high) if other != me else ():
                for turn in -n, 0, n:
                    planes = min(stop, last + turn) - max(start, first + turn)
                    if planes > 0:
                        yield planes

    def ghosts(self, sigma: float, per_cell: float = 1.0) -> float:
        """How many particles this rank sends to others, for displacements of `sigma` cells along each axis (window cic).

        There are `per_cell` particles in a cell.
        """
        copies = owned = 1.0
        for own, parts in zip(self.own, self.parts):
            if parts > 1 and own:
                others = mean_excess(1.0, sigma) + mean_excess(0.0, sigma)
                gone = mean_excess(0.0, sigma) + mean_excess(-1.0, sigma)
                copies *= 1 + (others - gone) / own
                owned *= 1 - gone / own
        return math.prod(self.own) * per_cell * (copies - owned)

    def force(self, low: Planes, high: Planes, gradient: bool = False) -> dict[str, Sent]:
        """What is sent for the force on all particles, or for its reverse sweep, by kind.

        The windows of the particles reach `low` and `high` planes beyond their domains, and differences `REACH` more.
        """
        before, behind = (
            [(x if isinstance(x, int) else int(x[axis])) + REACH for axis in range(len(self.nmesh))]
            for x in (low, high)
        )

        fold, fetch = self.halo(before, behind, fold=True), self.halo(before, behind)
        calls = AGREEMENTS["gradient" if gradient else "forward"] if self.ranks > 1 else Sent()
        return {
            "transforms": self.transform().plus(self.transform(backward=True)),
            "halos": fold.plus(fetch, 2 if gradient else 1),
            "agreements": calls,
        }


def mean_excess(a: float, sigma: float) -> float:
    """The mean of the positive part of a + x, for x of a normal distribution around zero."""
    if not sigma > 0:
        return max(a, 0.0)
    t = a / sigma
    return a * 0.5 * (1 + math.erf(t / 2**0.5)) + sigma * math.exp(-0.5 * t * t) / (2 * math.pi) ** 0.5


REACH = 2  # planes on either side that a difference needs
#: Calls by which all ranks agree, and their bytes: for a force, and for its reverse sweep.
AGREEMENTS = {"forward": Sent(3, 136), "gradient": Sent(1, 4)}


class Machine(NamedTuple):
    """A cluster of nodes.

    Attributes
    ----------
    ranks : on a node
    latency : seconds for a message
    network, memory : bytes per second of a node, to others, and to its memory
    capacity : bytes of memory of a node
    forward, gradient : bytes to and from memory for a particle and a force, and for its reverse sweep
    """

    ranks: int = 64
    latency: float = 2e-6
    network: float = 25e9
    memory: float = 200e9
    capacity: float = 256e9
    forward: float = 1200.0
    gradient: float = 1800.0

    def seconds(self, sent: Sent) -> float:
        """For what each rank sends to some others."""
        return sent.messages * self.latency + sent.nbytes * self.ranks / self.network

    def seconds_to_all(self, calls: Sent, ranks: int) -> float:
        """For calls in which so many ranks find the sum or the largest of what all have, by a tree."""
        levels = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        return levels * (calls.messages * self.latency + calls.nbytes * self.ranks / self.network)

    def force(self, division: Division, margin: int, gradient: bool = False) -> dict[str, float]:
        """Seconds for a force, or for its reverse sweep, by kind, with a particle in each cell."""
        sent = division.force(margin, margin, gradient)
        cells = math.prod(division.own)
        wide = math.prod(division.wide(d, margin, margin) for d in range(len(division.own)))
        work = (self.gradient if gradient else self.forward) * cells
        work += HALO_WORK * division.itemsize * (wide - cells)
        return {
            "local": work * self.ranks / self.memory,
            "transforms": self.seconds(sent["transforms"]),
            "halos": self.seconds(sent["halos"]),
            "agreements": self.seconds_to_all(sent["agreements"], division.ranks),
        }


HALO_WORK = 10  # numbers that are read and written for each cell of a halo


def choose_processes(
    Nmesh: Sequence[int], ranks: int, margin: int = 4, itemsize: int = 8, machine: Machine | None = None
) -> list[int]:
    """How to divide a mesh among ranks: the `np` of a `ParticleMesh`, by a model of the costs of a force.

    Parameters
    ----------
    Nmesh : the points along each axis
    ranks : int, how many there are
    margin : how many planes beyond their domain particles reach
    itemsize : bytes of a real number
    machine : Machine, by default one of today

    Returns
    -------
    np : [ranks, 1] for slabs, two factors for pencils; [ranks] for a mesh of two axes
        Some ranks have nothing if there is no other way
    """

    machine = Machine() if machine is None else machine
    ranks = whole_number("ranks", ranks, 1)
    if len(Nmesh) < 3:
        return [ranks] * (len(Nmesh) - 1)
    ways = [(ranks // b, b) for b in range(1, ranks + 1) if ranks % b == 0]
    full = [np for np in ways if all(-(-n // p) * (p - 1) < n for n, p in zip(Nmesh, np))]

    def seconds(np: Sequence[int]) -> float:
        division = Division(Nmesh, np, 0, itemsize)
        return sum(sum(machine.force(division, margin, gradient).values()) for gradient in (False, True))

    _, best = min((seconds(np), index) for index, np in enumerate(ways) if np in full or not full)
    return list(ways[best])


def limits(division: Division, margin: int = 4, machine: Machine | None = None) -> list[str]:
    """What no longer goes well for a division of a mesh, in words; nothing if all is well."""
    machine, found = Machine() if machine is None else machine, []
    sent, steps = division.force(margin, margin), [p for p in division.np if p > 1]
    if math.prod(division.own) == 0 or any(
        -(-n // p) * (p - 1) >= n for n, p in zip(division.nmesh, division.np)
    ):
        found.append("some ranks have nothing")

    thin = [str(axis) for axis in division.divided if 2 * (margin + REACH) > division.own[axis]]
    if thin:
        found.append(f"halo wider than domain along {' and '.join(thin)}")
    piece = sent["transforms"].nbytes / max(sent["transforms"].messages, 1)
    if steps and piece * machine.ranks / machine.network < machine.latency:
        found.append("latency of transforms")
    if math.prod(division.own) * 2 > 2**31:
        found.append("counts need MPI 4")
    times = machine.force(division, margin)
    if times["agreements"] > 0.1 * sum(times.values()):
        found.append("agreements")
    return found


class Peak(NamedTuple):
    """What is held at a moment: numbers for each particle, and for each point of the two meshes.

    `mesh` is that of the initial conditions, and `fine` that of the force.
    """

    particle: float = 0.0
    mesh: float = 0.0
    fine: float = 0.0


#: What is held at the moments of a run without its tape; of the tape, what a step and a state hold.
MOMENTS: dict[str, Peak] = {
    "forward": Peak(15.0, 10.0),
    "turn": Peak(13.6, 1.0),
    "evolve": Peak(14.3, 0.0, 8.6),
    "advance": Peak(24.9, 0.0, 8.2),
    "undo": Peak(21.0, 0.0, 9.0),
    "step": Peak(3.0, 0.0, 1.0),
    "positions": Peak(3.0),
    "state": Peak(6.0),
}
HALO_PLANES = 200  # beside them, for halos: planes of a domain along each axis that is divided
BESIDE = 1_000_000  # bytes on each rank, whatever the size

POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "positions": dict(keep_potential=False),
    "checkpoints": dict(ram=2),
    "disk": dict(disk=1000),
    "reversible": dict(reversible=True),
}


def kept_states(steps: int, ram: int, disk: int) -> tuple[int, int]:
    """The most states in memory when a step is reversed, and when one is run again."""
    actions = Actions(multistage(steps, ram, disk), steps)
    kept: set[int] = set()
    reversed_, advanced, turned = 0, 0, False
    for action in actions.forward + (actions.reverse or []):
        kind = type(action).__name__
        if kind == "Forward":
            if action.write_ics and action.storage.name == "RAM":
                kept.add(action.n0)
            if turned and not action.write_adj_deps:
                advanced = max(advanced, len(kept))
        elif kind == "Reverse":
            turned, reversed_ = True, max(reversed_, len(kept))
        elif kind == "Move" and action.from_storage.name == "RAM":
            kept.discard(action.n)
    return reversed_, advanced


class MemoryPlan(NamedTuple):
    """The bytes that a rank needs, beside the interpreter and its libraries, for a run and for its gradient."""

    forward: int
    gradient: int


def plan_memory(
    nmesh: Sequence[int],
    particles: int,
    steps: int,
    ranks: int = 1,
    policy: str | dict[str, Any] = "full",
    itemsize: int = 8,
    B: float = 1,
) -> MemoryPlan:
    """The peak of the memory of a simulation from white noise to a density, and of its gradient, on each rank.

    Parameters
    ----------
    nmesh : the points of the mesh along each axis
    particles, steps, ranks : int, how many there are in all
    policy : what the derivatives keep, a name of POLICIES, or the options of `leapfrog` (ram, disk, reversible,
        keep_potential)
    itemsize : bytes of a real number, 4 or 8. A lattice in double precision beside particles in single, see
        `FastPMSimulation`, is 12 bytes more for each particle
    B : the mesh of the force has B times as many points along each axis

    Returns
    -------
    plan : MemoryPlan, of which the gradient is right within a tenth
    """

    steps, ranks = whole_number("steps", steps, 0), whole_number("ranks", ranks, 1)
    if isinstance(policy, str):
        one_of("policy", policy, tuple(POLICIES))
        policy = POLICIES[policy]
    options = dict(ram=None, disk=None, reversible=False, keep_potential=True) | policy
    one_of("itemsize", itemsize, (4, 8))

    division = Division(nmesh, choose_processes(nmesh, ranks)) if len(nmesh) > 1 else None
    around = sum(math.prod(division.own) / division.own[d] for d in division.divided) if division else 0.0

    def bytes_of(*held: tuple[str, float]) -> int:
        # Add up what is held
        coarse, fine = (
            math.prod(n * scale for n in nmesh) * (1 + 2 / (nmesh[-1] * scale)) for scale in (1.0, B)
        )
        total = HALO_PLANES * around * B ** (len(nmesh) - 1)
        for name, times in held:
            peak = MOMENTS[name]
            total += times * (peak.particle * particles + peak.mesh * coarse + peak.fine * fine) / ranks
        return int(itemsize * total) + BESIDE

    forward = bytes_of(("forward", 1))

    if options["reversible"]:
        peaks = [bytes_of(("undo", 1))]
    elif steps and (options["ram"] is not None or options["disk"] is not None):
        states, others = kept_states(steps, options["ram"] or 0, options["disk"] or 0)
        peaks = [bytes_of(("evolve", 1), ("step", 1), ("state", states))]
        peaks += [bytes_of(("advance", 1), ("state", others))] if others else []
    else:
        tape = ("step" if options["keep_potential"] else "positions", max(steps, 1))
        # Positions alone need the potential made again
        again = [] if options["keep_potential"] else [("step", 1), ("positions", -1)]
        peaks = [bytes_of(("evolve", 1), tape, *again), bytes_of(("turn", 1), tape)]
    return MemoryPlan(forward, max(forward, *peaks))


def available_memory(proc: str = "/proc", groups: str = "/sys/fs/cgroup") -> float:
    """The bytes that processes on this node can still have; infinite if that is not known."""

    def read(*path: str) -> str:
        try:
            with open(os.path.join(*path)) as file:
                return file.read()
        except OSError:
            return ""

    lines = [line.split() for line in read(proc, "meminfo").splitlines()]
    found = [float(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"]
    # Ask the control groups
    for line in read(proc, "self", "cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        old = "memory" in kinds.split(",")
        root = os.path.join(groups, "memory") if old else groups
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        )
        folder = path.strip("/") if old or not kinds else None

        while folder is not None:
            limit, used = (read(root, folder, name).strip() for name in names)
            cache = [line.split() for line in read(root, folder, "memory.stat").splitlines()]
            idle = sum(
                float(size) for name, size in cache if name in ("inactive_file", "total_inactive_file")
            )
            if limit.isdigit() and used.isdigit():
                found.append(float(limit) - float(used) + idle / (1 + old))
            folder = os.path.dirname(folder) if folder else None
    return max(min(found, default=math.inf), 0.0)


def in_gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"


def check_memory(
    comm: MPI.Comm,
    what: str,
    needed: int,
    others: Callable[[], dict[str, int]] = dict,
    switch: str = "check_memory=False",
) -> None:
    """Raise MemoryError on all ranks if a node has not as many bytes as its ranks need. Collective.

    Parameters
    ----------
    comm : MPI communicator
    what : which needs them, for the message
    needed : int, bytes for each rank
    others : makes what could be done instead: the bytes for each rank, by the name
    switch : what leaves the check out, for the message
    """

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    numbers = numpy.array([1.0, memory.idle()])
    count_to_all(node, numbers.nbytes)
    node.Allreduce(MPI.IN_PLACE, numbers)
    node.Free()
    ranks, idle = int(numbers[0]), float(numbers[1])

    # Compare what is needed with what is there
    def check() -> None:
        there = available_memory() + idle
        if needed * ranks <= there:
            return
        fitting = [
            f"{name} ({in_gigabytes(size)})" for name, size in others().items() if size * ranks <= there
        ]
        on_node = (
            f" on each of the {ranks} ranks of a node, {in_gigabytes(needed * ranks)} in all"
            if ranks > 1
            else ""
        )

        # Say what would fit
        raise MemoryError(
            f"{what} takes about {in_gigabytes(needed)}{on_node}, but {in_gigabytes(there)} are available; "
            + (
                f"what would fit: {', '.join(fitting)}"
                if fitting
                else "no other way to keep states would fit"
            )
            + f"; {switch} leaves this check out"
        )

    run_together(comm, check)


def check_simulation(
    comm: MPI.Comm,
    nmesh: Sequence[int],
    particles: int,
    steps: int,
    policy: str | dict[str, Any] = "full",
    gradient: bool = True,
    B: float = 1,
    extra: int = 0,
    switch: str = "check_memory=False",
) -> None:
    """Raise MemoryError on all ranks if a simulation, or its gradient, will not fit into the memory of a node.

    Collective. See `plan_memory` for the parameters; `extra` are bytes on each rank beside the simulation's, and
    `switch` is how one goes on all the same, for the message.
    """

    def needed(policy: str | dict[str, Any]) -> int:
        plan = plan_memory(nmesh, particles, steps, comm.size, policy, 8, B)
        return (plan.gradient if gradient else plan.forward) + extra

    what = f"{'the gradient of ' if gradient else ''}a simulation of {particles} particles in {steps} steps"
    policies = ("positions", "checkpoints", "disk", "reversible") if gradient else ()
    check_memory(comm, what, needed(policy), lambda: {told(name): needed(name) for name in policies}, switch)


def told(policy: str) -> str:
    """The options that make a policy."""
    return ", ".join(f"{name}={value}" for name, value in POLICIES[policy].items())
