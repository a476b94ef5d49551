"""The benchmarks run, and what they compare computes the same."""

import json
import sys

import numpy as np
import pytest
from mpi4py import MPI

from benchmarks import calibration, common, engine, fft, kernels, memory, nbody, reconstruction
from benchmarks.__main__ import place


@pytest.fixture(autouse=True)
def settings_of_jax():
    """Peers are measured in double precision; JAX is set back to its own after that."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", False)


@pytest.mark.parametrize("name", engine.CASES)
def test_engine_computes_what_arrays_do(name):
    case, n = engine.CASES[name], 100
    ours = engine.Ours(case, n)
    y = ours.run()
    np.testing.assert_allclose(y, case(ours.x, n))
    _, [_x] = ours.gradient()
    _, y_ = ours.jvp()
    eps = 1e-6
    slope = (case(ours.x + eps, n) - case(ours.x - eps, n)) / (2 * eps)
    np.testing.assert_allclose(y_, slope, rtol=1e-6)
    np.testing.assert_allclose(_x, slope, rtol=1e-6)  # element-wise: the Jacobian is diagonal
    _, [gnp] = ours.gnp()
    np.testing.assert_allclose(gnp, slope**2, rtol=1e-6)


@pytest.mark.parametrize("name", engine.CASES)
@pytest.mark.parametrize("what", ["run", "gradient", "jvp", "gnp"])
def test_the_second_time_nothing_is_built(name, what):
    ours = engine.Ours(engine.CASES[name], 100)
    getattr(ours, what)()
    before = engine.made(ours.model)
    assert before > 0
    for again in range(2):
        getattr(ours, what)()
    assert engine.made(ours.model) == before
    ours.model.output(z=ours.model._outputs["y"])  # a model that has grown is planned anew
    getattr(ours, what)()
    assert engine.made(ours.model) > before


@pytest.mark.parametrize("name", engine.CASES)
def test_memory_is_linear(name):
    """The bytes per operation do not grow with the number of operations."""
    small, large = (engine.bytes_of(engine.CASES[name], n) for n in (500, 5000))
    for what in small:
        assert large[what] < 1.3 * small[what] + 16, what


def test_memory_of_large_arrays():
    """As many arrays at the peak as in the same gradient written by hand, but for a few, however long the model is."""
    for row in engine.study_large(size=50_000, n=20, repeat=1):
        assert row["ours_arrays"] < row["by_hand_arrays"] + 3.2, row


@pytest.mark.parametrize("name", engine.LARGE)
def test_large_gradients_by_hand(name):
    function, by_hand = engine.LARGE[name]
    x, v = np.linspace(0.1, 0.5, 7), np.linspace(1.0, 2.0, 7)
    [y], [_x] = engine.build(function, 4).compute_with_vjp(init=dict(x=x), v=dict(_y=v))
    expected, gradient = by_hand(x, 4, v)
    np.testing.assert_allclose(y, expected)
    np.testing.assert_allclose(_x, gradient)


def test_peers_compute_the_same():
    for name, function in engine.peers(engine.chain, 10, ()).items():
        value, gradient = function()
        if name == "autograd":
            np.testing.assert_allclose(value, engine.chain(engine.Ours.x, 10).sum())
        np.testing.assert_allclose(
            np.asarray(gradient).ravel(), engine.Ours(engine.chain, 10).gradient()[1][0]
        )


def test_study_and_report(capsys):
    results = engine.study(["chain"], [10, 20], repeat=1, budget=0.1)
    assert [row["n"] for row in results] == [10, 20]
    assert all(
        row[name] > 0 for row in results for name in ("build", "run", "gradient", "jvp", "gnp", "NumPy")
    )
    engine.report(results)
    engine.report_memory(engine.study_memory(["chain"], [10]))
    engine.report_large(engine.study_large(size=100, n=3, repeat=1))
    out = capsys.readouterr().out
    assert "n^p" in out and "bytes per operation" in out and "by hand" in out


def test_exponents():
    powers = engine.exponents(dict(n=10, run=1.0, build=3.0), dict(n=100, run=1.0, build=30.0))
    assert powers == pytest.approx(dict(run=1.0, build=2.0))


@pytest.mark.collective
def test_fourier_transforms():
    [row, single] = fft.study([8], repeat=1)
    assert row["pfft"]["forward"] > 0 and single["dtype"] == "f4"


def test_memory_measures_one_gradient():
    x = np.linspace(0.0, 1.0, 5)
    gradients = {name: memory.gradient_of(make(12), x)() for name, make in memory.POLICIES.items()}
    for name in memory.PEERS:
        function = memory.by_autograd(memory.PEERS[name], 12, x)
        if function is not None:
            np.testing.assert_allclose(function(), gradients["full tape"], rtol=1e-13, err_msg=name)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, gradients["full tape"], err_msg=name)


def test_the_peak_of_memory_follows_the_schedule(capsys):
    names = "revolve, 5", "revolve, 20", "multistage, 5 and 20 on disk", "disk"
    results = memory.study([10, 60], names, size=20_000, repeat=1, budget=0.1)
    memory.report(results)
    assert "60 steps" in capsys.readouterr().out
    assert {row["policy"]: (row["kept"], row["on disk"]) for row in results[4:]} == {
        "revolve, 5": (5, 0),
        "revolve, 20": (20, 0),
        "multistage, 5 and 20 on disk": (5, 20),
        "disk": (0, 60),
    }
    rest = [row["rest"] for row in results]
    assert max(rest) - min(rest) < 3, (
        results
    )  # the start, which is not ours, and the state that is read from the disk
    full = memory.measure("full tape", 60, size=20_000, repeat=1)
    assert full["peak"] > 60 * 3 and full["runs"] == 1


@pytest.mark.parametrize("order", ["displaced", "random"])
def test_kernels_compute_what_pmesh_does(order):
    for name, (ours, theirs) in kernels.cases(8, "cic", order).items():
        if ours is None:
            continue
        a, b = np.asarray(ours()), theirs()
        b = np.asarray(b.value if hasattr(b, "value") else b)
        np.testing.assert_allclose(a if a.shape == b.shape else a.T, b, atol=1e-12, err_msg=name)


def test_kernels_report(capsys):
    results = kernels.study([8], ["cic"], repeat=1, orders=["random"])
    kernels.report(results)
    out = capsys.readouterr().out
    assert "threads 2" in out and "cic 8^3 random: paint" in out
    assert all(row["threads 1"] > 0 and row["threads 2"] > 0 for row in results if row["what"] != "decompose")


@pytest.mark.collective
def test_files(tmp_path):
    path = str(tmp_path / f"rank-{MPI.COMM_WORLD.rank}" / "numbers.json")
    common.save(path, common.machine(), results=[1.5])
    with open(path) as file:
        content = json.load(file)
    assert content["results"] == [1.5] and content["machine"]["cores"] >= 1
    assert place("a/b.json", "fft", True) == "a/b.json"
    assert place("a/b.json", "fft", False) == "a/b-fft.json"
    assert place("a", "fft", False).endswith("fft.json")


def test_nbody_knows_where_its_time_goes():
    [row] = nbody.study([8], repeat=1, systems=["vmad_lit"])
    spent = row["vmad_lit"]["kernels"]
    total = spent.pop("total")
    assert sum(spent.values()) == pytest.approx(total)
    assert all(spent[name] > 0 for name in ("paint and read out", "FFT", "differences", "transfer functions"))
    assert row["vmad_lit"]["error"] == 0


def test_nbody_over_steps():
    rows = nbody.study_steps(n=8, numbers=[3])
    assert [row["policy"] for row in rows] == list(nbody.POLICIES)
    assert all(row["gradient"] > 0 and row["memory"] > 0 for row in rows)


@pytest.mark.serial
def test_reconstruction_finds_a_small_universe(capsys):
    result = reconstruction.find(8, 1, reconstruction.BEST, minutes=0.002)
    assert result["status"] in ("converged", "maxiter", "monitor", "rounding")
    rows = result["rows"]
    assert rows[0]["nit"] == 0 and len(result["k"]) == len(result["r"]) == len(result["t"])
    assert reconstruction.gradients_until(result, np.full(len(rows[0]["r"]), -1.0)) == rows[0]["gradients"]
    assert reconstruction.gradients_until(result, np.full(len(rows[0]["r"]), 2.0)) == np.inf
    reconstruction.report(result)
    assert reconstruction.BEST in capsys.readouterr().out


@pytest.mark.serial
def test_calibration_goes_on_from_its_file(tmp_path):
    path, few = str(tmp_path / "numbers.json"), dict(n=12, levels=4, warmup=10, draws=4, thin=1)
    assert calibration.study(**few, simulations=2, path=path, budget=0.0)["simulations"] == 1
    found = calibration.study(**few, simulations=2, path=path)
    assert found["simulations"] == 2 and found["ranks"] == calibration.study(**few, simulations=2)["ranks"]
    with open(path) as file:
        assert json.load(file)["gradients"] == 2 * (2 * 14 + 1)


@pytest.mark.serial
def test_steps_are_compared_in_the_same_universes():
    found = calibration.compare_steps(
        12, universes=1, variances=(5e-4, 5e-5), warmup=10, distance=60.0, draws=5
    )
    [row] = found["rows"]
    assert found["shift"][0] == (row["mean"][0] - row["mean"][1]) / row["width"][1] and found["shift"][1] == 0
