"""The reconstruction and its program, on any number of ranks."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pmesh")

from mpi4py import MPI  # noqa: E402

from vmad_lit import demo  # noqa: E402
from vmad_lit.contrib import cosmo4d  # noqa: E402
from vmad_lit.contrib.optimize import LBFGS  # noqa: E402
from vmad_lit.lib.cosmology import LinearPower, Planck15  # noqa: E402
from vmad_lit.lib.fastpm import ParticleMesh  # noqa: E402
from vmad_lit.lib.spectra import Shells  # noqa: E402

pytestmark = pytest.mark.collective

comm = MPI.COMM_WORLD
power = LinearPower(Planck15)


def mesh(n=8, comm=comm, box=None):
    return ParticleMesh(Nmesh=[n] * 3, BoxSize=box or 4.0 * n, comm=comm, dtype="f8")


def forward_on(pm, stages):
    q = pm.generate_uniform_particle_grid(shift=0.5)
    return cosmo4d.WhiteNoiseOperator.bind(power=power, q=q, stages=stages, cosmology=Planck15, pm=pm)


def everywhere(field):
    """The whole mesh as an array, on every rank."""
    whole = np.zeros(tuple(map(int, field.Nmesh)))
    whole[field.slices] = field.value
    return field.pm.comm.allreduce(whole)


def test_white_noise_has_unit_variance_and_does_not_know_ranks():
    a = cosmo4d.white_noise(mesh(16), 3)
    assert abs(a.cnorm() / 16**3 - 1) < 0.1
    b = cosmo4d.white_noise(mesh(16, MPI.COMM_SELF), 3)
    np.testing.assert_allclose(everywhere(a), b.value, atol=1e-12)


def test_linear_modes_have_the_power():
    pm = mesh(32, box=200.0)
    shells = Shells(pm, edges=np.linspace(0.03, 0.5, 6))
    measured = 0
    for seed in range(4):
        modes = cosmo4d.linear_modes.build(power=power, pm=pm).compute(
            "modes", dict(x=cosmo4d.white_noise(pm, seed))
        )
        measured = measured + shells.power(modes) / 4
    # A shell of n independent modes scatters by sqrt(2/n) around its mean.
    assert (abs(measured / power(shells.k) - 1) < 5 * (2 / (4 * shells.counts)) ** 0.5 + 0.05).all()


def test_shells_count_every_mode_once():
    pm = mesh(6)
    shells = Shells(pm, edges=[-1, 1e9])
    assert shells.counts.sum() == 6**3
    a, b = (cosmo4d.white_noise(pm, seed) for seed in (1, 2))
    volume = pm.BoxSize.prod()
    np.testing.assert_allclose(shells.power(a, b)[0], volume * a.cdot(b) / 6.0**6, rtol=1e-10)
    r, t = shells.compare(a * 3.0, a)
    np.testing.assert_allclose([r[0], t[0]], [1, 3])


@pytest.mark.parametrize("stages", [[], [1.0], [0.1, 1.0]], ids=["linear", "lpt", "nbody"])
def test_gradient_by_taylor(stages):
    pm = mesh(8)
    model = forward_on(pm, stages).build()
    x, v = cosmo4d.white_noise(pm, 1), cosmo4d.white_noise(pm, 2)
    w = cosmo4d.white_noise(pm, 3)
    [fs], [_x] = model.compute_with_vjp(dict(x=x), dict(_fs=w))
    slope = _x.cdot(v)
    fs, fs_ = model.compute_with_jvp("fs", dict(x=x), dict(x_=v))
    np.testing.assert_allclose(fs_.cdot(w), slope, rtol=1e-8)
    eps = 1e-6  # small, since windows have kinks where particles cross between cells
    up, down = (model.compute("fs", dict(x=x + v * e)).cdot(w) for e in (eps, -eps))
    np.testing.assert_allclose((up - down) / (2 * eps), slope, rtol=1e-4)


def test_residuals_agree_with_their_formulas():
    pm = mesh(8)
    x, d = cosmo4d.white_noise(pm, 1), cosmo4d.white_noise(pm, 2) + 1.0
    modes = cosmo4d.linear_modes.build(power=power, pm=pm).compute("modes", dict(x=x))
    fs = modes.c2r() + 1.0
    init = dict(s=modes, fs=fs)
    y = cosmo4d.NLResidualOperator.build(d=d, invN=4.0).compute("y", init)
    np.testing.assert_allclose(y.value, 2 * (fs.value - d.value))
    smooth = cosmo4d.SmoothedNLResidualOperator.build(d=d, invN=1.0, scale=0.0).compute("y", init)
    np.testing.assert_allclose(smooth.value, fs.value - d.value, atol=1e-12)
    y = cosmo4d.LNResidualOperator.build(d=d, invN=1.0).compute("y", dict(s=modes, fs=d * 0.0 + 1.0))
    np.testing.assert_allclose(y.value, np.log(1.1) - np.log(0.1 + np.maximum(d.value, 0)))
    y = cosmo4d.PriorOperator.build(power=power, pm=pm).compute("y", init)
    np.testing.assert_allclose(y.cnorm(), x.cnorm() - (x.csum() / 8**3) ** 2 * 8**3, rtol=1e-8)


def test_both_preconditioners_end_at_the_same_modes():
    pm = mesh(8)
    d = (
        cosmo4d.linear_modes.build(power=power, pm=pm)
        .compute("modes", dict(x=cosmo4d.white_noise(pm, 1)))
        .c2r()
        + 1.0
    )
    q = pm.generate_uniform_particle_grid(shift=0.5)
    forward = cosmo4d.FastPMOperator.bind(q=q, stages=[], cosmology=Planck15, pm=pm)
    found = []
    for kind in "complex", "real":
        residuals = [
            cosmo4d.NLResidualOperator.bind(d=d, invN=1.0),
            cosmo4d.PriorOperator.bind(power=power, pm=pm),
        ]
        problem = cosmo4d.ChiSquareProblem(comm, forward, residuals)
        problem.set_preconditioner(kind)
        state = LBFGS(maxiter=200, gtol=1e-9).minimize(problem, pm.create(type="complex", value=0))
        assert state.converged, state.message
        found.append(state.x.c2r().value)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    with pytest.raises(ValueError, match="complex"):
        problem.set_preconditioner("nothing")


def test_reconstruction_does_not_know_ranks():
    found = []
    for c in comm, MPI.COMM_SELF:
        pm = mesh(8, c)
        forward = forward_on(pm, [0.1, 1.0])
        data = cosmo4d.Data.synthetic(pm, forward, 0.5, 7)
        state = cosmo4d.reconstruct(forward, data, LBFGS(maxiter=8))
        found.append((state.y, everywhere(state.x)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)


def test_data_survive_a_journey_to_disk(folder):
    pm = mesh(8)
    data = cosmo4d.Data.synthetic(pm, forward_on(pm, []), 0.5, 7)
    data.save(os.path.join(folder, "data"))
    back = cosmo4d.Data.load(os.path.join(folder, "data"), comm, dtype="f8")
    assert back.sigma == data.sigma
    for name in "d", "truth", "clean":
        np.testing.assert_array_equal(getattr(back, name).value, getattr(data, name).value)
    assert not [name for name in os.listdir(os.path.join(folder, "data")) if "partial" in name]
    with pytest.raises(ValueError, match="expected the mesh"):
        cosmo4d.load_field(os.path.join(folder, "data", "d.npy"), mesh(6))


def run_demo(folder, *args):
    """The program, in this process and on all ranks, with its output of rank 0."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = demo.main([*map(str, args), "--quiet", "--output", os.path.join(folder, "picture.png")])
    return status, comm.bcast(out.getvalue())


SMALL = ["--nmesh", 8, "--steps", 1]


def test_demo_makes_a_picture_and_prints_the_correlation(folder):
    status, text = run_demo(folder, *SMALL, "--maxiter", 5, "--save", os.path.join(folder, "fields"))
    assert status == 0
    assert "initial modes, against the truth" in text and "r(k)" in text
    if comm.rank == 0:
        assert open(os.path.join(folder, "picture.png"), "rb").read(4) == b"\x89PNG"
        assert np.load(os.path.join(folder, "fields", "white_noise.npy")).shape == (8, 8, 8)


def test_demo_goes_on_where_it_was_stopped(folder):
    state = os.path.join(folder, "state.npz")
    _, whole = run_demo(folder, *SMALL, "--maxiter", 12)
    run_demo(folder, *SMALL, "--maxiter", 5, "--state", state)
    _, text = run_demo(folder, *SMALL, "--maxiter", 12, "--state", state)
    assert "going on from iteration 5" in text

    def table(text):
        text = text[text.index("initial modes") :]
        return text[: text.index("the picture")]

    assert table(text) == table(whole)


def write(folder, name, **arrays):
    path = os.path.join(folder, name)
    if comm.rank == 0:
        if name.endswith(".npz"):
            np.savez(path, **arrays)
        else:
            np.save(path, *arrays.values())
    comm.Barrier()
    return path


def test_demo_takes_a_density(folder):
    rho = np.random.default_rng(1).gamma(2.0, size=(6, 8, 10))
    path = write(folder, "rho.npy", rho=rho)
    status, text = run_demo(folder, "--from", path, "--boxsize", 40, "--steps", 0, "--maxiter", 3)
    assert status == 0 and "mesh (6, 8, 10)" in text and "against the data" in text


def test_demo_takes_particles(folder):
    positions = np.random.default_rng(1).uniform(0, 40, size=(501, 3)).astype("f4")
    path = write(folder, "particles.npz", positions=positions, BoxSize=40.0)
    status, text = run_demo(folder, "--from", path, *SMALL, "--maxiter", 3)
    assert status == 0
    assert f"noise {(8**3 / 501) ** 0.5:.3g} per cell" in text


BAD = {
    "wrong shape": (dict(a=np.ones((5, 5))), "got the shape (5, 5)"),
    "not a number": (
        dict(a=np.where(np.arange(64).reshape(4, 4, 4) == 5, np.nan, 1.0)),
        "first at index (0, 1, 1)",
    ),
    "text": (dict(a=np.array(["a"])), "expected real numbers"),
    "outside": (dict(a=np.array([[1.0, 2, 3], [1, 2, 50]])), "the first is number 1"),
    "overdensity": (dict(a=np.random.default_rng(1).normal(size=(16, 16, 16)) - 0.1), "add 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_demo_explains_what_is_wrong_with_a_file(folder, case):
    arrays, words = BAD[case]
    status, text = run_demo(folder, "--from", write(folder, "bad.npy", **arrays), "--boxsize", 40, *SMALL)
    assert status == 2 and words in text, text


def test_demo_explains_what_is_wrong_with_files(folder):
    status, text = run_demo(folder, "--from", os.path.join(folder, "nowhere.npy"), *SMALL)
    assert status == 2 and "there is no file" in text
    status, text = run_demo(folder, "--from", write(folder, "ok.npy", a=np.ones((8, 8, 8))), *SMALL)
    assert status == 2 and "--boxsize" in text
    status, text = run_demo(folder, "--from", write(folder, "names.npz", rho=np.ones((8, 8, 8))), *SMALL)
    assert status == 2 and "found ['rho']" in text
    path = os.path.join(folder, "broken.npy")
    if comm.rank == 0:
        with open(path, "wb") as file:
            file.write(b"this is not an array")
    comm.Barrier()
    status, text = run_demo(folder, "--from", path, *SMALL)
    assert status == 2 and "cannot be read" in text


def test_demo_knows_boxes_of_three_sides(folder):
    """A box in a file may have three sides; the particles are looked for in this box, and the mesh has it."""
    positions = np.random.default_rng(1).uniform(0, 1, (3000, 3)) * [40, 80, 20]
    path = write(folder, "box.npz", positions=positions, BoxSize=np.array([40.0, 80, 20]))
    *_, sides = demo.examine(path, None)
    assert sides.tolist() == [40, 80, 20]
    data = demo.observe(demo.parse(["--from", path, "--nmesh", "8"]), comm)
    assert data.d.pm.BoxSize.tolist() == [40, 80, 20] and abs(data.d.csum() / 512 - 1) < 1e-12
    for bad in [40.0, 80, 10], [40, 80], [40, 80, np.nan], [40, 80, -20], ["40"], [[40j] * 3]:
        path = write(folder, "box.npz", positions=positions, BoxSize=np.array(bad))
        status, text = run_demo(folder, "--from", path, *SMALL)
        assert status == 2 and ("BoxSize must be" in text or "[0, [40.0, 80.0, 10.0]]" in text), text


@pytest.mark.serial
@pytest.mark.parametrize("option", ["noise", "boxsize", "smoothing"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-1", "x"])
def test_demo_refuses_numbers_out_of_range(option, bad, capsys):
    with pytest.raises(SystemExit):
        demo.parse([f"--{option}", bad])
    assert f"--{option}" in capsys.readouterr().err


def test_demo_refuses_the_state_of_another_mesh(folder):
    state = os.path.join(folder, "state.npz")
    run_demo(folder, *SMALL, "--maxiter", 2, "--state", state)
    status, text = run_demo(folder, "--nmesh", 10, "--steps", 1, "--state", state)
    assert status == 2 and "the state cannot be used" in text


@pytest.mark.serial
@pytest.mark.parametrize("bad", ["/nowhere/at/all.png", "picture.txt"])
def test_demo_looks_for_its_folders_first(bad, capsys):
    with pytest.raises(SystemExit):
        demo.parse(["--output", bad])
    assert "--output" in capsys.readouterr().err


@pytest.mark.serial
def test_demo_as_a_program(tmp_path):
    run = [sys.executable, "-m", "vmad_lit.demo"]
    help = subprocess.run([*run, "--help"], capture_output=True, text=True, timeout=120)
    assert help.returncode == 0 and "--from" in help.stdout
    bad = subprocess.run([*run, "--maxiter", "0"], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and "at least 1" in bad.stderr
