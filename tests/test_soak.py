"""The trials of `make soak`: that they are many, the same for the same seed, and that they notice what goes wrong."""

import os
import random
import shutil
import signal
import sys

import numpy as np
import pytest

from helpers import needs_mpirun
from tools.soak import GOOD, HUNG, LOST, OUTCOMES, REFUSED, RIGHT, UNCLEAR, WRONG
from tools.soak.__main__ import perform, plan
from tools.soak.program import PROGRAMS, TOLD
from tools.soak.results import count, save, show
from tools.soak.running import Ended, run
from tools.soak.trials import (
    CLEAR,
    DAMAGES,
    ERRS,
    FULL,
    KINDS,
    LAUNCHERS,
    Known,
    Trial,
    Whole,
    answers,
    iterations,
    judge_end,
    refusal,
)

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
SEED = os.environ.get("SOAK_SEED", str(random.randrange(10**6)))


def code(text):
    return [sys.executable, "-c", text]


def test_trials_are_planned():
    planned = plan(300, "1", (1, 2, 3))
    assert len(planned) == 300 and len({trial.name for trial in planned}) == 300
    assert {trial.kind for trial in planned} >= {ERRS, *KINDS} - {"full disk"}
    assert {trial.name.split("/")[1] for trial in planned if trial.kind == ERRS} == set(PROGRAMS) == set(TOLD)
    assert {trial.ranks for trial in planned} == {1, 2, 3}
    known = [(trial.name, trial.ranks) for trial in planned]
    assert known == [(trial.name, trial.ranks) for trial in plan(300, "1", (1, 2, 3))]
    assert known != [(trial.name, trial.ranks) for trial in plan(300, "2", (1, 2, 3))]


@needs_proc
@pytest.mark.parametrize("text", ["sleep 60", "sleep 60 &", "(sleep 60 &) ; sleep 60"])
def test_what_hangs_is_noticed_and_ended(tmp_path, text, monkeypatch):
    """Also if the job has ended and left a process behind."""
    monkeypatch.setattr("tools.soak.running.LINGER", 0.3)
    seen = []

    def look(job):
        seen.append(job)
        return False

    ended = run(["/bin/sh", "-c", text], tmp_path / "job", 1, 0.1, look)
    assert ended.hung and refusal(ended) == HUNG and not ended.disturbed
    assert seen[0].wait(5, lambda: not any(seen[0].processes()))


@needs_proc
def test_what_turns_in_circles_is_ended_by_its_processor_time(tmp_path):
    ended = run(code("while True: pass"), tmp_path / "job", 1, 1.0)
    assert ended.hung


@needs_proc
def test_a_job_tells_its_status_and_what_it_printed(tmp_path):
    ended = run(code("print('error: there is no such thing'); raise SystemExit(2)"), tmp_path / "job", 1, 60)
    assert ended.status == 2 and refusal(ended) == REFUSED
    assert refusal(Ended(1, "Traceback ..\nKeyError: 'x'", 1.0)) == UNCLEAR
    assert refusal(Ended(1, "Traceback ..\nerror: there is no such thing", 1.0)) == UNCLEAR
    assert refusal(Ended(1, "Traceback ..\nOSError: File too large", 1.0), FULL, tracebacks=True) == REFUSED
    assert refusal(Ended(135, "Bus error", 1.0), FULL, tracebacks=True) == UNCLEAR
    assert CLEAR.search("demo: error: --noise must be positive")


@needs_proc
@needs_mpirun
@pytest.mark.parametrize("whom, left", [("one", 1), ("ranks", 2)])
def test_ranks_are_found(tmp_path, whom, left):
    """One rank, or each, gets a signal that it writes down."""
    folder = tmp_path / "job"
    text = """
import signal, time, os
got = signal.sigtimedwait
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
open(f"ready{os.getpid()}", "w").close()
if got([signal.SIGUSR1], 2):
    open(f"got{os.getpid()}", "w").close()
"""

    def send(job):
        assert job.wait(30, lambda: len(list(folder.glob("ready*"))) == 2)
        assert sorted(rank for _, rank in job.processes() if rank is not None) == [0, 1]
        return job.send(signal.SIGUSR1, whom, random.Random(1))

    ended = run(code(text), folder, 2, 60, send)
    assert ended.status == 0 and ended.disturbed and len(list(folder.glob("got*"))) == left


def pretend(folder, seed=1):
    """The files that a reconstruction leaves."""
    (folder / "fields").mkdir()
    rng = np.random.default_rng(seed)
    for name in "white_noise", "final":
        np.save(folder / "fields" / f"{name}.npy", rng.normal(size=(4, 4, 4)))


@pytest.fixture
def trial(tmp_path):
    """A trial, and an undisturbed run that is said to have been made."""
    whole, mine = tmp_path / "whole", tmp_path / "mine"
    for folder in whole, mine:
        folder.mkdir()
        pretend(folder)
    known = Known(whole, Ended(0, "", 1.0))
    return Trial("a kind", 2, "1/a kind/0", mine, 60, lambda *arguments: known)


def change(trial, by):
    path = trial.folder / "fields" / "final.npy"
    np.save(path, np.load(path) * (1 + by))


def test_a_wrong_answer_is_noticed(trial):
    assert trial.compare() == trial.compare(ranks=3) == RIGHT
    change(trial, 1e-12)
    assert trial.compare() == WRONG  # on the same number of ranks not a bit may differ
    assert trial.compare(ranks=3) == RIGHT
    change(trial, 1e-3)
    assert trial.compare(ranks=3) == WRONG
    shutil.rmtree(trial.folder / "fields")
    assert trial.compare() == WRONG


def test_lost_iterations_are_noticed():
    bar = "\r 37%|###| 11/30 [00:01<00:01]\r 43%|###| 13/30 [00:01<00:01]"
    assert iterations(bar) == 13 and iterations("") == 0
    resumed = Ended(-9, "going on from iteration 10\n" + bar, 1.0)
    assert judge_end(resumed, signal.SIGKILL, 1, RIGHT, least=10) == RIGHT
    assert judge_end(resumed, signal.SIGKILL, 1, RIGHT, least=11) == LOST
    assert judge_end(Ended(143, bar, 1.0), signal.SIGTERM, 1, RIGHT, least=0) == RIGHT
    assert judge_end(Ended(1, bar, 1.0), signal.SIGTERM, 1, RIGHT, least=0) == UNCLEAR
    assert judge_end(Ended(None, bar, 1.0), signal.SIGTERM, 1, RIGHT, least=0) == HUNG


def test_what_a_launcher_says_of_ranks_does_not_count():
    assert LAUNCHERS.search("MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD")
    assert not LAUNCHERS.search("ValueError: rank 1 has the constant 3.0, rank 0 the constant 2.0")
    assert answers("x\nrank 1 found 2\nrank 0 found 2\n") == ["rank 0 found 2", "rank 1 found 2"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damages_change_a_file(trial, damage, tmp_path):
    header = '{"plain": {"nit": 10}}'
    for folder, x in (trial.folder, 2.0), (tmp_path / "whole", 1.0):
        np.savez(folder / "state.npz", x=np.full(1000, x), state=np.array(header))
    trial.whole.state = lambda *arguments: tmp_path / "whole"
    path = trial.folder / "state.npz"
    before = path.read_bytes()
    for seed in range(3):
        path.write_bytes(before)
        trial.dice = random.Random(seed)
        damage(trial, path)
        assert not path.exists() or path.read_bytes() != before


def test_trials_are_counted(tmp_path, capsys):
    cases = [(ERRS, 2, RIGHT), (ERRS, 2, WRONG), (ERRS, 3, REFUSED), ("full disk", 1, HUNG)]
    rows = count([dict(kind=kind, ranks=ranks, outcome=outcome) for kind, ranks, outcome in cases])
    assert [(row["kind"], row["ranks"], row["trials"]) for row in rows] == [
        ("full disk", 1, 1),
        (ERRS, 2, 2),
        (ERRS, 3, 1),
    ]
    assert rows[1] == dict(dict.fromkeys(OUTCOMES, 0), kind=ERRS, ranks=2, trials=2, right=1, wrong=1)
    show(rows, ranks=False)
    rows_shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows_shown[-2:] == ["one rank errs 3 1 1 0 1 0 0".split(), "all 4 1 1 0 1 1 0".split()]
    path = tmp_path / "soak.json"
    for mpi in "A 1", "B 2", "A 1":
        save(path, dict(mpi=mpi, rows=rows))
    assert path.read_text().count('"mpi"') == 2


@pytest.mark.soak
@needs_proc
@needs_mpirun
@pytest.mark.parametrize("kind", [*KINDS, *PROGRAMS])
def test_all_kinds(tmp_path, kind):
    """One trial of each kind; SOAK_SEED makes the same one again. `make soak` makes hundreds."""
    of = [trial for trial in plan(300, SEED, (1, 2, 3)) if kind in (trial.kind, trial.name.split("/")[1])]
    if not of:
        pytest.skip("this system has no file systems in memory")
    said = []
    done = perform(of[0], tmp_path, 30, Whole(tmp_path, 90), said.append)
    assert done["outcome"] in GOOD, f"SOAK_SEED={SEED}\n" + "\n".join(said)
