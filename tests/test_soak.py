"""What takes long: jobs that are killed at any moment, again and again, end where one ends that nobody disturbs.

``make soak`` runs this file and every test with random examples. SOAK_KILLS is how often each job is killed, SOAK_SEED
makes the same moments again.
"""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers import needs_mpirun
from tools.mpirun import environment, launcher

pytestmark = [pytest.mark.soak, needs_mpirun]

KILLS = int(os.environ.get("SOAK_KILLS", 8))
SEED = int(os.environ.get("SOAK_SEED", time.time_ns() % 1_000_000))
JOB = "--nmesh 16 --steps 2 --maxiter 30 --quiet --save fields --output picture.png --state state.npz".split()


def start(folder, ranks):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "vmad_lit.demo", *JOB]
    if ranks > 1:
        command = [launcher(), "-n", str(ranks), *command]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def children(pid):
    """The processes below a process, by /proc."""
    below = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                below.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(name))
        except OSError:  # gone meanwhile
            continue
    found, todo = [], [pid]
    while todo:
        found += (new := below.get(todo.pop(), []))
        todo += new
    return found


def end(job, whom, rng):
    """Kill all processes of a job, or one of its ranks, whereupon the launcher ends the others."""
    if whom == "all" or not os.path.isdir("/proc/self"):
        os.killpg(job.pid, signal.SIGKILL)
        return
    below = children(job.pid)
    os.kill(rng.choice([pid for pid in below if not children(pid)] or [job.pid]), signal.SIGKILL)


@pytest.mark.parametrize("whom", ["all", "one"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_reconstruction_that_is_killed_again_and_again(tmp_path, ranks, whom):
    rng, begun = random.Random(f"{SEED} {ranks} {whom}"), time.monotonic()
    job = start(tmp_path / "whole", ranks)
    expected, _ = job.communicate(timeout=600)
    assert job.returncode == 0, expected
    took, killed, said = time.monotonic() - begun, 0, []
    for attempt in range(50 * KILLS):
        job = start(tmp_path / "killed", ranks)
        try:
            text, _ = job.communicate(timeout=rng.uniform(0.2, 1.1) * took if killed < KILLS else 600)
        except subprocess.TimeoutExpired:
            end(job, whom, rng)
            text, _ = job.communicate(timeout=60)
            killed += job.returncode != 0
        said.append(text)
        if job.returncode == 0:
            break
    report = f"SOAK_SEED={SEED}, {killed} kills:\n" + "\n--\n".join(said)
    assert job.returncode == 0, report
    whole, resumed = (np.load(tmp_path / name / "fields" / "white_noise.npy") for name in ("whole", "killed"))
    np.testing.assert_array_equal(resumed, whole, err_msg=report)
    assert table(said[-1]) == table(expected), report


def table(text):
    """How well the fields agree with the truth, as the program tells it."""
    return text[text.index("initial modes") : text.index("the picture")]
