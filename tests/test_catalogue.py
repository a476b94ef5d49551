"""Files of catalogues and fields: written by all ranks, read on any number, and whole or not there at all."""

import glob
import os
import sys

import numpy as np
import pytest

pytest.importorskip("pmesh")
h5py = pytest.importorskip("h5py")

from mpi4py import MPI  # noqa: E402

from helpers import join, run_python  # noqa: E402
from vmad_lit.lib import catalogue  # noqa: E402
from vmad_lit.lib.cosmology import MatterDominated  # noqa: E402
from vmad_lit.lib.fastpm import FastPMSimulation, ParticleMesh  # noqa: E402

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD


@pytest.fixture
def path(folder):
    return os.path.join(folder, "file.hdf5")


def rows(n=23):
    """Columns of a catalogue, and the slice of this rank: uneven, and the last of three or more ranks has none."""
    rng = np.random.default_rng(4)
    whole = dict(
        x=rng.normal(size=(n, 3)),
        m=rng.normal(size=n).astype("f4"),
        id=rng.integers(1 << 40, size=n),
        on=rng.uniform(size=n) < 0.5,
    )
    edges = np.linspace(0, 1, max(COMM.size - (COMM.size > 2), 1) + 1) ** 2
    edges = np.append(edges, np.ones(COMM.size))
    return whole, slice(int(edges[COMM.rank] * n), int(edges[COMM.rank + 1] * n))


@pytest.mark.parametrize("chunk", [1 << 22, 32])
@pytest.mark.parametrize("dtype", [None, "f4", "f8"])
def test_columns(path, dtype, chunk, monkeypatch):
    monkeypatch.setattr(catalogue, "CHUNK", chunk)
    whole, mine = rows()
    catalogue.save(
        path,
        COMM,
        {name: v[mine] for name, v in whole.items()},
        attributes=dict(a=0.5, name="test", box=np.ones(3)),
        dtype=dtype,
    )
    columns, attributes = catalogue.load(path, COMM)
    alone, _ = catalogue.load(path, MPI.COMM_SELF)
    assert attributes["a"] == 0.5 and attributes["name"] == "test" and attributes["box"].tolist() == [1, 1, 1]
    for name, v in whole.items():
        kind = np.dtype(dtype if dtype and v.dtype.kind == "f" else v.dtype)
        for got in alone[name], join(columns[name]):
            assert got.dtype == kind
            np.testing.assert_array_equal(got, v.astype(kind))
    assert list(catalogue.load(path, COMM, ["m"])[0]) == ["m"]
    assert not glob.glob(glob.escape(path) + ".*")
    COMM.Barrier()


@pytest.mark.parametrize("nmesh", [[4, 3, 5], [2, 4, 4], [7, 5, 11], [7, 6]], ids=str)
@pytest.mark.parametrize("np_", [None, "pencils"])
def test_fields(path, nmesh, np_, monkeypatch):
    monkeypatch.setattr(catalogue, "CHUNK", 40)
    layout = dict(np=[COMM.size, 1] if len(nmesh) == 3 and np_ else None)
    pm = ParticleMesh(nmesh, BoxSize=10.0, comm=COMM, **layout)
    values = np.random.default_rng(1).normal(size=nmesh)
    field = pm.create("real")
    field.value[...] = values[field.slices]
    catalogue.save(path, COMM, fields=dict(rho=field, square=field * field), dtype="f4")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["fields/rho"][...], values.astype("f4"))
    for comm in COMM, MPI.COMM_SELF:
        again = catalogue.load_field(path, "square", ParticleMesh(nmesh, BoxSize=10.0, comm=comm))
        np.testing.assert_allclose(again.value, values[again.slices] ** 2, rtol=1e-6)
    with pytest.raises(KeyError, match="no field 'none'"):
        catalogue.load_field(path, "none", pm)
    with pytest.raises(ValueError, match="expected the mesh"):
        catalogue.load_field(path, "rho", ParticleMesh([3] * len(nmesh), BoxSize=1.0, comm=COMM))
    COMM.Barrier()


def test_nothing_and_nobody(path):
    catalogue.save(path, COMM, dict(x=np.zeros((0, 3))))
    columns, attributes = catalogue.load(path, COMM)
    assert columns["x"].shape == (0, 3) and not attributes
    catalogue.save(path, COMM)
    assert catalogue.load(path, COMM) == ({}, {})
    COMM.Barrier()


def test_a_failure_on_one_rank_leaves_the_old_file(path, monkeypatch):
    whole, mine = rows()
    catalogue.save(path, COMM, dict(m=whole["m"][mine]))
    last = COMM.size - 1

    def fail(self, file, offset):
        if COMM.rank == last:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(catalogue.Block, "write", fail)
        with pytest.raises(OSError, match="No space"):
            catalogue.save(path, COMM, dict(m=whole["m"][mine] * 2))
    COMM.Barrier()
    np.testing.assert_array_equal(catalogue.load(path, MPI.COMM_SELF)[0]["m"], whole["m"])
    assert not glob.glob(glob.escape(path) + ".*")
    with pytest.raises(OSError):
        catalogue.save(os.path.join(path, "no", "folder"), COMM, dict(m=whole["m"][mine]))
    with pytest.raises(OSError):
        catalogue.load(path + ".none", COMM)
    with pytest.raises(KeyError, match="no column 'none'"):
        catalogue.load(path, COMM, ["none"])
    COMM.Barrier()


@pytest.mark.serial
def test_a_killed_write_leaves_the_old_file(tmp_path):
    program = """
        import os, sys, numpy
        from mpi4py import MPI
        from vmad_lit.lib import catalogue
        catalogue.save(sys.argv[1], MPI.COMM_SELF, dict(x=numpy.arange(5)))
        def die(self, file, offset):
            file.write(b"half"); file.flush(); os._exit(9)
        catalogue.Block.write = die
        catalogue.save(sys.argv[1], MPI.COMM_SELF, dict(x=numpy.arange(7)))
    """
    path = str(tmp_path / "file.hdf5")
    assert run_python(program, path).returncode == 9
    np.testing.assert_array_equal(catalogue.load(path, MPI.COMM_SELF)[0]["x"], np.arange(5))
    catalogue.save(path, MPI.COMM_SELF, dict(x=np.arange(9)))  # the rest of it is no obstacle
    np.testing.assert_array_equal(catalogue.load(path, MPI.COMM_SELF)[0]["x"], np.arange(9))


def test_bad_input_is_refused_on_all_ranks(path, monkeypatch):
    first = COMM.rank == 0
    bad = [
        (ValueError, "same number of rows", dict(x=np.zeros(3), y=np.zeros(4 if first else 3))),
        (ValueError, "array of numbers", dict(x=np.array(["a"] if first else [1.0]))),
        (ValueError, "row for each particle", dict(x=1.0 if first else np.zeros(1))),
    ]
    if COMM.size > 1:
        bad += [
            (ValueError, "same columns", dict(x=np.zeros(3, "f4" if first else "f8"))),
            (ValueError, "same columns", {"x" if first else "y": np.zeros(3)}),
            (ValueError, "same columns", dict(x=np.zeros((3, 2 if first else 3)))),
        ]
    for kind, message, columns in bad:
        with pytest.raises(kind, match=message):
            catalogue.save(path, COMM, columns)
    pm = ParticleMesh([4, 4, 4], BoxSize=1.0, comm=COMM)
    with pytest.raises(ValueError, match="must be a RealField"):
        catalogue.save(path, COMM, fields=dict(x=pm.create("complex", value=0)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        catalogue.chosen(np.arange(3), 1.5)
    if first:
        monkeypatch.setitem(sys.modules, "h5py", None)
    for function in catalogue.save, catalogue.load:
        with pytest.raises(ImportError, match=r"h5py .* pip install 'vmad_lit\[output\]'"):
            function(path, COMM)
    assert not os.path.exists(path)


@pytest.mark.serial
def test_a_subset_is_random_and_knows_no_ranks():
    ids = np.arange(100000)
    for fraction in 0, 0.1, 0.5, 1:
        chosen = catalogue.chosen(ids, fraction)
        assert abs(chosen.mean() - fraction) < 5 * (fraction * (1 - fraction) / len(ids)) ** 0.5 + 1e-9
    half = catalogue.chosen(ids, 0.5)
    assert abs(np.corrcoef(half[1:], half[:-1])[0, 1]) < 0.02
    assert abs(np.mean(catalogue.chosen(ids, 0.5, seed=1) == half) - 0.5) < 0.02
    assert (
        catalogue.chosen(ids, 0.1)[half].sum() == catalogue.chosen(ids, 0.1).sum()
    )  # the smaller subset is part of the larger


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("lattice", [None, [3, 4, 5]])
def test_snapshot(path, shift, lattice):
    pm = ParticleMesh([6, 5, 7], BoxSize=[30.0, 25.0, 20.0], comm=COMM)
    grid = pm if lattice is None else pm.reshape(lattice)
    q, ids = grid.generate_uniform_particle_grid(shift=shift, return_id=True)
    np.testing.assert_array_equal(catalogue.lattice_ids(q, grid.Nmesh, grid.BoxSize), ids)
    sim = FastPMSimulation([0.5, 0.8], MatterDominated(0.3), pm, q=q)
    dx, p = 9 * np.sin(q), np.cos(q)
    dx[:1] = pm.BoxSize * (1 - 1e-9) - q[:1]  # inside of the box, but not after rounding to single precision
    field = pm.paint(q, layout=pm.decompose(q))
    catalogue.save_snapshot(path, sim, dx, p, lattice=lattice, fields=dict(density=field), note="a test")
    columns, attributes = catalogue.load(path, MPI.COMM_SELF)
    n = int(np.prod(grid.Nmesh))
    order = np.argsort(columns["ID"])
    np.testing.assert_array_equal(columns["ID"][order], np.arange(n))
    assert (
        columns["Position"].dtype == np.float32
        and (columns["Position"] < pm.BoxSize).all()
        and (columns["Position"] >= 0).all()
    )
    whole = join(np.column_stack([ids, (q + dx) % pm.BoxSize, p * 100 / 0.8]))
    whole = whole[np.argsort(whole[:, 0])]
    gap = abs(columns["Position"][order] - whole[:, 1:4])
    assert (np.minimum(gap, pm.BoxSize - gap) < 1e-5).all()
    np.testing.assert_allclose(columns["Velocity"][order], whole[:, 4:], rtol=1e-6, atol=1e-5)
    assert (
        attributes["ScaleFactor"] == 0.8 and attributes["Particles"] == n and attributes["note"] == "a test"
    )
    assert attributes["UnitLength"] == "Mpc/h" and attributes["BoxSize"].tolist() == [30, 25, 20]
    catalogue.save_snapshot(path, sim, dx, p, lattice=lattice, fraction=0.3)
    np.testing.assert_array_equal(
        np.sort(catalogue.load(path, MPI.COMM_SELF)[0]["ID"]),
        np.flatnonzero(catalogue.chosen(np.arange(n), 0.3)),
    )
    COMM.Barrier()
