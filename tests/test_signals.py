"""Signals that ask a program to end: it ends with the iteration, on all ranks, with its state saved."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from mpi4py import MPI

from helpers import HAS_MPIRUN, processes_below, soaking
from tools.mpirun import environment, launcher
from vmad_lit.contrib.optimize import GradientDescent, Problem, State, autosave
from vmad_lit.contrib.vectorspace import VectorSpace, real_inner_product
from vmad_lit.lib.signals import current_interrupt, heed_signals

COMM = MPI.COMM_WORLD
TERM, INT = signal.SIGTERM, signal.SIGINT


def distributed(comm=COMM):
    return VectorSpace(dot=lambda a, b: comm.allreduce(real_inner_product(a, b)), comm=comm)


def slow_problem(vs):
    """Which takes thousands of iterations of gradient descent."""
    c = np.logspace(0, 6, 20)
    return Problem(lambda x: vs.dot(c * x, x), lambda x: 2 * c * x, vs=vs)


def handlers():
    return [signal.getsignal(signum) for signum in (TERM, INT)]


# -- In one process, on the ranks that there are ------------------------------------------------------------------


@pytest.mark.collective
@pytest.mark.parametrize("signum", [TERM, INT])
@pytest.mark.parametrize("whom", ["last", "all"])
def test_the_iteration_ends_on_all_ranks_and_the_state_is_saved(signum, whom, folder):
    path, vs, before = os.path.join(folder, "s.npz"), distributed(), handlers()

    def send(state):
        if state.nit == 3 and (whom == "all" or COMM.rank == COMM.size - 1):
            os.kill(os.getpid(), signum)
            time.sleep(0.05)

    optimizer = GradientDescent(gtol=1e-13, maxiter=10**6)
    with pytest.raises(SystemExit) as ended, heed_signals(COMM):
        state = optimizer.minimize(slow_problem(vs), np.ones(20), monitor=[autosave(path, 1000), send])
    assert ended.value.code == 128 + signum and handlers() == before and current_interrupt() is None
    assert state.status == "signal" and state.nit == 4
    assert state.message == f"stopped by {signal.Signals(signum).name} after 4 iterations"
    loaded = State.load(path, vs, np.ones(20))
    assert loaded.nit == 4 and COMM.allreduce(loaded.nit) == 4 * COMM.size
    resumed = GradientDescent(gtol=1e-13, maxiter=6).minimize(slow_problem(vs), state=loaded)
    whole = GradientDescent(gtol=1e-13, maxiter=6).minimize(slow_problem(vs), np.ones(20))
    np.testing.assert_array_equal(resumed.x, whole.x)


@pytest.mark.collective
def test_a_signal_between_iterations_and_after_them_counts():
    with heed_signals(COMM, leave=False) as interrupt:
        if COMM.rank == 0:
            os.kill(os.getpid(), TERM)
            time.sleep(0.05)
        state = GradientDescent().minimize(slow_problem(distributed()), np.ones(20))
        assert state.nit == 0 and state.status == "signal"
    assert (interrupt.name, interrupt.status) == ("SIGTERM", 143)
    with heed_signals(COMM, leave=False) as interrupt:
        if COMM.rank == 0:
            os.kill(os.getpid(), INT)
            time.sleep(0.05)
    assert interrupt.status == 130
    with heed_signals(COMM, leave=False) as interrupt:
        assert interrupt.agree(COMM, wish=COMM.rank == COMM.size - 1)  # to end without a signal
        assert not interrupt.agree(COMM)
    assert interrupt.status == 0 and interrupt.name == ""


@pytest.mark.collective
def test_blocks_in_blocks_and_on_other_threads():
    before = handlers()
    with heed_signals(COMM, leave=False) as outer, heed_signals(COMM, leave=False) as inner:
        assert current_interrupt() is inner
        os.kill(os.getpid(), INT)
        time.sleep(0.05)
    assert (inner.status, outer.status) == (130, 0)
    results = []

    def work():
        with heed_signals(None, leave=False) as interrupt:
            results.append(interrupt.agree())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False] and handlers() == before
    with pytest.raises(KeyError), heed_signals(COMM):
        raise KeyError
    assert handlers() == before and current_interrupt() is None


# -- As programs --------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
import numpy as np
from mpi4py import MPI
from vmad_lit.contrib.optimize import GradientDescent, Problem, State, autosave
from vmad_lit.contrib.vectorspace import VectorSpace, real_inner_product
from vmad_lit.lib.signals import heed_signals
comm, grace, stuck = MPI.COMM_WORLD, float(sys.argv[1]), sys.argv[2] == "stuck"
vs, c = VectorSpace(dot=lambda a, b: comm.allreduce(real_inner_product(a, b)), comm=comm), np.logspace(0, 6, 20)
problem = Problem(lambda x: vs.dot(c * x, x), lambda x: 2 * c * x, vs=vs)
def monitor(state):
    if state.nit == 3:
        open(f"ready{comm.rank}", "w").close()
        while stuck:
            time.sleep(0.05) if comm.rank else comm.Barrier()  # which never comes
    time.sleep(0.01)
with heed_signals(comm, grace):
    start = dict(x0=np.ones(20), state=State.resume("s.npz", vs, np.ones(20)))
    state = GradientDescent(gtol=1e-13, maxiter=10**6).minimize(problem, **start, monitor=[autosave("s.npz", 10**6), monitor])
    if comm.rank == 0:
        print(state.message, flush=True)
"""


class Job:
    """A program on some ranks, which is ready to be disturbed."""

    def __init__(self, folder, ranks, *arguments):
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        if ranks > 1 or "stuck" in arguments:
            command = [launcher(), "-n", str(ranks), *command]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        self.process = subprocess.Popen(command, cwd=folder, env=environment(), **options)
        ready = [folder / f"ready{rank}" for rank in range(ranks)]
        start = time.monotonic()
        while not all(path.exists() for path in ready):
            assert time.monotonic() - start < 60 and self.process.poll() is None, self.finish(1)
            time.sleep(0.02)

    def send(self, signum, whom):
        ranks = [pid for pid in processes_below(self.process.pid) if not processes_below(pid)] or [
            self.process.pid
        ]
        chosen = {
            "launcher": [self.process.pid],
            "one": ranks[-1:],
            "all": ranks,
            "both": [self.process.pid, *ranks],
        }
        for pid in chosen[whom]:
            os.kill(pid, signum)

    def finish(self, patience):
        """The status and the output; the job is ended if it has not ended."""
        try:
            text, _ = self.process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            text = self.process.communicate()[0] + "\n(hung)"
        return self.process.returncode, text

    def kill(self):
        """End what is left, whatever happened to the test."""
        for pid in [*processes_below(self.process.pid), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start(tmp_path):
    jobs = []

    def begin(*arguments):
        jobs.append(Job(tmp_path, *arguments))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


CASES = [
    (1, TERM, "one"),
    (1, INT, "one"),
    (2, TERM, "launcher"),
    (2, INT, "one"),
    (3, TERM, "one"),
    (3, INT, "both"),
]
MORE = [
    (ranks, signum, whom)
    for ranks in (2, 3)
    for signum in (TERM, INT)
    for whom in ("launcher", "one", "all", "both")
]


@pytest.mark.serial
@pytest.mark.skipif(not HAS_MPIRUN or not os.path.isdir("/proc/self"), reason="needs mpirun and /proc")
@pytest.mark.parametrize(
    "ranks, signum, whom", CASES + [case for case in MORE if case not in CASES] * soaking()
)
def test_a_job_that_gets_a_signal(start, tmp_path, ranks, signum, whom):
    job = start(ranks, 30, "")
    job.send(signum, whom)
    status, text = job.finish(30)
    assert status == 128 + signum and f"stopped by {signal.Signals(signum).name} after" in text, (
        status,
        text,
    )
    with np.load(tmp_path / "s.npz") as file:
        assert f'"nit": {text.split(" iterations")[0].split()[-1]},' in file["state"].item()
    assert len([name for name in os.listdir(tmp_path) if name.startswith("s.npz")]) == ranks


@pytest.mark.serial
@pytest.mark.skipif(not HAS_MPIRUN or not os.path.isdir("/proc/self"), reason="needs mpirun and /proc")
@pytest.mark.parametrize("how", ["out of time", "twice"])
def test_a_job_that_hangs_ends_nevertheless(start, how):
    """All ranks wait, one of them in MPI; after the time of grace, or by a second signal, the job is gone."""
    job = start(2, 1.0 if how == "out of time" else 60, "stuck")
    job.send(TERM, "one" if how == "out of time" else "all")
    if how == "twice":
        time.sleep(1.2)
        job.send(TERM, "one")
    told = time.monotonic()
    status, text = job.finish(20)
    assert status == 143 and time.monotonic() - told < 10, (status, text)
    assert ("has not ended within 1 s" if how == "out of time" else "told to end a second time") in text


@pytest.mark.serial
@pytest.mark.skipif(not HAS_MPIRUN or not os.path.isdir("/proc/self"), reason="needs mpirun and /proc")
def test_the_demonstration_saves_draws_and_leaves(tmp_path):
    pytest.importorskip("pmesh")
    arguments = "--nmesh 8 --steps 1 --maxiter 100000 --quiet --grace 60 --state s.npz --output p.png".split()
    command = [launcher(), "-n", "2", sys.executable, "-m", "vmad_lit.demo", *arguments]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    job = subprocess.Popen(command, cwd=tmp_path, env=environment(), **options)
    start = time.monotonic()
    while not (tmp_path / "s.npz").exists() and job.poll() is None and time.monotonic() - start < 60:
        time.sleep(0.02)
    os.kill([pid for pid in processes_below(job.pid) if not processes_below(pid)][-1], INT)
    text, _ = job.communicate(timeout=60)
    assert job.returncode == 130 and "initial modes, against the truth" in text, text
    assert "stopped by SIGINT after" in text or "converged" in text or "rounding" in text
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
