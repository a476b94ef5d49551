"""White noise: one field on any number of ranks, and independent ones for all seeds and purposes."""

import numpy as np
import pytest

pytest.importorskip("pmesh")

from mpi4py import MPI  # noqa: E402
from pmesh import pm as pmesh  # noqa: E402

from vmad_lit.contrib import cosmo4d  # noqa: E402
from vmad_lit.lib import noise  # noqa: E402
from vmad_lit.contrib.chisquare import MPIVectorSpace  # noqa: E402
from vmad_lit.contrib.vectorspace import FieldSpace, ProductSpace, VectorSpace  # noqa: E402
from vmad_lit.lib.fastpm import ParticleMesh  # noqa: E402
from vmad_lit.lib.spectra import Shells  # noqa: E402

COMM = MPI.COMM_WORLD
MESHES = [[8] * 3, [7] * 3, [8, 4, 6], [5, 3, 4], [8, 8, 7], [2] * 3, [1] * 3, [8, 8], [7, 4], [5, 1]]
LINES = [[8], [7], [2], [1]]  # cannot be spread over ranks


def mesh(shape, comm=COMM, **options):
    return ParticleMesh(shape, BoxSize=[2.0 * n for n in shape], comm=comm, **options)


def alone(shape, seed, **options):
    """The whole field, as one rank has it; by default all modes are random."""
    options = dict(mean=None, generator="philox", type="real") | options
    return mesh(shape, MPI.COMM_SELF).generate_whitenoise(seed, **options).value / np.prod(shape) ** 0.5


def test_philox_gives_the_numbers_of_its_authors():
    """Known answers of Philox4x32-10, from the test vectors of Random123."""
    for counter, key, words in [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        given = noise.philox([np.array([word], "u8") for word in counter], key)
        assert [int(word[0]) for word in given] == words


@pytest.mark.collective
@pytest.mark.parametrize("mean, unitary", [(None, False), (0.0, True), (2.5, False)])
@pytest.mark.parametrize("shape", MESHES)
def test_the_field_does_not_know_how_the_mesh_is_cut(shape, mean, unitary):
    cuts = (
        [[COMM.size, 1], [1, COMM.size], *([[2, 2]] if COMM.size == 4 else [])] if len(shape) == 3 else [None]
    )
    for kind in "real", "complex", "untransposedcomplex":
        options = dict(type=kind, mean=mean, unitary=unitary, generator="philox")
        whole = mesh(shape, MPI.COMM_SELF).generate_whitenoise(2**70, **options)
        for np_ in cuts:
            for dtype, atol in ("f8", 1e-12), ("f4", 1e-4):
                part = mesh(shape, np=np_, dtype=dtype).generate_whitenoise(2**70, **options)
                assert type(part).__name__ == type(whole).__name__ and part.value.real.dtype == dtype
                np.testing.assert_allclose(part.value, whole.value[part.slices], rtol=0, atol=atol)


@pytest.mark.parametrize("shape", MESHES + LINES)
@pytest.mark.serial
def test_all_modes_have_unit_variance_and_are_independent(shape):
    """Over many seeds: the covariance of all pairs of points is the unit matrix, within its scatter."""
    if np.prod(shape) > 130:
        shape = [min(n, 5 - n % 2) for n in shape]
    fields = np.array([alone(shape, seed).ravel() for seed in range(300)])
    n = fields.shape[1]
    deviation = (fields.T @ fields / 300 - np.eye(n)) * (300 / (1 + np.eye(n))) ** 0.5
    assert abs(deviation).max() < 5 and abs((deviation**2).mean() - 1) < 8 / n
    # So it is in all modes, which for a field of random numbers are Hermitian
    power = (abs(np.fft.fftn(fields.reshape([300, *shape]), axes=range(1, 1 + len(shape)))) ** 2).mean(
        axis=0
    ) / n
    np.testing.assert_allclose(power, 1, atol=5 * (2 / 300) ** 0.5)
    assert abs((fields**3).mean()) < 6 * (15 / fields.size) ** 0.5
    assert abs((fields**4).mean() - 3) < 6 * (96 / fields.size) ** 0.5


@pytest.mark.parametrize("shape", MESHES + LINES)
@pytest.mark.serial
def test_modes_are_those_of_a_real_field(shape):
    for unitary in False, True:
        modes = mesh(shape, MPI.COMM_SELF).generate_whitenoise(
            5, unitary=unitary, mean=None, generator="philox"
        )
        whole = np.fft.fftn(modes.c2r().value) / np.prod(shape)
        np.testing.assert_allclose(modes.value, whole[modes.slices], atol=1e-12)
        if unitary:
            np.testing.assert_allclose(abs(whole), 1)


SEEDS = [0, 1, 2, 5, 6, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**64, 2**64 + 1, 2**128, 2**128 + 1, 10**99]


@pytest.mark.parametrize("shape", [[7] * 3, [8] * 3, [16, 16], [128]])
@pytest.mark.serial
def test_no_two_seeds_and_no_two_purposes_share_a_field(shape):
    ours = [alone(shape, seed, purpose=p).ravel() for seed in SEEDS for p in ("field", "noise of data")]
    default = [alone(shape, seed, generator=None, mean=0).ravel() for seed in SEEDS]
    for fields in ours, default:
        correlations = np.corrcoef(fields) - np.eye(len(fields))
        assert abs(correlations).max() < 6 / np.prod(shape) ** 0.5


@pytest.mark.serial
def test_a_finer_mesh_has_the_same_long_waves():
    coarse, fine = (np.fft.fftn(alone(shape, 3)) / np.prod(shape) ** 0.5 for shape in ([6, 5], [12, 11]))
    for i in range(-2, 3):
        for j in range(-2, 3):
            np.testing.assert_allclose(coarse[i, j], fine[i, j])


@pytest.mark.collective
@pytest.mark.parametrize("shape", [[8] * 3, [16, 15, 9], [32, 30]])
def test_the_power_is_flat(shape):
    pm = mesh(shape)
    shells = Shells(pm)
    power = np.mean([shells.power(cosmo4d.white_noise(pm, seed)) for seed in range(20)], axis=0)
    expected = float(pm.BoxSize.prod() / pm.Nmesh.prod())
    assert (abs(power / expected - 1) < 5 * (2 / (20 * shells.counts)) ** 0.5).all()


@pytest.mark.collective
@pytest.mark.parametrize("kind", ["real", "complex", "untransposedcomplex"])
@pytest.mark.parametrize("unitary", [False, True])
def test_where_pmesh_is_sound_its_own_field_is_given(kind, unitary):
    for shape in [8] * 3, [4, 4, 6], [7, 4]:
        theirs = pmesh.ParticleMesh(shape, BoxSize=[2.0 * n for n in shape], comm=COMM)
        for options in {}, dict(mean=1.5), dict(invertphase=True):
            options = dict(options, type=kind, unitary=unitary)
            expected = theirs.generate_whitenoise(3, **options).value
            np.testing.assert_array_equal(mesh(shape).generate_whitenoise(3, **options).value, expected)
    field = mesh([8] * 3).generate_whitenoise(3, type="real")
    np.testing.assert_allclose(field.cnorm(), 241397.29535381446)


@pytest.mark.collective
def test_one_may_choose_the_generator_everywhere():
    odd = mesh([7] * 3)
    theirs = pmesh.ParticleMesh([7] * 3, BoxSize=14.0, comm=COMM).generate_whitenoise(3, type="real").value
    np.testing.assert_array_equal(odd.generate_whitenoise(3, type="real", generator="pmesh").value, theirs)
    assert not np.allclose(odd.generate_whitenoise(3, type="real").value, theirs) or theirs.size == 0
    even = mesh([8] * 3)
    fields = [even.generate_whitenoise(s, type="real", generator="philox") for s in (2**32 + 3, 3)]
    np.testing.assert_array_equal(even.generate_whitenoise(2**32 + 3, type="real").value, fields[0].value)
    np.testing.assert_array_equal(
        (cosmo4d.white_noise(even, 3, generator="pmesh") * 8**1.5).value,
        even.generate_whitenoise(3, type="real").value * 8**-1.5 * 8**1.5,
    )
    opposite = even.generate_whitenoise(3, type="real", mean=2.0, generator="philox", invertphase=True)
    same = even.generate_whitenoise(3, type="real", mean=2.0, generator="philox")
    np.testing.assert_allclose((opposite + same).value, 4.0)


@pytest.mark.collective
@pytest.mark.parametrize("make", [ParticleMesh.generate_whitenoise, cosmo4d.white_noise])
def test_what_is_no_seed_is_refused_on_all_ranks(make):
    pm = mesh([4] * 3)
    for bad in -1, 1.5, float("nan"), float("inf"), None, "3", True, [3], 1j, 3.0, np.float64(2.0):
        with pytest.raises((TypeError, ValueError), match="seed must be a whole number"):
            make(pm, bad)
        with pytest.raises((TypeError, ValueError), match="seed must be a whole number"):
            make(pm, bad if COMM.rank == COMM.size - 1 else 3)
    with pytest.raises(ValueError, match="generator must be one of"):
        make(pm, 3, generator="gadget")
    with pytest.raises(ValueError, match="one purpose"):
        make(pm, 3, generator="pmesh", purpose="noise")
    with pytest.raises(ValueError, match="mean must be finite"):
        pm.generate_whitenoise(3, mean=float("nan"))
    if COMM.size > 1:
        with pytest.raises(ValueError, match="all ranks must ask for the same white noise"):
            make(pm, COMM.rank)
    make(pm, np.int64(3)), make(pm, np.array(2**40))


@pytest.mark.collective
def test_synthetic_data_share_nothing():
    """The noise of data is no field of another seed, nor is it the truth."""
    pm = mesh([8] * 3)
    q = pm.generate_uniform_particle_grid(shift=0.5)
    forward = cosmo4d.WhiteNoiseOperator.bind(
        power=lambda k: 0 * k + 1.0, q=q, stages=[], cosmology=None, pm=pm
    )
    fields = [cosmo4d.white_noise(pm, seed) for seed in range(97, 103)]
    for seed in 99, 100:
        data = cosmo4d.Data.synthetic(pm, forward, 0.5, seed)
        np.testing.assert_array_equal(data.truth.value, fields[seed - 97].value)
        added = (data.d - data.clean) * 2.0
        assert abs(added.cnorm() / 512 - 1) < 0.3
        for field in fields:
            assert abs(added.cdot(field)) / 512 < 6 / 512**0.5
    truth = cosmo4d.Data.synthetic(pm, forward, 0.5, 99, generator="pmesh").truth
    np.testing.assert_array_equal(truth.value, cosmo4d.white_noise(pm, 99, "pmesh").value)


# Random vectors


def gather_rows(array):
    return np.concatenate(COMM.allgather(array))


@pytest.mark.collective
@pytest.mark.parametrize("shape", [(5, 6), (6, 5, 4)])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_normal_fields_do_not_depend_on_the_number_of_ranks(shape, dtype):
    purpose = ("momentum", 3)
    for kind in ("real", "complex"):
        whole, part = (
            FieldSpace(c).normal(mesh(shape, c, dtype=dtype).create(type=kind, value=0), 2, purpose)
            for c in (MPI.COMM_SELF, COMM)
        )
        index = tuple(slice(s, s + n) for s, n in zip(part.start, part.shape))
        np.testing.assert_allclose(part.value, whole.value[index], rtol=1e-6)
        assert part.value.dtype == whole.value.dtype


@pytest.mark.collective
def test_normal_arrays_do_not_depend_on_the_number_of_ranks():
    vs, whole = MPIVectorSpace(COMM), VectorSpace()
    for shape, dtype in [((10,), "f8"), ((3 * COMM.size, 2, 3), "f4"), ((2 * COMM.size + 1, 3), "c16")]:
        like = np.zeros(shape, dtype)
        mine = like[sum(divmod(len(like), COMM.size)) * COMM.rank :][: sum(divmod(len(like), COMM.size))]
        numbers = vs.normal(mine, 1, "numbers")
        np.testing.assert_array_equal(gather_rows(numbers), whole.normal(like, 1, "numbers"))
        assert numbers.dtype == dtype
    assert vs.normal(np.zeros(0), 1).shape == (0,)
    assert len(set(COMM.allgather(VectorSpace(comm=COMM).normal(1.0, 1)))) == 1


def test_components_and_purposes_are_independent():
    vs = ProductSpace(VectorSpace())
    n = vs.normal({"a": np.zeros(4000), "b": np.zeros(4000), "c": 0.0}, 5, ("draw", 0))
    other = vs.normal({"a": np.zeros(4000)}, 5, ("draw", 1))
    correlation = np.corrcoef([n["a"], n["b"], other["a"]])
    assert abs(correlation - np.eye(3)).max() < 0.07
    assert type(n["c"]) is float


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_products_with_normal_fields_have_the_variance_of_the_inner_product(kind):
    """For each a, <a, n> has the variance <a, a>, also in a half-stored field with its twins."""
    pm = mesh([4, 5], MPI.COMM_SELF)
    vs, basis = FieldSpace(MPI.COMM_SELF), pm.create(type="real", value=0)
    a = basis.copy() if kind == "real" else basis.r2c()
    a.value[...] = np.random.default_rng(1).normal(size=a.shape)
    if kind == "complex":
        a = a.c2r().r2c()
    products = [vs.dot(a, vs.normal(a, 1, ("n", i))) for i in range(3000)]
    assert abs(np.mean(products)) < 4 * (vs.dot(a, a) / 3000) ** 0.5
    assert abs(np.var(products) / vs.dot(a, a) - 1) < 4 * (2 / 3000) ** 0.5


def test_normal_numbers_on_a_line():
    field = mesh([12], MPI.COMM_SELF).create(type="real", value=0)
    numbers = FieldSpace(MPI.COMM_SELF).normal(field, 2, "line")
    np.testing.assert_array_equal(numbers.value, VectorSpace().normal(np.zeros(12), 2, "line"))


def test_a_space_with_a_product_of_its_own_brings_its_own_dice():
    with pytest.raises(TypeError, match="inner product of its own"):
        VectorSpace(dot=lambda a, b: 2 * a * b).normal(1.0, seed=1)


def test_compiled_and_plain_normal_numbers_agree(monkeypatch):
    compiled = np.empty((7, 9))
    noise.fill_normal(compiled, np.arange(7) * 2**33 + 1, 3, "x")
    monkeypatch.setattr(noise, "normal_loops", None)
    plain = np.empty((7, 9))
    noise.fill_normal(plain, np.arange(7) * 2**33 + 1, 3, "x")
    np.testing.assert_allclose(compiled, plain, rtol=1e-12)
