"""What a simulation needs of memory, as predicted and as measured; and that too much is refused before it begins."""

import json
import math

import numpy
import pytest
from helpers import COMM, make_mesh, run_python

costs = pytest.importorskip("vmad_lit.lib.costs")
nbody = pytest.importorskip("vmad_lit.lib.nbody")

MEASURE = """
import gc, json, sys
import numpy
from mpi4py import MPI
from vmad_lit import Builder
from vmad_lit.lib import fastpm, memory
from vmad_lit.lib.cosmology import LinearPower, Planck15
from vmad_lit.lib.costs import POLICIES, plan_memory

def status(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

def gradient(n, steps, policy):
    pm = fastpm.ParticleMesh([n] * 3, BoxSize=4.0 * n)
    simulation = fastpm.FastPMSimulation(numpy.linspace(0.1, 1, steps + 1), Planck15, pm, **POLICIES[policy])
    with Builder() as m:
        wn = m.input("wn")
        dx, p, f = simulation.run(fastpm.induce_correlation(fastpm.r2c(wn), LinearPower(Planck15), pm))
        x = fastpm.axpy(simulation.q, dx, 1.0)
        m.output(y=fastpm.to_scalar(fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)))
    return m.compute_with_vjp(dict(wn=pm.generate_whitenoise(seed=1, type="real")), dict(_y=1.0))

policy = sys.argv[1]
gradient(8, 2, policy)  # compiles, and fills what is filled once
gc.collect()
memory.release()
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
gradient(56, 3, policy)
print(json.dumps((status("VmHWM") - before, plan_memory([56] * 3, 56**3, 3, 1, policy).gradient)))
"""


def test_the_peak_is_the_predicted_one():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("the peak of a process cannot be set back here")
    for policy in costs.POLICIES:  # each in a process of its own, where nothing is left of another one
        done = run_python(MEASURE, policy)
        assert done.returncode == 0, done.stderr
        measured, predicted = json.loads(done.stdout.splitlines()[-1])
        assert predicted == pytest.approx(measured, rel=0.1), policy


def test_what_is_kept_is_what_is_predicted():
    """More steps, and fewer states, without running anything."""

    def gradient(steps, policy, **others):
        return costs.plan_memory([256] * 3, 256**3, steps, policy=policy, **others).gradient

    for policy in "full", "positions":
        assert gradient(20, policy) > 2 * gradient(5, policy)
    for policy in "checkpoints", "disk", "reversible":
        assert gradient(100, policy) < 1.05 * gradient(20, policy)
    assert gradient(20, "positions") < gradient(20, "full")
    states = [gradient(40, dict(ram=ram)) for ram in (1, 5, 10)]
    assert states == sorted(states) and states[0] < states[2]
    assert gradient(10, "full", itemsize=4) < gradient(10, "full")
    assert gradient(10, "full", B=2) > 3 * gradient(10, "full")
    assert gradient(10, "full", ranks=8) < gradient(10, "full") / 4
    with pytest.raises(ValueError, match="policy"):
        gradient(10, "nothing")


def test_memory_is_read_from_the_kernel_and_its_groups(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def available():
        return costs.available_memory(str(tmp_path / "proc"), str(tmp_path / "groups"))

    assert available() == math.inf  # nothing is known
    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    assert available() == 50 * 1024
    write("proc/self/cgroup", "0::/job/step\n")
    write("groups/job/memory.max", "40000\n")
    write("groups/job/memory.current", "15000\n")
    write("groups/job/step/memory.max", "max\n")
    write("groups/job/step/memory.current", "15000\n")
    assert available() == 25000
    write("groups/job/memory.stat", "anon 1\ninactive_file 5000\n")
    assert available() == 30000  # the cache can be taken back
    write("groups/memory/batch/memory.limit_in_bytes", "20000\n")
    write("groups/memory/batch/memory.usage_in_bytes", "12000\n")
    write("proc/self/cgroup", "4:cpu,memory:/batch\n")
    assert available() == 8000


@pytest.mark.collective
def test_what_does_not_fit_is_refused_by_all_ranks(monkeypatch):
    there = 1e5 if COMM.rank == COMM.size - 1 else 1e12
    monkeypatch.setattr(costs, "available_memory", lambda: there)
    with pytest.raises(
        MemoryError, match="it takes about 1 GB.*what would fit: less .1e-08 GB.; --all leaves"
    ):
        costs.check_memory(COMM, "it", 10**9, lambda: {"less": 10, "more": 10**9}, "--all")


@pytest.mark.collective
def test_a_simulation_is_refused_before_it_has_a_lattice(monkeypatch):
    pm = make_mesh([8, 8, 8])
    stages = numpy.linspace(0.1, 1, 41)
    cosmology = type("", (), dict(Om0=0.3))
    make = nbody.FastPMSimulation
    simulation = make(stages, cosmology, pm)  # there is room
    monkeypatch.setattr(costs.memory, "idle", lambda: 0)
    monkeypatch.setattr(costs, "BESIDE", 0)
    plan = costs.plan_memory([8] * 3, 512, 40, COMM.size)
    monkeypatch.setattr(costs, "available_memory", lambda: 1.5 * COMM.size * plan.forward)
    make(stages, cosmology, pm).check_memory(gradient=False)
    with pytest.raises(
        MemoryError, match="gradient of a simulation of 512 particles in 40 steps.*reversible=True"
    ):
        simulation.check_memory()
    make(stages, cosmology, pm, reversible=True).check_memory()
    with pytest.raises(MemoryError, match="check_memory=False"):
        make(stages, cosmology, pm, reversible=True).check_memory(extra=10**9)
    monkeypatch.setattr(costs, "available_memory", lambda: 0.0)
    monkeypatch.setattr(type(pm), "generate_uniform_particle_grid", None)
    with pytest.raises(MemoryError, match="no other way"):
        make(stages, cosmology, pm)
    with pytest.raises(TypeError, match="NoneType"):
        make(stages, cosmology, pm, check_memory=False)  # goes on to the lattice
