"""Small programs in which one rank errs: ``mpirun -n 2 python -m tools.soak.program NAME RANK``.

With the rank -1 nobody errs.  What each rank has found is printed at the end, so that an answer that should not be
there is noticed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
from mpi4py import MPI

from vmad_lit import Builder, operator
from vmad_lit.contrib import cosmo4d
from vmad_lit.contrib.optimize import LBFGS, GradientDescent, State, autosave
from vmad_lit.lib import fastpm, linalg, mpi
from vmad_lit.lib.cosmology import Cosmology, LinearPower, Planck15
from vmad_lit.lib.fastpm import FastPMSimulation, ParticleMesh

#: What the guilty rank says when it raises.
WORDS = "this rank has failed on purpose"

COMM = MPI.COMM_WORLD


class Rank:
    """This rank, which may be the one that errs."""

    def __init__(self, guilty: int) -> None:
        self.errs = COMM.rank == guilty

    def either(self, good: Any, bad: Any) -> Any:
        return bad if self.errs else good

    def fail(self, error: BaseException | None = None) -> None:
        if self.errs:
            raise error or RuntimeError(WORDS)


Program = Callable[[Rank], Any]
PROGRAMS: dict[str, Program] = {}
#: What has to be said, as a regular expression; None if an end is all that can be asked for.
TOLD: dict[str, str | None] = {}
SOMEBODY = r"\branks? \d"
FULL = r"File too large|No space left"


def program(told: str | None = SOMEBODY) -> Callable[[Program], Program]:
    def add(function: Program) -> Program:
        name = function.__name__.replace("_", " ")
        PROGRAMS[name], TOLD[name] = function, told
        return function

    return add


# What they compute


def mesh(n: int = 8, box: float = 32.0, dtype: str = "f8", comm: Any = COMM) -> ParticleMesh:
    return ParticleMesh([n] * 3, BoxSize=box, comm=comm, dtype=dtype)


def forward(
    pm: ParticleMesh, stages: Any = (0.1, 0.5, 1.0), cosmology: Any = Planck15, power: Any = None
) -> Any:
    q = pm.generate_uniform_particle_grid(shift=0.5)
    power = LinearPower(Planck15) if power is None else power
    return cosmo4d.WhiteNoiseOperator.bind(power=power, q=q, stages=stages, cosmology=cosmology, pm=pm)


def model(run: Any, then: Callable[[Any], Any] = lambda fs: fs) -> Any:
    """From white noise to a number, by way of the density and of what `then` makes of it."""
    with Builder() as m:
        x = m.input("x")
        _, fs = run(x)
        m.output(y=fastpm.to_scalar(then(fs)))
    return m


def gradient(m: Any, noise: Any) -> float:
    """A number that depends on the objective and on all of its gradient."""
    [y], [_x] = m.compute_with_vjp(dict(x=noise), dict(_y=1.0))
    return float(y) + float(_x.cnorm())


def simulate(
    pm: ParticleMesh | None = None, seed: int = 1, then: Any = lambda fs: fs, **options: Any
) -> float:
    pm = mesh() if pm is None else pm
    return gradient(model(forward(pm, **options), then), cosmo4d.white_noise(pm, seed))


def tripled(fail: Callable[[str], None]) -> Any:
    """An operator that calls a function in each of its derivatives, with the name of it."""

    @operator
    class triple:
        ain, aout = "x", "y"

        def apl(node, x):
            fail("apl")
            return 3.0 * x

        def vjp(node, _y):
            fail("vjp")
            return dict(_x=3.0 * _y)

        def jvp(node, x_):
            fail("jvp")
            return dict(y_=3.0 * x_)

    return triple


def data(pm: ParticleMesh) -> Any:
    return cosmo4d.Data.synthetic(pm, forward(pm), 0.5, 3)


def minimise(pm: ParticleMesh | None = None, optimizer: Any = None, **options: Any) -> float:
    pm = mesh() if pm is None else pm
    known = data(pm)
    state = cosmo4d.reconstruct(forward(pm), known, optimizer or LBFGS(maxiter=5), **options)
    return float(state.y)


# One rank fails


@program(WORDS)
def raises_at_the_beginning(rank: Rank) -> Any:
    rank.fail()
    return simulate()


@program(WORDS)
def raises_between_two_runs(rank: Rank) -> Any:
    first = simulate()
    rank.fail()
    return first + simulate(seed=2)


@program(WORDS)
def raises_before_an_allreduce(rank: Rank) -> Any:
    first = simulate()
    rank.fail(ValueError(WORDS))
    return COMM.allreduce(first)


def fails_in(name: str, error: Callable[[], BaseException]) -> Program:
    def run(rank: Rank) -> Any:
        def fail(place: str) -> None:
            if place == name:
                rank.fail(error())

        m, noise = model(forward(mesh()), tripled(fail)), cosmo4d.white_noise(mesh(), 1)
        if name == "jvp":
            return m.compute_with_jvp("y", dict(x=noise), dict(x_=noise))
        return gradient(m, noise)

    return run


class Unportable(Exception):
    """An error that cannot be sent to another rank."""

    def __init__(self, words: str, more: Any) -> None:
        super().__init__(words)
        self.more = lambda: more


for place in "apl", "vjp", "jvp":
    PROGRAMS[f"raises in {place}"] = fails_in(place, lambda: RuntimeError(WORDS))
PROGRAMS["raises MemoryError in apl"] = fails_in("apl", lambda: MemoryError(WORDS))
PROGRAMS["raises what cannot be sent"] = fails_in("apl", lambda: Unportable(WORDS, 1))
PROGRAMS["is interrupted in vjp"] = fails_in("vjp", lambda: KeyboardInterrupt(WORDS))
TOLD.update({name: WORDS for name in PROGRAMS if name not in TOLD})
TOLD["is interrupted in vjp"] = "KeyboardInterrupt"


@program(WORDS)
def raises_in_a_monitor(rank: Rank) -> Any:
    def monitor(*arguments: Any) -> None:
        rank.fail()

    m = model(forward(mesh()))
    return m.compute("y", dict(x=cosmo4d.white_noise(mesh(), 1)), monitor=monitor)


@program(WORDS)
def raises_in_the_monitor_of_a_minimisation(rank: Rank) -> Any:
    def monitor(state: Any) -> None:
        if state.nit == 3:
            rank.fail()

    return minimise(monitor=monitor)


@program(WORDS)
def raises_while_building(rank: Rank) -> Any:
    with Builder() as m:
        x = m.input("x")
        rank.fail()
        m.output(y=fastpm.to_scalar(x))
    return m.compute("y", dict(x=cosmo4d.white_noise(mesh(), 1)))


@program(None)
def exits_with_a_status(rank: Rank) -> Any:
    first = simulate()
    if rank.errs:
        sys.exit(3)
    return first + simulate(seed=2)


@program()
def exits_early(rank: Rank) -> Any:
    first = simulate()
    if rank.errs:
        sys.exit(0)
    return first + simulate(seed=2)


@program(None)
def exits_at_once(rank: Rank) -> Any:
    first = simulate()
    if rank.errs:
        os._exit(3)
    return first + simulate(seed=2)


@program(None)
def is_killed(rank: Rank) -> Any:
    first = simulate()
    if rank.errs:
        os.kill(os.getpid(), signal.SIGKILL)
    return first + simulate(seed=2)


@program(None)
def reads_memory_that_is_not_there(rank: Rank) -> Any:
    first = simulate()
    if rank.errs:
        ctypes.string_at(0)
    return first + simulate(seed=2)


@program()
def is_late(rank: Rank) -> Any:
    """Not an error: nobody may complain."""
    first = simulate()
    time.sleep(rank.either(0, 4))
    return first + simulate(seed=2)


# One rank does something else


@program()
def skips_a_run(rank: Rank) -> Any:
    return rank.either(simulate, float)() + simulate(seed=2)


@program()
def skips_the_last_run(rank: Rank) -> Any:
    return simulate(seed=2) + rank.either(simulate, float)()


@program()
def runs_once_more(rank: Rank) -> Any:
    first = simulate()
    return (simulate() if rank.errs else first) + simulate(seed=2)


@program()
def runs_once_more_at_the_end(rank: Rank) -> Any:
    first = simulate()
    return simulate() if rank.errs else first


@program()
def skips_an_iteration(rank: Rank) -> Any:
    m, x = model(forward(mesh())), cosmo4d.white_noise(mesh(), 1)
    for _ in range(rank.either(4, 3)):
        [y], [_x] = m.compute_with_vjp(dict(x=x), dict(_y=1.0))
        x = x - 1e-4 * _x
    return float(y)


@program()
def computes_no_gradient(rank: Rank) -> Any:
    m, x = model(forward(mesh())), cosmo4d.white_noise(mesh(), 1)
    first = float(m.compute("y", dict(x=x))) if rank.errs else gradient(m, x)
    return first + simulate(seed=2)


@program()
def computes_another_output(rank: Rank) -> Any:
    with Builder() as m:
        x = m.input("x")
        m.output(y=fastpm.to_scalar(x), z=fastpm.to_scalar(fastpm.r2c(x)))
    return float(m.compute(rank.either("y", "z"), dict(x=cosmo4d.white_noise(mesh(), 1))))


@program()
def computes_in_another_order(rank: Rank) -> Any:
    return [simulate(seed=seed) for seed in rank.either((1, 2), (2, 1))]


@program()
def builds_another_model(rank: Rank) -> Any:
    with Builder() as m:
        y = m.input("y")
        m.output(z=fastpm.to_scalar(y if rank.errs else linalg.sum(y) * y))
    return float(m.compute("z", dict(y=cosmo4d.white_noise(mesh(), 1))))


@program()
def leaves_out_an_allreduce(rank: Rank) -> Any:
    with Builder() as m:
        a = m.input("a")
        y = a if rank.errs else mpi.allreduce(a, COMM)
        m.output(z=mpi.allreduce(y * y, COMM))
    return float(m.compute("z", dict(a=1.0)))


@program()
def adds_an_allreduce(rank: Rank) -> Any:
    with Builder() as m:
        a = m.input("a")
        y = mpi.allreduce(a, COMM)
        m.output(z=mpi.allreduce(y, COMM) if rank.errs else y)
    return float(m.compute("z", dict(a=1.0)))


@program()
def has_another_root(rank: Rank) -> Any:
    with Builder() as m:
        a = m.input("a")
        m.output(z=mpi.bcast(a, COMM, root=rank.either(0, 1)))
    return float(m.compute("z", dict(a=1.0 + COMM.rank)))


@program()
def sends_to_nobody(rank: Rank) -> Any:
    there = (COMM.rank + 1) % COMM.size
    with Builder() as m:
        a = m.input("a")
        m.output(z=mpi.sendrecv(a, COMM, rank.either(there, COMM.rank), (COMM.rank - 1) % COMM.size))
    return float(m.compute("z", dict(a=1.0 + COMM.rank)))


# One rank has something else


@program()
def has_another_constant(rank: Rank) -> Any:
    return simulate(then=lambda fs: fs * rank.either(2.0, 3.0))


@program()
def has_another_replicated_input(rank: Rank) -> Any:
    with Builder() as m:
        a = m.input("a", placement="replicated")
        x = m.input("x")
        m.output(y=fastpm.to_scalar(x * a))
    return float(m.compute("y", dict(a=rank.either(2.0, 3.0), x=cosmo4d.white_noise(mesh(), 1))))


@program()
def has_another_mesh(rank: Rank) -> Any:
    return simulate(mesh(rank.either(8, 10)))


@program()
def has_another_box(rank: Rank) -> Any:
    return simulate(mesh(box=rank.either(32.0, 40.0)))


@program()
def has_another_precision(rank: Rank) -> Any:
    return simulate(mesh(dtype=rank.either("f8", "f4")))


@program()
def has_another_seed(rank: Rank) -> Any:
    return simulate(seed=rank.either(1, 2))


@program()
def has_another_cosmology(rank: Rank) -> Any:
    Om0 = rank.either(0.31, 0.29)
    return simulate(cosmology=Cosmology(Om0=Om0, h=0.7, Ob0=0.04, n_s=0.96, sigma8=0.8))


@program()
def has_another_power(rank: Rank) -> Any:
    tilt = rank.either(1.0, 1.2)
    return simulate(power=lambda k: tilt / (1.0 + numpy.asarray(k)))


@program()
def has_another_step(rank: Rank) -> Any:
    return simulate(stages=(0.1, rank.either(0.5, 0.6), 1.0))


@program()
def has_one_more_step(rank: Rank) -> Any:
    return simulate(stages=rank.either((0.1, 1.0), (0.1, 0.5, 1.0)))


@program()
def has_another_window(rank: Rank) -> Any:
    pm, window = mesh(), rank.either("cic", "tsc")
    q = pm.generate_uniform_particle_grid(shift=0.3)
    with Builder() as m:
        x = m.input("x")
        layout = fastpm.decompose(x, pm, window)
        m.output(y=fastpm.to_scalar(fastpm.paint(x, 1.0, layout, pm, window)))
    return float(m.compute("y", dict(x=q)))


@program()
def has_another_communicator(rank: Rank) -> Any:
    return simulate(mesh(comm=rank.either(COMM, MPI.COMM_SELF)))


@program()
def has_another_smoothing(rank: Rank) -> Any:
    return minimise(smoothing=rank.either(4.0, 8.0))


@program()
def has_fewer_iterations(rank: Rank) -> Any:
    return minimise(optimizer=LBFGS(maxiter=rank.either(5, 3)))


@program()
def has_another_optimiser(rank: Rank) -> Any:
    return minimise(optimizer=rank.either(LBFGS, GradientDescent)(maxiter=5))


@program()
def has_no_start(rank: Rank) -> Any:
    pm = mesh()
    return minimise(pm, start=rank.either(cosmo4d.white_noise(pm, 5), None))


@program()
def stops_a_minimisation(rank: Rank) -> Any:
    """Not an error: what a monitor says on one rank holds on all."""
    return minimise(monitor=lambda state: rank.errs and state.nit == 5)


# One rank is given nonsense


def particles() -> tuple[ParticleMesh, Any]:
    pm = mesh()
    return pm, numpy.array(pm.generate_uniform_particle_grid(shift=0.3))


def paint(pm: ParticleMesh, x: Any) -> float:
    with Builder() as m:
        s = m.input("x")
        m.output(y=fastpm.to_scalar(fastpm.paint(s, 1.0, fastpm.decompose(s, pm), pm)))
    return float(m.compute("y", dict(x=x)))


@program()
def has_a_particle_nowhere(rank: Rank) -> Any:
    pm, x = particles()
    x[0, 0] = rank.either(x[0, 0], numpy.nan)
    return paint(pm, x)


@program()
def has_particles_in_a_plane(rank: Rank) -> Any:
    pm, x = particles()
    return paint(pm, rank.either(x, x[:, :2]))


@program()
def has_nothing_to_paint(rank: Rank) -> Any:
    pm, x = particles()
    return paint(pm, rank.either(x, None))


@program()
def forgets_an_input(rank: Rank) -> Any:
    m = model(forward(mesh()))
    return float(m.compute("y", rank.either(dict(x=cosmo4d.white_noise(mesh(), 1)), {})))


@program()
def has_a_word_for_a_number(rank: Rank) -> Any:
    with Builder() as m:
        a = m.input("a")
        m.output(z=mpi.allreduce(a, COMM))
    return m.compute("z", dict(a=rank.either(1.0, "one")))


# One rank cannot write or read


def fields() -> tuple[Any, str]:
    field = cosmo4d.white_noise(mesh(), 1)
    return field, COMM.bcast(os.getcwd())


@program("no such folder|No such file")
def writes_a_field_nowhere(rank: Rank) -> Any:
    field, folder = fields()
    cosmo4d.save_field(rank.either(f"{folder}/field.npy", f"{folder}/no such folder/field.npy"), field)
    return float(cosmo4d.load_field(f"{folder}/field.npy", field.pm).cnorm())


@program("No such file")
def reads_a_field_from_nowhere(rank: Rank) -> Any:
    field, folder = fields()
    cosmo4d.save_field(f"{folder}/field.npy", field)
    return float(
        cosmo4d.load_field(rank.either(f"{folder}/field.npy", f"{folder}/none.npy"), field.pm).cnorm()
    )


def limit_files(rank: Rank, size: int) -> None:
    """From now on no file of this rank may be larger."""
    if rank.errs:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@program(FULL)
def has_no_room_for_a_field(rank: Rank) -> Any:
    field, folder = fields()
    limit_files(rank, 512)
    cosmo4d.save_field(f"{folder}/field.npy", field)
    return float(cosmo4d.load_field(f"{folder}/field.npy", field.pm).cnorm())


@program(FULL)
def has_no_room_for_a_state(rank: Rank) -> Any:
    folder = COMM.bcast(os.getcwd())
    limit_files(rank, 512)
    return minimise(monitor=autosave(f"{folder}/state.npz", every=2))


@program(FULL)
def has_no_room_for_checkpoints(rank: Rank) -> Any:
    pm = mesh()
    limit_files(rank, 4096)
    simulation = FastPMSimulation(numpy.linspace(0.1, 1.0, 6), Planck15, pm, ram=1, disk=3, folder=".")
    with Builder() as m:
        x = m.input("x")
        dx, _, _ = simulation.run(cosmo4d.linear_modes(x, LinearPower(Planck15), pm))
        m.output(y=mpi.allreduce(linalg.to_scalar(dx), COMM))
    noise = cosmo4d.white_noise(pm, 1)
    y, [_x] = m.compute_with_vjp(dict(x=noise), dict(_y=1.0))
    return float(_x.cnorm())


@program()
def resumes_another_state(rank: Rank) -> Any:
    folder, pm = COMM.bcast(os.getcwd()), mesh()
    for name, iterations in dict(a=2, b=4).items():
        minimise(pm, LBFGS(maxiter=iterations), monitor=autosave(f"{folder}/{name}.npz", every=2))
    space = cosmo4d.FastPMVectorSpace(COMM)
    name = rank.either("a", "b")
    state = State.load(f"{folder}/{name}.npz", space, pm.create(type="real", value=0))
    return minimise(pm, LBFGS(maxiter=6), state=state)


def main(name: str, guilty: str) -> None:
    found = PROGRAMS[name](Rank(int(guilty)))
    numbers = [f"{number:.10g}" for number in flat(found)]
    os.write(1, f"rank {COMM.rank} found {' '.join(numbers)}\n".encode())


def flat(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from flat(part)
    else:
        yield float(value)


if __name__ == "__main__":
    main(*sys.argv[1:])
