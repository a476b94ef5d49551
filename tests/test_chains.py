"""Files, diagnostics and pictures of chains."""

import numpy as np
import pytest

pytest.importorskip("mpi4py")

from mpi4py import MPI  # noqa: E402

from vmad_lit.contrib import chains as ch  # noqa: E402
from vmad_lit.contrib.optimize import Problem  # noqa: E402
from vmad_lit.contrib.sample import HMC  # noqa: E402
from vmad_lit.contrib.vectorspace import VectorSpace  # noqa: E402

comm = MPI.COMM_WORLD


def made_up(seed, number=50, stats=True):
    draw = np.random.default_rng(seed)
    draws = dict(a=draw.normal(size=number), P=2 + draw.normal(size=(number, 3)))
    numbers = dict(accept=draw.random(number), gradients=np.full(number, 7)) if stats else {}
    return ch.Record(draws, numbers, seed=seed, sampler="HMC", gradients=400)


def sampled(seeds, monitor=None, draws=30, thin=1, comm=comm, **more):
    problem = Problem(
        lambda x: 0.5 * float(x @ x), lambda x: x, vs=VectorSpace(comm=comm), identity=dict(n=2)
    )
    sampler = HMC(warmup=4, draws=draws, seed=seeds, thin=thin)
    return sampler.sample(problem, np.ones(2), keep=lambda x: dict(a=x[0], both=x), monitor=monitor, **more)


@pytest.fixture
def path(tmp_path):
    return comm.bcast(str(tmp_path / "chains.h5"))


@pytest.mark.collective
def test_a_file_gives_back_what_was_written(path):
    pytest.importorskip("h5py")
    made = sampled([1, 2], thin=2, draws=8)
    ch.write(path, made)
    comm.Barrier()
    back = ch.read(path)
    assert [record.seed for record in back] == [1, 2] and "draws of a, both" in repr(back[0])
    for record, chain in zip(back, made, strict=True):
        for kind in ch.GROUPS:
            expected = getattr(chain, kind)
            assert list(getattr(record, kind)) == list(expected)
            for name, array in expected.items():
                np.testing.assert_array_equal(getattr(record, kind)[name], array)
        for name in set(ch.ABOUT) - ({"seconds"} if comm.rank else set()):  # each rank has its own clock
            assert getattr(record, name) == getattr(chain, name), name


@pytest.mark.collective
def test_a_file_grows_with_the_run(path):
    """Whoever opens it while the chain runs finds complete draws; a second chain is put beside the first."""
    pytest.importorskip("h5py")
    lengths = []

    def look(chain):
        comm.Barrier()
        if chain.nit == 20:
            lengths.append([len(record) for record in ch.read(path)])
        comm.Barrier()

    sampled([3, 4], [ch.autowrite(path, every=5), look], draws=21)
    assert lengths == [[16], [21, 16]]
    assert [len(record) for record in ch.read(path)] == [21, 21]


def test_a_file_that_is_none(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="holds no chains"):
        ch.read(tmp_path / "other.h5")


def test_one_chain_or_several_or_arrays():
    one = made_up(1)
    np.testing.assert_array_equal(ch.collect(one)["P"], one.draws["P"][None])
    short = made_up(2, 40)
    both = ch.collect([one, short], "a")
    assert list(both) == ["a"] and both["a"].shape == (2, 40)
    assert ch.collect(dict(a=np.arange(3)))["a"].shape == (1, 3)
    assert list(ch.columns(one)) == ["a", "P[0]", "P[1]", "P[2]"]
    np.testing.assert_array_equal(ch.columns(one)["P[1]"], one.draws["P"][None, :, 1])


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: ch.collect([]), "not an empty list"),
        (lambda: ch.collect([3]), "not int"),
        (lambda: ch.collect(made_up(1), "p"), "no draws of 'p'"),
        (lambda: ch.collect([made_up(1), ch.Record(dict(b=np.ones(3)))]), "different draws"),
        (lambda: ch.Record({}, sed=1), "nothing of 'sed'"),
        (lambda: ch.autowrite("x", every=0), "every must be"),
        (lambda: ch.plot_bands(np.ones(2), made_up(1)), "must have"),
        (lambda: ch.plot_bands(np.ones(3), made_up(1), relative=True), "truth to divide by"),
    ],
)
def test_errors_say_what_is_wrong(wrong, told):
    pytest.importorskip("matplotlib")
    with pytest.raises((ValueError, TypeError), match=told):
        wrong()


def test_without_arviz_its_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "arviz", None)
    monkeypatch.setitem(sys.modules, "corner", None)
    for function in ch.to_arviz, ch.summarise, ch.diagnose, ch.plot_trace, ch.plot_corner:
        with pytest.raises(ImportError, match=r"vmad_lit\[chains\]"):
            function(made_up(1))


def test_arviz_sees_draws_and_numbers():
    arviz = pytest.importorskip("arviz")
    several = [made_up(seed) for seed in (1, 2)]
    data = ch.to_arviz(several, coords=dict(k=[0.1, 0.2, 0.3]), dims=dict(P=["k"]))
    np.testing.assert_array_equal(data.posterior["P"].sel(k=0.2), ch.collect(several)["P"][:, :, 1])
    assert set(data.sample_stats.data_vars) == {"acceptance_rate", "n_steps"}
    assert data.posterior.attrs["inference_library"] == "vmad_lit"
    # Thinned chains have the number of each draw
    thinned = sampled(5, thin=3, draws=8, comm=None)
    stats = ch.to_arviz(thinned).sample_stats
    np.testing.assert_array_equal(stats["lp"][0], thinned.stats["lp"][2::3])
    assert "sample_stats" not in ch.to_arviz(made_up(1, stats=False)).groups()
    # The diagnostics are those of independent draws
    found = ch.diagnose([made_up(seed, 500) for seed in (1, 2)])
    assert found["P"]["ess_bulk"].shape == (3,) and (abs(found["P"]["ess_bulk"] / 1000 - 1) < 0.3).all()
    assert abs(found["a"]["r_hat"] - 1) < 0.01
    apart = [made_up(1, 500), ch.Record({k: v + 3 for k, v in made_up(2, 500).draws.items()})]
    assert ch.diagnose(apart)["a"]["r_hat"] > 1.5
    table = ch.summarise(several, "P")
    assert list(table.index) == ["P[0]", "P[1]", "P[2]"]
    np.testing.assert_allclose(table["gradients_per_ess"], 2 * 50 * 7 / table["ess_bulk"])
    assert arviz.__version__


def test_pictures():
    pytest.importorskip("arviz")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    several = [made_up(seed) for seed in (1, 2)]
    axes = ch.plot_trace(several, truth=dict(a=0.0))
    assert axes.shape == (4, 2)
    figure = ch.plot_corner({"one": several, "other": made_up(3)}, truth=dict(a=0.0), labels={"a": "$a$"})
    assert len(figure.axes) == 16 and figure.axes[12].get_xlabel() == "$a$"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "other"]
    ax = ch.plot_bands([0.1, 0.2, 0.3], several, truth=[2.0] * 3, ax=plt.figure().gca())
    low, high = ch.credible(ch.collect(several)["P"], 0.68)
    drawn = ax.collections[1].get_paths()[0].vertices
    np.testing.assert_allclose([drawn[:, 1].min(), drawn[:, 1].max()], [low.min(), high.max()])
    plt.close("all")


def test_credible_regions_hold_their_share():
    draws = np.random.default_rng(0).normal(size=(4, 5000, 2))
    low, high = ch.credible(draws, 0.6827)
    np.testing.assert_allclose([low, high], [[-1, -1], [1, 1]], atol=0.03)
