"""What ranks send to each other is counted, against an independent layer; a model knows it before; counts are large."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from helpers import COMM, make_mesh, needs_mpirun, real

from tools.mpirun import environment, launcher
from vmad_lit import Builder
from vmad_lit.core import traffic
from vmad_lit.core.profile import Profile
from vmad_lit.core.traffic import Traffic

mpi = pytest.importorskip("vmad_lit.lib.mpi")
costs = pytest.importorskip("vmad_lit.lib.costs")
exchange = pytest.importorskip("vmad_lit.lib.exchange")
halos = pytest.importorskip("vmad_lit.lib.halo")
mesh = pytest.importorskip("vmad_lit.lib.mesh")
nbody = pytest.importorskip("vmad_lit.lib.nbody")
plan = pytest.importorskip("pfft.plan")

collective = pytest.mark.collective
OTHERS = COMM.size - 1


def sent(action):
    """What an action sends, as (messages, bytes) by the way."""
    with Traffic() as t:
        action()
    return {way: (t.messages[way], t.nbytes[way]) for way in t.messages if t.messages[way]}


# What is counted


@collective
def test_buffers_to_each_rank():
    x = numpy.zeros((3 * COMM.size, 2), "f4")
    counts = [3] * COMM.size
    assert sent(lambda: mpi.exchange_rows(x, counts, counts, COMM)) == (
        {"each": (OTHERS, 3 * 2 * 4 * OTHERS)} if OTHERS else {}
    )
    to_myself = [len(x) if rank == COMM.rank else 0 for rank in range(COMM.size)]
    assert sent(lambda: mpi.exchange_rows(x, to_myself, to_myself, COMM)) == {}


@collective
def test_buffers_to_one_rank_and_to_all():
    def last_to_first():
        me = COMM.rank
        mpi.pass_on(
            numpy.zeros(5),
            0 if me == COMM.size - 1 else mpi.MPI.PROC_NULL,
            COMM.size - 1 if me == 0 else mpi.MPI.PROC_NULL,
            COMM,
        )

    found = sent(last_to_first)
    assert found.get("one") == ((1, 40) if OTHERS and COMM.rank == COMM.size - 1 else None)
    assert sent(lambda: mpi.add_up(COMM, 1.5)) == ({"all": (1, 8)} if OTHERS else {})
    found = sent(lambda: mpi.from_root(numpy.zeros(100), COMM, 0)).get("all", (0, 0))
    if OTHERS:
        # All tell what they have, and the root sends 800 bytes
        assert found[0] == (2 if COMM.rank == 0 else 1)
        assert found[1] > 800 if COMM.rank == 0 else found[1] < 800


def test_nothing_is_computed_while_nobody_listens():
    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("this was to be weighed")

    class Unreadable:
        def __iter__(self):
            raise RuntimeError("these were to be added up")

    assert not traffic.listeners
    traffic.count_object(COMM, Unpicklable())
    traffic.count_to_each(COMM, Unreadable())
    traffic.count_to_all(None, 0)
    traffic.count_to_one(None, 0, 0)


def test_listeners_come_and_go_in_any_order():
    heard = []
    listener, other = (lambda *told: heard.append(told)), (lambda *told: None)
    traffic.listen(listener)
    traffic.listen(other)
    traffic.stop(listener)
    assert len(plan.listeners) == 1  # the other one still hears of transforms
    traffic.stop(other)
    assert not traffic.listeners and not plan.listeners and not heard


@collective
def test_a_profile_tells_who_sends():
    pm = make_mesh([6, 4, 8])
    with Builder() as m:
        x = m.input("x")
        m.output(y=fastpm().to_scalar(fastpm().r2c(x)))
    init = dict(x=real(pm))
    with Profile() as p, Traffic() as t:
        m.compute("y", init)
    rows = {row.name: row for row in p.by_operator()}
    total = sum(t.messages.values()), sum(t.nbytes.values())
    # What is sent outside of all nodes is with the root
    assert (
        sum(row.messages for row in rows.values()) + p.root.messages,
        sum(row.sent for row in rows.values()) + p.root.sent,
    ) == total
    assert (rows["r2c"].messages > 0) == (OTHERS > 0)
    assert ("messages" in p.table()) == (OTHERS > 0) and ("messages" in p._repr_html_()) == (OTHERS > 0)
    whole, largest = p.over_ranks(COMM, sums=True)
    assert sum(row.sent for row in whole.by_node()) == COMM.allreduce(sum(row.sent for row in p.by_node()))
    assert max(row.sent for row in largest.by_node()) == COMM.allreduce(
        max(row.sent for row in p.by_node()), mpi.MPI.MAX
    )


def fastpm():
    from vmad_lit.lib import fastpm

    return fastpm


# The model

DIVISIONS = [None, "slabs", "turned"]
MESHES = [[8, 6, 4], [7, 5, 9], [6, 6], [12, 9, 5]]


def divide(nmesh, how, dtype="f8"):
    np = {
        None: None,
        "slabs": [COMM.size],
        "turned": [1, COMM.size],
    }[how]
    if np is not None and len(np) >= len(nmesh):
        pytest.skip("more directions than a mesh can be divided along")
    pm = make_mesh(nmesh, np=np, dtype=dtype)
    return pm, costs.Division(nmesh, [int(p) for p in pm.np], COMM.rank, numpy.dtype(dtype).itemsize)


@collective
@pytest.mark.parametrize("how", DIVISIONS)
@pytest.mark.parametrize("nmesh", MESHES, ids=str)
def test_transforms_send_what_the_model_says(nmesh, how):
    for dtype in "f8", "f4":
        pm, division = divide(nmesh, how, dtype)
        x = real(pm)
        for transform, backward in (x.r2c, False), (x.r2c().c2r, True):
            expected = division.transform(backward)
            assert sent(transform) == ({"each": tuple(expected)} if expected.messages else {})


@collective
@pytest.mark.parametrize("low,high", [([2, 0, 0], [2, 0, 0]), ([1, 3, 0], [2, 1, 0]), ([4, 5, 3], [3, 4, 1])])
@pytest.mark.parametrize("how", DIVISIONS)
@pytest.mark.parametrize("nmesh", [[12, 9, 5], [7, 13, 4]], ids=str)
def test_halos_send_what_the_model_says(nmesh, how, low, high):
    pm, division = divide(nmesh, how)
    halo, x = halos.Halo(pm, low, high), real(pm)
    array = halo.fetch(x)
    for action, fold in (lambda: halo.fetch(x), False), (lambda: halo.fold(array.copy()), True):
        expected = division.halo(low, high, fold)
        assert sent(action) == ({"one": tuple(expected)} if expected.messages else {})
    assert array.shape == tuple(division.wide(axis, low, high) for axis in range(3))


@collective
@pytest.mark.parametrize("how", DIVISIONS)
def test_a_force_sends_what_the_model_says(how):
    pm, division = divide([24, 24, 12], how)
    cell = pm.BoxSize / pm.Nmesh
    q = pm.generate_uniform_particle_grid(shift=0.5)
    x = q + 0.4 * cell * numpy.random.default_rng(COMM.rank).normal(size=q.shape)
    p, _f = numpy.random.default_rng(COMM.rank).normal(size=(2, *q.shape))
    found = []

    def kick():
        found.append(nbody.ForceAt(lambda: x, pm))
        found[0].kick(p, 1.0, numpy.empty_like(p))

    forward = sent(kick)
    if not OTHERS:
        assert forward == {}
        return
    given = found[0].layout.halo.given
    expected = division.force(*given)
    assert forward == dict(
        each=expected["transforms"], one=expected["halos"], all=tuple(expected["agreements"])
    )
    reverse = sent(lambda: found[0].pull(_f, p, 1.0, numpy.empty_like(p)))
    expected = division.force(*given, gradient=True)
    assert reverse == dict(each=expected["transforms"], one=expected["halos"])
    # The agreement is by the operator
    wanted = sent(lambda: mesh.common_dtypes(pm.comm, _f, p))
    assert wanted == dict(all=tuple(expected["agreements"]))


@collective
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_ghosts_are_about_as_many_as_the_model_says(sigma):
    pm, division = divide([24, 24, 24], None)
    q = pm.generate_uniform_particle_grid(shift=0.5)
    cell = pm.BoxSize / pm.Nmesh
    x = q + sigma * cell * numpy.random.default_rng(COMM.rank).normal(size=q.shape)
    layout = exchange.make_layout(exchange.as_positions(x, pm), pm, 2)
    there = sent(lambda: layout.exchange(x))
    expected = division.ghosts(sigma)
    if OTHERS:
        total, expected_total = COMM.allreduce(numpy.array([there["each"][1], 24 * expected]))
        assert total == pytest.approx(expected_total, rel=0.05)
        assert division.ghosts(0.0) < expected
    else:
        assert there == {} and expected == 0


def test_slabs_while_there_are_planes_and_pencils_beyond():
    choose = costs.choose_processes
    assert choose([64] * 3, 1) == [1, 1] and choose([64] * 3, 2) == [2, 1] and choose([64] * 3, 4) == [4, 1]
    assert choose([64, 64], 4) == [4] and choose([64], 1) == []
    for ranks in 1024, 4096:
        first, second = choose([512] * 3, ranks)
        assert first * second == ranks and second > 1
    # Nobody is left without a part, if it can be helped
    assert choose([8] * 3, 16) in ([8, 2], [4, 4], [2, 8])
    assert numpy.prod(choose([8] * 3, 5)) == 5
    # Where messages cost nothing, and then where nothing else does
    cheap, dear = (costs.Machine(latency=seconds) for seconds in (0.0, 1e-1))
    assert choose([1024] * 3, 64, margin=0, machine=cheap) == [64, 1]
    assert choose([1024] * 3, 64, margin=0, machine=dear)[1] > 1


def test_limits_are_told():
    told = [
        costs.limits(costs.Division([n] * 3, np), 4) for n, np in [(512, [8]), (512, [300]), (512, [512])]
    ]
    assert told[0] == []
    assert "some ranks have nothing" in told[1]
    assert any("wider than domain" in limit for limit in told[2])
    assert any("MPI 4" in limit for limit in costs.limits(costs.Division([4096] * 3, [8])))
    with pytest.raises(ValueError, match="divided along fewer"):
        costs.Division([8, 8], [2, 2])


# An independent layer

PROGRAM = """
import ctypes, json, sys
import numpy
from mpi4py import MPI
from vmad_lit import Builder
from vmad_lit.core.traffic import Traffic
from vmad_lit.lib import fastpm, mesh
from vmad_lit.lib.cosmology import LinearPower, Planck15

KINDS = "each", "reduced", "gathered", "broadcast", "one"
library = ctypes.CDLL(None)
counts = ((ctypes.c_longlong * 2) * len(KINDS)).in_dll(library, "counts")

def gradient(comm, np, **options):
    pm = fastpm.ParticleMesh([12] * 3, BoxSize=48.0, comm=comm, np=np)
    simulation = fastpm.FastPMSimulation(numpy.linspace(0.1, 1, 3), Planck15, pm, **options)
    with Builder() as m:
        wn = m.input("wn")
        dx, p, f = simulation.run(fastpm.induce_correlation(wn, LinearPower(Planck15), pm))
        x = fastpm.axpy(simulation.q, dx, 1.0)
        density = fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)
        m.output(y=fastpm.to_scalar(density))
    init = dict(wn=pm.generate_whitenoise(seed=1, type="complex"))
    run = lambda: m.compute_with_vjp(init, dict(_y=1.0))
    run()
    library.reset_counts()
    with Traffic() as ours:
        run()
    return dict(zip(KINDS, map(list, counts))), ours.messages, ours.nbytes

world, found = MPI.COMM_WORLD, []
for ranks, np, options in [(4, [4], {}), (4, [2, 2], {}), (3, [3], dict(reversible=True)), (2, [2, 1], dict(disk=2))]:
    part = world.Split(0 if world.rank < ranks else MPI.UNDEFINED)
    if part != MPI.COMM_NULL:
        found.append(gradient(part, np, **options))
found = world.gather(found)
if world.rank == 0:
    print(json.dumps(found))
"""


@needs_mpirun
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD")
def test_a_layer_between_us_and_mpi_counts_the_same(tmp_path):
    compiler = shutil.which(
        "mpicc", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if compiler is None or shutil.which("cc") is None:
        pytest.skip("needs mpicc and a C compiler")
    library = tmp_path / "libcount.so"
    source = Path(__file__).with_name("pmpi.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    preload = ["env", f"LD_PRELOAD={library}", sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        [launcher(), "-n", "4", *preload], env=environment(), capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    for rank, runs in enumerate(json.loads(done.stdout.splitlines()[-1])):
        assert len(runs) == (4, 4, 3, 2)[rank]
        for layer, messages, nbytes in runs:
            assert layer["each"] == [messages["each"], nbytes["each"]] and messages["each"] > 0
            # What is pickled is gathered by a call for the lengths and one for the bytes
            calls = sum(layer[kind][0] for kind in ("reduced", "gathered", "broadcast"))
            size = sum(layer[kind][1] for kind in ("reduced", "gathered", "broadcast"))
            pickled = calls - messages["all"]
            assert 0 <= pickled <= messages["all"]
            assert 0 <= size - nbytes["all"] <= 8 * pickled
            assert layer["one"] == [messages["one"], nbytes["one"]] and messages["one"] > 0


# Counts that an int does not hold


def test_counts_and_places_are_long():
    counts = numpy.array([2**31, 2**33, 5])
    assert mpi.starts(counts).tolist() == [0, 2**31, 2**31 + 2**33] and mpi.starts([]).tolist() == []
    assert mpi.starts([2**40]).dtype == "i8"
    huge = numpy.lib.stride_tricks.as_strided(numpy.zeros(1), (2**20, 2**12, 3), (0, 0, 0))
    assert mpi.row_size(huge) == 2**12 * 24
    assert huge.nbytes == 2**20 * mpi.row_size(huge) > 2**31
    division = costs.Division([2**14] * 3, [2])
    assert division.transform().nbytes == 2**13 * 2**13 * (2**13 + 1) * 16


def test_large_counts_are_cut_into_pieces(monkeypatch):
    monkeypatch.setattr(mpi, "LARGEST", 2**31 - 1)
    pieces = list(mpi.pieces_of(2**32 + 5, 7))
    assert [(p.start, p.stop) for p in pieces] == [
        (7, 2**31 + 6),
        (2**31 + 6, 2**32 + 5),
        (2**32 + 5, 2**32 + 12),
    ]
    mpi.check_count(2**31 - 1)
    with pytest.raises(ValueError, match="MPI 4"):
        mpi.check_count(2**31)


@collective
def test_this_library_takes_what_it_is_said_to_take():
    """Rows without a byte: their number is all that travels."""
    if mpi.LARGEST < mpi.UNLIMITED:
        pytest.skip("no large counts here")
    nothing = mpi.MPI.BYTE.Create_contiguous(0).Commit()
    buffer, counts = bytearray(8), numpy.full(COMM.size, 2**31 + 1)
    sides = [buffer, (counts, mpi.starts(counts)), nothing]
    COMM.Alltoallv(sides, [bytearray(8), *sides[1:]])
    nothing.Free()


@collective
@pytest.mark.parametrize("largest", [1, 3, 2**31 - 1])
def test_exchanges_by_pieces(monkeypatch, largest):
    rng = numpy.random.default_rng(COMM.rank)
    x = rng.normal(size=(6 * COMM.size**2, 3))
    pm = make_mesh([12, 6, 4])
    pos = rng.uniform(size=(50, 3)) * pm.BoxSize
    send = [2 * COMM.size + (rank - COMM.rank) for rank in range(COMM.size)]
    send[COMM.rank] += len(x) - sum(send)
    recv = COMM.alltoall(send)

    def run():
        layout = exchange.make_layout(pos, pm, 2)
        there = layout.exchange(pos)
        y = mpi.exchange_rows(x, send, recv, COMM)
        total = mpi.total(x[:5], COMM)
        return there, layout.gather(there), y, total, mpi.from_root(x, COMM, 0), layout._in_pieces

    *expected, _ = run()
    monkeypatch.setattr(mpi, "LARGEST", largest)
    *found, in_pieces = run()
    assert in_pieces == (largest < 100)
    assert all(numpy.array_equal(a, b) for a, b in zip(found, expected))
    if largest < 100:
        with pytest.raises(ValueError, match="MPI 4"):
            mpi.join(x, COMM)


@collective
@pytest.mark.parametrize("how", DIVISIONS)
def test_transforms_by_pieces(monkeypatch, how):
    pm, _ = divide([7, 6, 9], how)
    x = real(pm)
    expected = x.r2c()
    monkeypatch.setattr(plan, "LARGEST", 10)
    modes = x.r2c()
    assert numpy.array_equal(modes.value, expected.value)
    assert numpy.allclose(modes.c2r().value, x.value)


@collective
def test_counts_of_particles_are_long():
    pm = make_mesh([12, 6, 4])
    x = numpy.random.default_rng(COMM.rank).uniform(size=(20, 3)) * pm.BoxSize
    layout = exchange.make_layout(x, pm, 2)
    for counts in (
        layout.sendcounts,
        layout.recvcounts,
        layout.sendoffsets,
        layout.recvoffsets,
        layout.indices,
    ):
        assert counts.dtype == "i8"
    assert type(ctypes.c_int64(int(layout.recvlength)).value) is int
