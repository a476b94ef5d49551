"""Files that a run leaves behind and goes on from: whole or not there, of the right problem, and refused if they are damaged."""

import json
import os
import shutil
import stat
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest
from mpi4py import MPI

from helpers import split
from vmad_lit.contrib.optimize import (
    LBFGS,
    GradientDescent,
    Preconditioner,
    Problem,
    State,
    StateError,
    StrongWolfe,
    autosave,
)
from vmad_lit.contrib.vectorspace import ProductSpace, VectorSpace, real_inner_product
from vmad_lit.lib import files
from vmad_lit.lib.fingerprint import differences, fingerprint
from vmad_lit.lib.shards import save_parts, shard_name

COMM = MPI.COMM_WORLD


def on_one(action):
    """Do something on rank 0, while the others wait."""
    if COMM.rank == 0:
        action()
    COMM.Barrier()


# -- Whole or not at all ------------------------------------------------------------------------------------------


def write(path, text, mode=0o666):
    with files.replacing(path, mode) as file:
        file.write(text.encode())


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "new", "text")
        (tmp_path / "ordinary").write_text("text")
        write(tmp_path / "private", "text", 0o600)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "ordinary", "private")]
    assert modes == [0o640, 0o640, 0o600]


def test_nothing_is_written_through_a_link(tmp_path):
    """Links with all names that could be guessed stay, and so does what they lead to; one in the place is replaced."""
    victim, path = tmp_path / "victim", tmp_path / "new"
    victim.write_text("of somebody else")
    for ending in "", ".tmp", ".partial", ".part", "~":
        (tmp_path / f"new{ending}").symlink_to(victim)
    write(path, "text")
    assert victim.read_text() == "of somebody else"
    assert path.read_text() == "text" and not path.is_symlink()
    assert all((tmp_path / f"new{ending}").is_symlink() for ending in (".tmp", ".partial", ".part", "~"))


def test_a_draft_is_new_and_ours(tmp_path, monkeypatch):
    """If its name was there already, even as a link that leads nowhere, it is an error."""
    monkeypatch.setattr(os, "urandom", lambda n: b"\0" * n)
    (tmp_path / f"new.{'00' * 8}.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write(tmp_path / "new", "text")
    assert len(os.listdir(tmp_path)) == 1


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "new", "old text")
    for error in OSError, KeyboardInterrupt:
        with pytest.raises(error), files.replacing(tmp_path / "new") as file:
            file.write(b"half of")
            raise error
    assert os.listdir(tmp_path) == ["new"] and (tmp_path / "new").read_text() == "old text"


@pytest.mark.parametrize(
    "place, error",
    [
        ("nowhere/new", FileNotFoundError),
        ("", IsADirectoryError),
        ("folder", IsADirectoryError),
        ("pipe", OSError),
    ],
)
def test_a_place_that_is_none(tmp_path, place, error):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for attempt in files.try_out, lambda path: write(path, "text"):
        with pytest.raises(error):
            attempt(os.path.join(tmp_path, place))
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"] and stat.S_ISFIFO(
        (tmp_path / "pipe").stat().st_mode
    )


def test_what_killed_processes_have_left_goes_and_nothing_else(tmp_path):
    write(tmp_path / "s.npz", "a file, for the time")
    now = (tmp_path / "s.npz").stat().st_mtime
    left = [f"s.npz.{i:016x}.part" for i in range(3)]
    others = [
        "s.npz.notes.part",
        "s.npz.00.part",
        "t.npz.0123456789abcdef.part",
        "s.npz.0123456789abcdef.part.txt",
    ]
    for name in left + others:
        (tmp_path / name).write_text("text")
        os.utime(tmp_path / name, (now - 7200,) * 2)
    os.utime(tmp_path / left[0], (now - 60,) * 2)  # somebody is at work
    write(tmp_path / "s.npz", "anew")
    assert sorted(os.listdir(tmp_path)) == sorted(["s.npz", left[0], *others])


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    write(tmp_path / ("ä" * 120), "text")
    assert len(os.listdir(tmp_path)) == 1


# -- A full disk --------------------------------------------------------------------------------------------------


@contextmanager
def no_file_longer_than(size):
    """As if the disk were full: a file cannot grow beyond a size."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def writers(folder):
    """What writes large files: by name, the file, and a function."""
    cosmo4d = pytest.importorskip("vmad_lit.contrib.cosmo4d")
    from vmad_lit.lib import catalogue
    from vmad_lit.lib.fastpm import ParticleMesh

    pm = ParticleMesh(Nmesh=[16] * 3, BoxSize=16.0, comm=COMM, dtype="f8")
    field = pm.create(type="real", value=1.5)
    state = LBFGS(maxiter=1).minimize(parabola(3000), np.ones(3000))
    return {
        "state.npz": lambda path: state.save(path),
        "field.npy": lambda path: cosmo4d.save_field(path, field),
        "field.hdf5": lambda path: catalogue.save(path, COMM, fields={"density": field}),
    }


@pytest.mark.collective
def test_a_full_disk_is_an_error_on_all_ranks(folder):
    for name, save in writers(folder).items():
        path = os.path.join(folder, name)
        if name.endswith("hdf5"):
            pytest.importorskip("h5py")
        save(path)
        before = contents(folder)
        with no_file_longer_than(12000), pytest.raises(OSError):
            save(path)
        COMM.Barrier()
        now = contents(folder)
        assert {key: now[key] for key in before} == before  # and the parts of an unfinished generation
        assert not [key for key in now if key.endswith((".part", ".partial", ".tmp"))]
        save(path)
        COMM.Barrier()


def contents(folder):
    """The files of a folder with what is in them, the same on all ranks."""
    found = {}
    if COMM.rank == 0:
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "rb") as file:
                found[name] = file.read()
    return COMM.bcast(found)


@pytest.mark.serial
def test_a_disk_that_is_really_full(tmp_path):
    """In a file system of its own, which has room for one field and not for two."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        cosmo4d = pytest.importorskip("vmad_lit.contrib.cosmo4d")
        from vmad_lit.lib.fastpm import ParticleMesh

        pm = ParticleMesh(Nmesh=[16] * 3, BoxSize=16.0, comm=COMM, dtype="f8")
        cosmo4d.save_field(os.path.join(tmp_path, "a.npy"), pm.create(type="real", value=1.0))
        with pytest.raises(OSError, match="No space left"):
            cosmo4d.save_field(os.path.join(tmp_path, "b.npy"), pm.create(type="real", value=2.0))
        assert os.listdir(tmp_path) == ["a.npy"] and np.load(tmp_path / "a.npy").sum() == 16**3
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# -- Parts of ranks -----------------------------------------------------------------------------------------------


def distributed(comm=COMM):
    return VectorSpace(dot=lambda a, b: comm.allreduce(real_inner_product(a, b)), comm=comm)


def parabola(n, vs=None, centre=2.0):
    vs = vs or distributed()
    return Problem(lambda x: vs.dot(x - centre, x - centre) + 1.0, lambda x: 2 * (x - centre), vs=vs)


@pytest.mark.collective
def test_parts_are_removed_by_their_exact_names(folder):
    path = os.path.join(folder, "s.npz")
    mine = [
        "s.npz.rank1.notes.txt",
        "s.npz.rank1.a.npz.bak",
        "s.npz.rank1.c.npz",
        "s.npz.rank0.a.npz",
        "s.npz.rank0.b.npz",
    ]

    def leave():
        for name in mine:
            with open(os.path.join(folder, name), "w") as file:
                file.write("of the user")

    on_one(leave)
    state = LBFGS(maxiter=2).minimize(parabola(3), np.ones(3))
    for _ in range(3):
        state.save(path)
        COMM.Barrier()
    names = sorted(contents(folder))
    assert set(mine) <= set(names) and len(names) == len(mine) + COMM.size
    assert all(contents(folder)[name] == b"of the user" for name in mine)


@pytest.mark.collective
def test_a_state_goes_on_on_another_number_of_ranks(folder):
    """Written by all, read by one; written by one, read by all: rows, fields of both kinds, and numbers beside them."""
    pm_of = pytest.importorskip("pmesh.pm").ParticleMesh
    from vmad_lit.contrib.vectorspace import FieldSpace

    rows = np.arange(40.0).reshape(20, 2)
    vectors = {}
    for comm, mine in (COMM, split(rows)), (MPI.COMM_SELF, rows):
        pm = pm_of(Nmesh=[5, 6, 4], BoxSize=4.0, comm=comm)
        noise = pm.generate_whitenoise(3, type="real")
        vector = {"rows": mine, "real": noise, "modes": noise.r2c(), "one": 3.5}
        spaces = {
            "rows": distributed(comm),
            "real": FieldSpace(comm),
            "modes": FieldSpace(comm),
            "one": VectorSpace(),
        }
        vectors[comm is COMM] = vector, ProductSpace(spaces)
    for writing, reading, name in (COMM, MPI.COMM_SELF, "all.npz"), (MPI.COMM_SELF, COMM, f"{COMM.rank}.npz"):
        vector, vs = vectors[writing is COMM]
        problem = Problem(lambda x, vs=vs: vs.dot(x, x), lambda x, vs=vs: vs.scale(2.0, x), vs=vs)
        saved = LBFGS(maxiter=0).minimize(problem, vector)
        saved.save(os.path.join(folder, name))
        COMM.Barrier()
        like, vs = vectors[reading is COMM]
        loaded = State.load(
            os.path.join(folder, "all.npz" if reading is MPI.COMM_SELF else "0.npz"), vs, vs.zeros_like(like)
        )
        assert loaded.nit == 0 and loaded.x["one"] == 3.5
        for key in "rows", "real", "modes":
            a, b = (getattr(v[key], "value", v[key]) for v in (loaded.x, like))
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        COMM.Barrier()


@pytest.mark.collective
def test_ranks_must_save_the_same_arrays(folder):
    if COMM.size == 1:
        pytest.skip("needs two ranks")
    arrays = {f"a{COMM.rank}": np.ones(3)}
    with pytest.raises(ValueError, match="the same arrays"):
        save_parts(os.path.join(folder, "s"), COMM, {}, arrays, dict.fromkeys(arrays))


# -- Damaged states -----------------------------------------------------------------------------------------------


def reheader(change):
    """Damage of the header: a change of the dictionary."""

    def damage(path):
        with np.load(path) as file:
            arrays = dict(file)
        header = json.loads(arrays["state"].item())
        header = change(header) or header
        arrays["state"] = np.array(header if isinstance(header, str) else json.dumps(header))
        np.savez(path, **arrays)

    return damage


def rearray(**change):
    """Damage of the arrays: a function for each by its name, with `_` for `:`; None removes it."""

    def damage(path):
        with np.load(path) as file:
            arrays = dict(file)
        for name, function in change.items():
            array = arrays.pop(name.replace("_", ":"))
            if function is not None:
                arrays[name.replace("_", ":")] = function(array)
        np.savez(path, **arrays)

    return damage


def cut(share):
    def damage(path):
        with open(path, "r+b") as file:
            file.truncate(int(share * os.path.getsize(path)))

    return damage


def replace(make):
    def damage(path):
        os.remove(path)
        make(path)

    return damage


def text(path):
    with open(path, "w") as file:
        file.write("nit = 3\n")


def flip(path):
    """One bit of the point."""
    with open(path, "r+b") as file:
        raw = bytearray(file.read())
        place = raw.index(np.array([2.5, 2.5]).tobytes())
        raw[place] ^= 1
        file.seek(0)
        file.write(raw)


def spoil(index, value):
    def function(array):
        array = np.array(array)
        array[index] = value
        return array

    return function


DAMAGE = {
    "cut in half": cut(0.5),
    "without its end": cut(0.98),
    "empty": cut(0),
    "text": text,
    "one bit": flip,
    "npy": replace(lambda path: np.save(open(path, "wb"), np.ones(3))),
    "pickle": replace(lambda path: np.save(open(path, "wb"), np.array({}, object), allow_pickle=True)),
    "other npz": replace(lambda path: np.savez(path, density=np.ones(3))),
    "a header that is no JSON": reheader(lambda h: "{nit: 3}"),
    "a header that is a list": reheader(lambda h: [1]),
    "an older format": reheader(lambda h: h.update(format=1)),
    "no ranks": reheader(lambda h: h.pop("ranks") and None),
    "layouts that are none": reheader(lambda h: h.update(layouts={"places": 3, "of": []})),
    "whole numbers": rearray(x_0=lambda a: a.astype(int)),
    "single precision": rearray(x_0=lambda a: a.astype("f4")),
    "complex": rearray(g_0=lambda a: a + 0j),
    "texts": rearray(x_0=lambda a: a.astype(str)),
    "NaN": rearray(x_0=spoil(1, np.nan)),
    "infinity": rearray(g_0=spoil(0, np.inf)),
    "too short": rearray(x_0=lambda a: a[1:]),
    "without a gradient": rearray(g_0=None),
    "another point": rearray(x_0=lambda a: a * 1.5),
    "a negative count": reheader(lambda h: h["plain"].update(nit=-1)),
    "a count that is none": reheader(lambda h: h["plain"].update(fev=2.5)),
    "no gradient norm": reheader(lambda h: h["plain"].pop("gnorm") and None),
    "an objective that is none": reheader(lambda h: h["plain"].update(y=float("nan"))),
    "a method for an attribute": reheader(lambda h: h["plain"].update(save=1)),
    "a history of nothing": reheader(lambda h: h.update(history=[{}])),
    "a history of another run": reheader(lambda h: h["plain"].update(nit=77)),
    "a memory that is too long": reheader(lambda h: h["memory"].update(S=100)),
    "a memory that is none": reheader(lambda h: h["memory"].update(S="many")),
    "a folder": replace(os.mkdir),
    "a pipe": replace(os.mkfifo),
    "a link to nothing": replace(lambda path: os.symlink("nothing", path)),
    "unreadable": lambda path: os.chmod(path, 0),
}


@pytest.mark.collective
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_one_error_on_all_ranks(name, folder):
    if name == "unreadable" and os.getuid() == 0:
        pytest.skip("an administrator may read everything")
    path, problem = os.path.join(folder, "s.npz"), parabola(2)
    x0 = np.full(2, 2.5)
    LBFGS(maxiter=0).minimize(problem, x0, monitor=autosave(path))
    COMM.Barrier()
    assert State.load(path, problem.vs, x0).nit == 0
    COMM.Barrier()
    on_one(lambda: DAMAGE[name](path))
    before = look(path)
    with pytest.raises(StateError) as error:
        LBFGS().minimize(problem, x0, state=State.resume(path, problem.vs, x0), monitor=autosave(path))
    assert path in str(error.value) and len(str(error.value)) < 1000
    COMM.Barrier()
    assert look(path) == before


def look(path):
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        return os.path.lexists(path)
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.collective
@pytest.mark.parametrize(
    "damage", ["missing", "of another save", "of another rank", "cut", "NaN", "a folder"]
)
def test_damaged_parts(damage, folder):
    if COMM.size == 1:
        pytest.skip("needs two ranks")
    path, problem, x0 = os.path.join(folder, "s.npz"), parabola(2), np.full(2, 2.5)
    state = LBFGS(maxiter=0).minimize(problem, x0)
    for name in "other.npz", "s.npz":
        state.save(os.path.join(folder, name))
    part = shard_name(path, COMM.size - 1, "a")

    def spoil_part():
        if damage == "missing":
            os.remove(part)
        elif damage == "of another save":
            shutil.copy(shard_name(os.path.join(folder, "other.npz"), COMM.size - 1, "a"), part)
        elif damage == "of another rank":
            relabel = json.dumps({**json.loads(np.load(part)["part"].item()), "rank": 7})
            np.savez(part, **{**np.load(part), "part": np.array(relabel)})
        elif damage == "cut":
            cut(0.5)(part)
        elif damage == "NaN":
            rearray(x_0=spoil(0, np.nan))(part)
        else:
            replace(os.mkdir)(part)

    COMM.Barrier()
    on_one(spoil_part)
    with pytest.raises(StateError, match=f"rank{COMM.size - 1}"):
        State.load(path, problem.vs, x0)


# -- Another problem ----------------------------------------------------------------------------------------------

BASE = dict(
    n=4,
    box=16.0,
    stages=(1.0,),
    seed=3,
    sigma=0.5,
    smoothing=0.0,
    dtype="f8",
    Om0=None,
    bias=1.0,
    masked=0,
    cell=0.0,
)
#: Other configurations, and the names under which the difference is told.
OTHERS = {
    "seed": (dict(seed=4), "residuals[0].d"),
    "noise": (dict(sigma=0.4), "residuals[0].invN"),
    "mesh": (dict(n=5), "forward.pm"),
    "box": (dict(box=20.0), "forward.pm.box"),
    "steps": (dict(stages=(0.5, 1.0)), "forward.stages"),
    "model": (dict(stages=()), "forward.stages"),
    "cosmology": (dict(Om0=0.25), "forward.cosmology.Om0"),
    "smoothing": (dict(smoothing=3.0), "residuals[0]"),
    "precision": (dict(dtype="f4"), "forward.pm.dtype"),
    "bias": (dict(bias=1.5), "forward.bias"),
    "mask": (dict(masked=5), "residuals[0].invN"),
    "data": (dict(cell=1e-3), "residuals[0].d"),
}
OPTIMISERS = {
    "optimiser": (GradientDescent(maxiter=4), "optimiser.name"),
    "memory": (LBFGS(maxiter=4, m=3), "optimiser.m"),
    "line search": (LBFGS(maxiter=4, linesearch=StrongWolfe(c2=0.5)), "optimiser.linesearch.c2"),
}


def configured(comm=COMM, **changes):
    """A reconstruction whose forward model has a bias, on a small mesh."""
    cosmo4d = pytest.importorskip("vmad_lit.contrib.cosmo4d")
    from vmad_lit import autooperator
    from vmad_lit.lib.cosmology import Cosmology, LinearPower, Planck15
    from vmad_lit.lib.fastpm import ParticleMesh

    @autooperator("x -> s, fs")
    def Biased(x, power, q, stages, cosmology, pm, bias):
        s, fs = cosmo4d.WhiteNoiseOperator(x, power, q, stages, cosmology, pm)
        return dict(s=s, fs=(fs - 1.0) * bias + 1.0)

    c = BASE | changes
    pm = ParticleMesh(Nmesh=[c["n"]] * 3, BoxSize=c["box"], comm=comm, dtype=c["dtype"])
    cosmology = Planck15 if c["Om0"] is None else Cosmology(Om0=c["Om0"])
    q = pm.generate_uniform_particle_grid(shift=0.5)
    forward = Biased.bind(
        power=LinearPower(Planck15), q=q, stages=list(c["stages"]), cosmology=cosmology, pm=pm, bias=c["bias"]
    )
    data = cosmo4d.Data.synthetic(pm, forward, c["sigma"], c["seed"])
    if c["cell"] and comm.rank == 0:
        data.d.value[0, 0, 0] += c["cell"]
    problem = cosmo4d.reconstruction_problem(forward, data, c["smoothing"])
    if c["masked"]:
        invN = pm.create(type="real", value=c["sigma"] ** -2)
        invN[...] = np.where(sum(i for i in invN.i) < c["masked"], 0.0, invN.value)
        residuals = [cosmo4d.NLResidualOperator.bind(d=data.d, invN=invN), cosmo4d.WhitePriorOperator]
        problem = cosmo4d.ChiSquareProblem(comm, forward, residuals)
    return problem, pm.create(type="real", value=0)


@pytest.fixture
def saved(folder):
    path = os.path.join(folder, "s.npz")
    problem, start = configured()
    LBFGS(maxiter=2).minimize(problem, start).save(path)
    return path


def refusals(path, problem, start, optimizer):
    """What is told where a state is loaded, and where it is used."""
    with pytest.raises(StateError) as error:
        optimizer.minimize(problem, start, state=State.resume(path, problem.vs, start, problem))
    return str(error.value)


@pytest.mark.collective
@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_problem_is_refused_by_name(name, saved):
    changes, told = OTHERS[name]
    problem, start = configured(**changes)
    message = refusals(saved, problem, start, LBFGS(maxiter=4))
    assert f"\n  problem.{told}" in message and " before, " in message and " now" in message, message
    if name in ("mesh", "precision"):  # nothing fits, or not without a change of type
        return
    state = State.load(saved, problem.vs, start, problem, accept=True)
    state = LBFGS(maxiter=4).minimize(problem, state=state, accept=["problem"])
    assert state.nit == 4 and state.y == pytest.approx(problem.objective(state.x))
    slope = problem.vs.norm(problem.gradient(state.x))
    assert state.gnorm == pytest.approx(slope)


@pytest.mark.collective
def test_a_state_of_other_options_or_versions_is_refused_by_name(saved, monkeypatch):
    from vmad_lit.contrib import optimize

    problem, start = configured()
    for name, (optimizer, told) in OPTIMISERS.items():
        message = refusals(saved, problem, start, optimizer)
        assert f"\n  {told}: " in message, (name, message)
        state = State.load(saved, problem.vs, start)
        assert optimizer.minimize(problem, state=state, accept="optimiser").nit == 4
    monkeypatch.setattr(optimize, "__version__", "0.0.9")
    assert "\n  versions.vmad_lit: '0.1.0' before, '0.0.9' now" in refusals(saved, problem, start, LBFGS())


@pytest.mark.collective
def test_the_same_problem_is_accepted_whatever_the_number_of_ranks(saved):
    """With another limit and another tolerance, for these are what one resumes for."""
    for comm in COMM, MPI.COMM_SELF:
        problem, start = configured(comm)
        whole = LBFGS(maxiter=4).minimize(problem, start)
        problem, start = configured(comm)
        state = State.resume(saved, problem.vs, start, problem)
        state = LBFGS(maxiter=4, gtol=1e-5).minimize(problem, state=state)
        assert state.nit == 4 and state.y == pytest.approx(whole.y, rel=1e-9)
        if comm is COMM:
            np.testing.assert_array_equal(state.x.value, whole.x.value)
        COMM.Barrier()


@pytest.mark.collective
def test_a_problem_without_names_is_known_by_its_value(folder):
    path, x0 = os.path.join(folder, "s.npz"), np.linspace(0.0, 1.0, 3 + COMM.rank)
    LBFGS(maxiter=1).minimize(parabola(3), x0).save(path)
    other = parabola(3, centre=2.0001)
    with pytest.raises(StateError, match="the objective at its point was"):
        LBFGS().minimize(other, state=State.load(path, other.vs, x0))
    state = LBFGS().minimize(other, state=State.load(path, other.vs, x0), accept=["problem"])
    np.testing.assert_allclose(state.x, 2.0001, rtol=1e-6)
    named = Problem(other._objective, other._gradient, vs=other.vs, identity={"centre": 2.0001})
    with pytest.raises(StateError, match="problem.centre: nothing before, 2.0001 now"):
        State.load(path, other.vs, x0, problem=named)


@pytest.mark.collective
def test_in_the_program_that_has_it_a_state_may_go_to_another_optimiser(folder):
    problem, x0 = parabola(3), np.linspace(0.0, 1.0, 3 + COMM.rank)
    state = GradientDescent(maxiter=1).minimize(problem, x0)
    state = LBFGS(m=2).minimize(problem, state=state)
    assert state.converged and state.optimizer == "LBFGS"
    with pytest.raises(StateError, match="belongs to another problem"):
        LBFGS().minimize(parabola(3, centre=5.0), state=state)


@pytest.mark.collective
def test_a_state_whose_own_variables_are_of_another_kind(folder):
    """Modes that are optimised as a field: the vectors of the memory are fields, and are found again."""
    cosmo4d = pytest.importorskip("vmad_lit.contrib.cosmo4d")
    from vmad_lit.lib.fastpm import ParticleMesh

    pm = ParticleMesh(Nmesh=[4] * 3, BoxSize=4.0, comm=COMM, dtype="f8")
    vs, path = cosmo4d.FastPMVectorSpace(COMM), os.path.join(folder, "s.npz")
    target, start = pm.generate_whitenoise(3, type="complex"), pm.create(type="complex", value=0)

    def make():
        scale = {"real": Preconditioner(cosmo4d.to_real, cosmo4d.to_modes)}["real"]

        def off(x):
            return vs.addmul(x, target, -1)

        def value(x):
            return vs.dot(off(x), off(x)) ** 2

        def slope(x):
            return vs.scale(4 * vs.dot(off(x), off(x)), off(x))

        return Problem(value, slope, vs=vs, preconditioner=scale)

    whole = LBFGS(maxiter=6).minimize(make(), start)
    LBFGS(maxiter=3).minimize(make(), start).save(path)
    problem = make()
    state = LBFGS(maxiter=6).minimize(problem, state=State.load(path, vs, start, problem))
    np.testing.assert_array_equal(state.x.value, whole.x.value)


# -- Fingerprints -------------------------------------------------------------------------------------------------


@pytest.mark.collective
def test_fingerprints_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(2)
    for whole in (
        rng.normal(size=40),
        rng.normal(size=(30, 3)),
        rng.normal(size=(12, 2, 3)),
        rng.normal(size=8) + 1j,
    ):
        alone = fingerprint({"a": whole})
        assert differences(alone, fingerprint({"a": split(whole)}, COMM)) == {}
        assert differences(alone, fingerprint({"a": whole}, COMM)) == {}  # the same on all ranks
        changed = whole.copy()
        changed[3] += 1e-7
        assert list(differences(alone, fingerprint({"a": split(changed)}, COMM))) == ["a"]
        assert differences(alone, fingerprint({"a": split(whole * (1 + 1e-14))}, COMM)) == {}
    equal = np.ones(2 * COMM.size)
    assert differences(fingerprint(equal), fingerprint(np.ones(2), COMM)) == {}
    if COMM.size > 1:
        with pytest.raises(ValueError, match="different problems"):
            fingerprint([np.ones(2)] * (1 + COMM.rank), COMM)


def test_fingerprints_of_functions_and_objects():
    class Thing:
        def __init__(self, size, hidden=0):
            self.size, self._hidden = size, hidden

        def double(self):
            return 2 * self.size

    def make(power, scale=2.0):
        return lambda x, shift=scale: x**power + shift

    same = fingerprint([make(2), Thing(3).double, Thing(3, 1), {"kind": Thing, "number": 1 + 2j}])
    assert (
        differences(
            same, fingerprint([make(2), Thing(3).double, Thing(3, 2), {"kind": Thing, "number": 1 + 2j}])
        )
        == {}
    )
    told = differences(
        same, fingerprint([make(3, 4.0), Thing(4).double, Thing(3), {"kind": Thing, "number": 1}])
    )
    assert set(told) == {"[0].power", "[0].default0", "[1].self.size", "[3].number"}
    assert told["[1].self.size"] == ("3", "4")
    assert list(differences(fingerprint(make(2)), fingerprint(lambda x: x))) != []
    json.dumps(same)


# -- The demonstration --------------------------------------------------------------------------------------------


@pytest.mark.collective
def test_the_demonstration_looks_at_its_outputs_before_it_begins(folder):
    from test_reconstruction import run_demo

    def make():
        os.mkdir(os.path.join(folder, "fields"))
        os.mkdir(os.path.join(folder, "fields", "final.npy"))
        os.mkdir(os.path.join(folder, "folder.npz"))
        text(os.path.join(folder, "file"))

    on_one(make)
    for option, place in ("--save", "fields"), ("--save", "file"), ("--state", "folder.npz"):
        status, said = run_demo(folder, "--nmesh", 512, option, os.path.join(folder, place))
        assert status == 2 and "error: cannot write to" in said and place in said, said


@pytest.mark.collective
def test_the_demonstration_refuses_a_state_of_other_options(folder):
    from test_reconstruction import run_demo

    state = os.path.join(folder, "s.npz")
    common = ["--nmesh", 4, "--steps", 0, "--state", state]
    run_demo(folder, *common, "--maxiter", 2)
    before = contents(folder)
    for option, value, name in (
        ("seed", 5, "data.seed"),
        ("noise", 0.3, "noise.sigma"),
        ("boxsize", 20, "mesh.box"),
        ("smoothing", 2, "data.smoothing"),
        ("nmesh", 5, "mesh.cells"),
        ("steps", 1, "model.evolution"),
    ):
        status, said = run_demo(folder, *common, "--maxiter", 3, f"--{option}", value)
        assert status == 2 and f"\n  problem.{name}: " in said and "--accept-changes" in said, said
    assert contents(folder) == before
    status, said = run_demo(folder, *common, "--maxiter", 3, "--seed", 5, "--accept-changes")
    assert status == 0 and "going on from iteration 2" in said
