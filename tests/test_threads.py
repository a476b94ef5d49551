"""The threads of a process: how many, that they share a loop without gaps, and what they leave behind."""

import os
import signal
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmad_lit.lib import threads


@pytest.fixture(autouse=True)
def back_to_the_environment():
    yield
    threads.set_threads(None)


def test_threads_follow_the_environment(monkeypatch):
    for name in (
        "OMP_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "MPI_LOCALNRANKS",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PMI_LOCAL_SIZE",
        "SLURM_NTASKS_PER_NODE",
    ):
        monkeypatch.delenv(name, raising=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads.get_threads() == min(cores, threads.MAX_THREADS)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert threads.get_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert threads.get_threads() == 5
    for useless in "", "0", "many":
        monkeypatch.setenv("OMP_NUM_THREADS", useless)
        assert threads.get_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert threads.get_threads() == threads.MAX_THREADS
    threads.set_threads(2)
    assert threads.get_threads() == 2
    threads.set_threads(None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    monkeypatch.setenv("MPI_LOCALNRANKS", "1000")
    assert threads.get_threads() == 1


@pytest.mark.parametrize("n", [0, -1, threads.MAX_THREADS + 1])
def test_no_such_number_of_threads(n):
    with pytest.raises(ValueError, match=f"between 1 and {threads.MAX_THREADS}, not {n}"):
        threads.set_threads(n)


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, threads.MAX_THREADS))
def test_parts_are_whole_and_about_equal(n, least, number):
    threads.set_threads(number)
    edges = threads.share_out(n, least)
    parts = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == n and parts.size <= number
    assert parts.size == 1 or (parts.min() >= least and parts.max() - parts.min() <= 1)
    assert parts.size == min(number, max(1, n // least))


def test_a_loop_is_shared():
    threads.set_threads(4)
    seen, who = np.zeros(1000, int), set()
    together = threading.Barrier(4)

    def loop(start, end):
        together.wait()
        who.add(threading.get_ident())
        seen[start:end] += 1

    threads.share(loop, len(seen), least=100)
    assert (seen == 1).all() and len(who) == 4 and threading.get_ident() in who


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_of_a_thread_is_that_of_the_call(bad):
    """The others finish first, and the workers are fit for the next task."""
    done = []

    def work(i):
        if i == bad:
            raise KeyError(i)
        done.append(i)

    tasks = [(i,) for i in range(4)]
    for _ in range(3):
        with pytest.raises(KeyError, match=str(bad)):
            threads.run_on_threads(work, tasks)
        assert sorted(done) == [i for i in range(4) if i != bad]
        done.clear()
    threads.run_on_threads(done.append, tasks)
    assert sorted(done) == [0, 1, 2, 3]


def test_workers_hold_on_to_nothing():
    arrays = [np.zeros(10) for _ in range(3)]
    alive = [weakref.ref(array) for array in arrays]
    threads.run_on_threads(np.negative, [(array,) for array in arrays])
    del arrays
    assert not any(ref() is not None for ref in alive)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_forks_has_its_own_workers():
    threads.run_on_threads(abs, [(1,), (2,)])
    child = os.fork()
    if not child:
        signal.alarm(60)  # it does not wait for ever for workers that only its parent has
        done = []
        threads.run_on_threads(done.append, [(1,), (2,)])
        os._exit(sum(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
