"""The background, distances and the linear power spectrum, against independent computations."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.special import hyp2f1

from vmad_lit import Builder
from vmad_lit.lib.cosmology import (
    HUBBLE_DISTANCE,
    Cosmology,
    LinearPower,
    MatterDominated,
    Planck15,
    Planck18,
    angular_diameter_distance,
    comoving_distance,
    comoving_transverse_distance,
    drift_factor,
    eisenstein_hu,
    eisenstein_hu_nowiggle,
    expansion_rate,
    growth,
    kick_factor,
    linear_growth,
    linear_power,
    luminosity_distance,
    second_order_growth,
    start_factors,
    step_factors,
)
from vmad_lit.testing import check

A = np.linspace(0.05, 1.0, 20)
UNIVERSES = [
    dict(Omega0_m=1.0),
    dict(Omega0_m=0.3),
    dict(Omega0_m=0.3, Omega0_k=0.7),
    dict(Omega0_m=0.3, Omega0_k=-0.05),
    dict(Omega0_m=0.05),
    dict(Omega0_m=0.25, Omega0_lambda=0.6),
]
universes = pytest.mark.parametrize("universe", UNIVERSES, ids=str)


def integrate(Om, OL, Ok, a):
    """D1, D1', D2, D2' by a tight ODE solver, started early with the growing mode of a matter universe."""

    def rhs(lna, y):
        x = np.exp(lna)
        X = Om + Ok * x + OL * x**3
        friction = -2 + (3 * Om + 2 * Ok * x) / (2 * X)
        D1, F1, D2, F2 = y
        return [F1, friction * F1 + 1.5 * Om / X * D1, F2, friction * F2 + 1.5 * Om / X * (D2 - D1**2)]

    a0 = 1e-6
    # first order in the curvature: D1 = a (1 - 4/7 Ok/Om a)
    c = -4 / 7 * Ok / Om
    y0 = [a0 * (1 + c * a0), a0 * (1 + 2 * c * a0), -3 / 7 * a0**2, -6 / 7 * a0**2]
    span = np.log(a0), np.log(a[-1])
    return solve_ivp(rhs, span, y0, method="DOP853", t_eval=np.log(a), rtol=1e-12, atol=1e-20).y


@universes
def test_growth_solves_its_equations(universe):
    pt = MatterDominated(**universe)
    D1, F1, D2, F2 = integrate(pt.Omega0_m, pt.Omega0_lambda, pt.Omega0_k, A)
    densities = pt.Omega0_m, pt.Omega0_lambda, pt.Omega0_k
    first, second = linear_growth(A, *densities), second_order_growth(A, *densities)
    np.testing.assert_allclose(first[0], D1, rtol=1e-9)
    np.testing.assert_allclose(first[1], F1, rtol=1e-9)
    np.testing.assert_allclose(second[0], D2, rtol=1e-9)
    np.testing.assert_allclose(second[1], F2, rtol=1e-9)


@universes
@pytest.mark.parametrize("name", ["D1", "D2"])
def test_orders_are_derivatives_by_ln_a(universe, name):
    D = getattr(MatterDominated(**universe), name)
    eps = 1e-4
    for order in (0, 1):
        slope = (D(A * np.exp(eps), order) - D(A * np.exp(-eps), order)) / (2 * eps)
        np.testing.assert_allclose(slope, D(A, order + 1), rtol=1e-6, atol=1e-8)


@given(Om=st.floats(0.02, 1.0), a=st.floats(1e-4, 2.0))
def test_flat_growth_closed_form(Om, a):
    D = linear_growth(np.float64(a), Om, 1 - Om)[0]
    np.testing.assert_allclose(D, a * hyp2f1(1 / 3, 1, 11 / 6, -(a**3) * (1 - Om) / Om), rtol=1e-11)


def test_open_growth_closed_form():
    Om = 0.3  # no cosmological constant: the closed form of Groth and Peebles
    x = (1 / Om - 1) * A
    D = 1 + 3 / x + 3 * np.sqrt((1 + x) / x**3) * np.log(np.sqrt(1 + x) - np.sqrt(x))
    ours = MatterDominated(Om, Omega0_k=1 - Om).D1(A)
    np.testing.assert_allclose(ours, D / D[-1], rtol=1e-10)


def test_einstein_de_sitter():
    pt = MatterDominated(1.0)
    np.testing.assert_allclose(pt.D1(A), A, rtol=1e-14)
    np.testing.assert_allclose(pt.D2(A), A**2, rtol=1e-14)
    np.testing.assert_allclose(pt.f1(A), 1, rtol=1e-13)
    np.testing.assert_allclose(pt.f2(A), 2, rtol=1e-13)
    np.testing.assert_allclose(pt.E(A), A**-1.5, rtol=1e-14)
    np.testing.assert_allclose(second_order_growth(A, 1.0, 0.0)[0], -3 / 7 * A**2, rtol=1e-13)


def test_early_times_are_matter_dominated():
    a = np.array([1e-8, 1e-5])
    np.testing.assert_allclose(linear_growth(a, 0.3, 0.7)[0], a, rtol=1e-13)
    np.testing.assert_allclose(second_order_growth(a, 0.3, 0.7)[0], -3 / 7 * a**2, rtol=1e-13)


@universes
def test_kick_and_drift_functions(universe):
    pt, da = MatterDominated(**universe), 1e-5
    for G, g in [("Gp", "gp"), ("Gf", "gf"), ("Gp2", "gp2"), ("Gf2", "gf2")]:
        G, g = getattr(pt, G), getattr(pt, g)
        np.testing.assert_allclose((G(A + da) - G(A - da)) / (2 * da), g(A), rtol=1e-6)
    np.testing.assert_allclose(A**2 * pt.E(A) * pt.gf(A), 1.5 * pt.Om0 * pt.Gp(A), rtol=1e-12)
    np.testing.assert_allclose((pt.E(A + da) - pt.E(A - da)) / (2 * da), pt.efunc_prime(A), rtol=1e-6)
    np.testing.assert_allclose(pt.E(A, order=1), A * pt.efunc_prime(A), rtol=1e-14)
    np.testing.assert_allclose(pt.Hfac(A), -2 - pt.E(A, order=1) / pt.E(A), rtol=1e-14)
    np.testing.assert_allclose(pt.Om(A), pt.Omega0_m * A**-3 / pt.E(A) ** 2, rtol=1e-14)


@universes
def test_normalisation_and_shapes(universe):
    pt = MatterDominated(a=A, a_normalize=0.5, **universe)
    assert pt.D1(0.5) == pytest.approx(1, abs=1e-15) and pt.D2(0.5) == pytest.approx(1, abs=1e-14)
    for name in "E efunc efunc_prime Hfac Om D1 D2 f1 f2 Gp Gp2 gp gp2 Gf Gf2 gf gf2".split():
        f = getattr(pt, name)
        assert np.shape(f(0.3)) == () and f([[0.3, 0.4]]).shape == (1, 2) and f(np.empty(0)).shape == (0,)
        assert f(np.array([0.3, 0.4]))[1] == pytest.approx(f(0.4), rel=1e-14)


def test_blocks_of_scale_factors_do_not_matter():
    a = np.linspace(0.1, 1, 37).reshape(37, 1)
    for x, y in zip(second_order_growth(a, 0.3, 0.7), second_order_growth(a, 0.3, 0.7, block=5), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MatterDominated(0.3).D1(0.0), "positive"),
        (lambda: MatterDominated(0.3).D2([0.1, -1]), "positive"),
        (lambda: MatterDominated(0.3).E(float("nan")), "positive"),
        (lambda: MatterDominated(0.3).D1(1.0, order=3), "order"),
        (lambda: MatterDominated(0.3).E(1.0, order=2), "order"),
        (lambda: MatterDominated(-0.1), "Omega0_m > 0"),
        (lambda: MatterDominated(2.0, 0.0, -1.0).D1(2.5), "does not expand"),
        (lambda: Cosmology(h=0), "h must be positive"),
        (lambda: Cosmology(Ob0=0.4), "baryons"),
        (lambda: Cosmology().comoving_distance(-1.5), "redshifts"),
        (lambda: LinearPower(Planck15, transfer="BBKS"), "EisensteinHu"),
        (lambda: LinearPower(Planck15.replace(Ob0=0.0)), "NoWiggle"),
        (lambda: LinearPower(Planck15)([-0.1]), "negative"),
        (lambda: LinearPower.from_table(Planck15, [1, 2, 3], [1, 2, 3]), "length"),
        (lambda: LinearPower.from_table(Planck15, [1, 3, 2, 4], [1, 2, 3, 4]), "increasing"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("cosmology", [Planck15, Planck18, Cosmology(Ok0=0.2), Cosmology(Ok0=-0.2)], ids=repr)
def test_distances(cosmology):
    z = np.array([0.0, 0.1, 1.0, 10.0])
    integrals = [quad(lambda x: 1 / cosmology.efunc(x), 0, end, epsrel=1e-12)[0] for end in z]
    chi = HUBBLE_DISTANCE * np.array(integrals)
    np.testing.assert_allclose(cosmology.comoving_distance(z), chi, rtol=1e-10)
    root = np.sqrt(complex(cosmology.Ok0)) / HUBBLE_DISTANCE
    across = chi if root == 0 else np.real(np.sinh(root * chi) / root)
    np.testing.assert_allclose(cosmology.comoving_transverse_distance(z), across, rtol=1e-10)
    np.testing.assert_allclose(
        cosmology.luminosity_distance(z), cosmology.angular_diameter_distance(z) * (1 + z) ** 2, rtol=1e-13
    )
    assert np.isfinite(cosmology.comoving_distance(np.inf))


def test_cosmology_is_a_value():
    assert Planck15.replace(h=0.7) != Planck15 and Planck15.replace() == Planck15
    with pytest.raises(AttributeError):
        Planck15.h = 0.7
    assert Planck15.background().Om0 == Planck15.Om0
    assert Planck15.Ode0 == pytest.approx(1 - Planck15.Om0)


# Transfer functions of the same paper from the colossus package 1.4.0, T_cmb = 2.7255 K, for (Om0, h, Ob0).
K = np.array([1e-4, 1e-2, 0.05, 0.1, 0.2, 1.0, 10.0])
REFERENCE = [
    (
        eisenstein_hu,
        (0.3, 0.7, 0.05),
        [
            0.99990687074,
            0.779874015762,
            0.267697656542,
            0.128607621882,
            0.0541042889533,
            0.00458786725678,
            8.77676957136e-05,
        ],
    ),
    (
        eisenstein_hu_nowiggle,
        (0.3, 0.7, 0.05),
        [
            0.999899385571,
            0.786127706875,
            0.274935076614,
            0.131200229045,
            0.053640202474,
            0.00455319007884,
            8.67098049317e-05,
        ],
    ),
    (
        eisenstein_hu,
        (0.25, 0.73, 0.045),
        [
            0.999877102662,
            0.747037614842,
            0.231409204004,
            0.104914040822,
            0.0427364268509,
            0.00355837237249,
            6.64796009065e-05,
        ],
    ),
    (
        eisenstein_hu_nowiggle,
        (0.25, 0.73, 0.045),
        [
            0.999867361733,
            0.753613042348,
            0.236911880975,
            0.108798410408,
            0.0431355569412,
            0.00352911387613,
            6.56982109699e-05,
        ],
    ),
]


@pytest.mark.parametrize("transfer, parameters, values", REFERENCE)
def test_transfer_functions_of_an_independent_code(transfer, parameters, values):
    np.testing.assert_allclose(transfer(K, *parameters), values, rtol=1e-10)


def test_transfer_functions_of_zero_and_small_k():
    for T in (eisenstein_hu, eisenstein_hu_nowiggle):
        assert T(np.array([0.0]), 0.3, 0.7, 0.05)[0] == pytest.approx(1, abs=1e-12)
        assert T(1e-6, 0.3, 0.7, 0.05) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("transfer", ["EisensteinHu", "NoWiggle", lambda k: 1 / (1 + (20 * k) ** 2)])
def test_sigma8(transfer):
    P = LinearPower(Planck18, transfer=transfer)
    assert P.sigma_r(8.0) == pytest.approx(Planck18.sigma8, rel=1e-12)

    def integrand(logk):
        k = np.exp(logk)
        x = 8 * k
        return k**3 * P(k) / (2 * np.pi**2) * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2

    pieces = np.log([1e-6, 0.02, 0.1, 0.5, 2.0, 10.0, 100.0])
    variance = sum(quad(integrand, lo, hi, limit=500, epsrel=1e-10)[0] for lo, hi in pairwise(pieces))
    assert variance**0.5 == pytest.approx(Planck18.sigma8, rel=1e-7)


def test_turnover_and_small_scale_slope():
    P = LinearPower(Planck15, transfer="NoWiggle")
    k = np.geomspace(1e-3, 1, 2000)
    k_eq = 7.46e-2 * Planck15.Om0 * Planck15.h * (Planck15.T_cmb / 2.7) ** -2  # h/Mpc
    assert 0.5 < k[np.argmax(P(k))] / k_eq < 2
    low = np.array([1e-6, 2e-6])
    assert np.diff(np.log(P(low)))[0] / np.log(2) == pytest.approx(Planck15.n_s, abs=1e-3)
    far = np.array([1e6, 1e8])
    tail = P(far) * far ** (4 - Planck15.n_s)
    q = far * (Planck15.T_cmb / 2.7) ** 2 / (Planck15.Om0 * Planck15.h)
    assert tail[1] / tail[0] == pytest.approx((np.log(q[1]) / np.log(q[0])) ** 2, rel=0.1)


def test_growth_scales_the_power():
    k = np.geomspace(1e-3, 10, 20)
    for cosmology in (Planck15, Planck15.replace(Ok0=0.1)):
        D = cosmology.background().D1(1 / 3)
        today, then = LinearPower(cosmology), LinearPower(cosmology, z=2)
        np.testing.assert_allclose(then(k), D**2 * today(k), rtol=1e-12)


def test_power_keeps_shapes_and_vanishes_at_zero():
    P = LinearPower(Planck15)
    assert P(0.0) == 0 and np.ndim(P(0.1)) == 0
    k = np.linspace(0, 1, 24).reshape(2, 3, 4)
    with np.errstate(all="raise"):
        assert P(k).shape == k.shape and P(k)[0, 0, 0] == 0 and np.all(P(k).ravel()[1:] > 0)
    assert P(k[:0]).shape == (0, 3, 4)


def test_table_reproduces_its_spectrum():
    k = np.geomspace(1e-4, 10, 1000)
    P = LinearPower(Planck15)
    Q = LinearPower.from_table(Planck15, k, 3 * P(k))
    fine = np.geomspace(1.3e-4, 9, 777)
    np.testing.assert_allclose(Q(fine), P(fine), rtol=2e-4)
    beyond = np.array([1e-6, 100.0, 1000.0])
    np.testing.assert_allclose(Q(beyond[:1]), P(beyond[:1]), rtol=1e-2)
    assert np.all(np.diff(np.log(Q(beyond[1:]))) / np.log(10) < -2)
    assert Q(0.0) == 0


def test_camb_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "camb", None)
    with pytest.raises(ImportError, match="camb"):
        LinearPower.from_camb(Planck15)


def test_camb_agrees_with_the_fit():
    pytest.importorskip("camb")
    k = np.geomspace(1e-3, 10, 50)
    np.testing.assert_allclose(LinearPower.from_camb(Planck15)(k), LinearPower(Planck15)(k), rtol=0.05)


def test_symbols_with_a_spectrum_of_camb():
    pytest.importorskip("camb")
    fiducial = LinearPower.from_camb(Planck15)
    k = np.geomspace(1e-3, 5, 20)
    names = "Om0", "h", "n_s", "sigma8"
    point = {name: getattr(Planck15, name) for name in names}

    def power(Om0, h, n_s, sigma8):
        return LinearPower(
            Planck15.replace(Om0=Om0, h=h, n_s=n_s, sigma8=sigma8), z=0.5, transfer=fiducial.transfer
        )(k)

    check(power, **point, truth=LinearPower.from_camb(Planck15, z=0.5)(k))


@pytest.mark.parametrize("Ok0", [0.0, 0.1, -0.1])
def test_distances_of_astropy(Ok0):
    theirs = pytest.importorskip("astropy.cosmology").LambdaCDM(H0=100, Om0=0.3, Ode0=0.7 - Ok0, Tcmb0=0)
    ours, z = Cosmology(Om0=0.3, Ok0=Ok0), np.array([0.1, 1.0, 10.0, 1000.0])
    np.testing.assert_allclose(ours.efunc(z), theirs.efunc(z), rtol=1e-13)
    for name in (
        "comoving_distance",
        "comoving_transverse_distance",
        "angular_diameter_distance",
        "luminosity_distance",
    ):
        np.testing.assert_allclose(getattr(ours, name)(z), getattr(theirs, name)(z).value, rtol=1e-12)


def test_power_of_colossus():
    cosmology = pytest.importorskip("colossus.cosmology.cosmology")
    c, k, z = Planck15, np.geomspace(1e-3, 10, 50), np.array([0.5, 1.0, 3.0])
    theirs = cosmology.Cosmology(
        name="test",
        flat=True,
        H0=100 * c.h,
        Om0=c.Om0,
        Ob0=c.Ob0,
        sigma8=c.sigma8,
        ns=c.n_s,
        Tcmb0=c.T_cmb,
        relspecies=False,
        persistence="",
    )
    np.testing.assert_allclose(LinearPower(c)(k), theirs.matterPowerSpectrum(k), rtol=1e-3)
    np.testing.assert_allclose(
        c.background().D1(1 / (1 + z)), theirs.growthFactor(z), rtol=1e-4
    )  # from a table


# -- operators ---------------------------------------------------------------------------------------------

WAVENUMBERS = np.geomspace(1e-3, 2, 30)
PARAMETERS = dict(Om0=0.31, h=0.68, n_s=0.965, sigma8=0.82, Ob0=0.049)


def growth_model(**hyper):
    with Builder() as m:
        D1, f1, D2, f2 = growth(m.input("Om0"), a=A, **hyper)
        m.output(D1=D1, f1=f1, D2=D2, f2=f2)
    return m, dict(Om0=0.31)


def one_parameter_model(op, **hyper):
    with Builder() as m:
        m.output(y=op(m.input("Om0"), **hyper))
    return m, dict(Om0=0.31)


def power_model(**hyper):
    with Builder() as m:
        m.output(y=linear_power(*m.input(*PARAMETERS), k=np.append(WAVENUMBERS, 0.0), **hyper))
    return m, PARAMETERS


Z = np.array([0.2, 1.5])
CASES = {
    "growth": (growth, dict(Om0=0.31, a=A)),
    "growth, curved": (growth, dict(Om0=0.31, a=A, Ok0=0.1)),
    "expansion_rate": (expansion_rate, dict(Om0=0.31, a=A)),
    "expansion_rate, curved": (expansion_rate, dict(Om0=0.31, a=0.4, Ok0=-0.02)),
    "comoving_distance": (comoving_distance, dict(Om0=0.31, z=np.array([[0.1, 1.0, 1100.0]]))),
    "comoving_distance, curved": (comoving_distance, dict(Om0=0.31, z=2.0, Ok0=0.1)),
    "comoving_transverse_distance": (comoving_transverse_distance, dict(Om0=0.31, z=Z, Ok0=0.1)),
    "angular_diameter_distance": (angular_diameter_distance, dict(Om0=0.31, z=Z, Ok0=-0.1)),
    "luminosity_distance": (luminosity_distance, dict(Om0=0.31, z=Z, Ok0=-0.1)),
    "step_factors": (step_factors, dict(Om0=0.31, stages=A, Ok0=0.1)),
    "start_factors": (start_factors, dict(Om0=0.31, a=0.1, Ok0=-0.1)),
    "kick_factor": (kick_factor, dict(Om0=0.31, ai=A[:-1], ac=A[:-1], af=A[1:])),
    "kick_factor, curved": (kick_factor, dict(Om0=0.31, ai=0.2, ac=0.4, af=0.4, Ok0=0.1)),
    "drift_factor": (drift_factor, dict(Om0=0.31, ai=A[:-1], ac=A[:-1] + 0.02, af=A[1:])),
    "drift_factor, curved": (drift_factor, dict(Om0=0.31, ai=0.2, ac=0.3, af=0.4, Ok0=-0.1)),
    "linear_power": (linear_power, dict(PARAMETERS, k=np.append(WAVENUMBERS, 0.0))),
    "linear_power, redshift": (linear_power, dict(PARAMETERS, k=WAVENUMBERS, z=2.0, Ok0=-0.05)),
    "linear_power, no wiggles": (linear_power, dict(PARAMETERS, k=0.1, transfer="NoWiggle", T_cmb=2.728)),
    "linear_power, no baryons": (linear_power, dict(PARAMETERS, Ob0=0.0, k=0.1, transfer="NoWiggle")),
    "linear_power, function": (
        linear_power,
        dict(PARAMETERS, k=WAVENUMBERS, z=0.5, transfer=lambda k: 1 / (1 + (20 * k) ** 2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_have_derivatives(name):
    op, arguments = CASES[name]
    constant = "Ob0" if arguments.get("Ob0") == 0 else ()  # its derivative is infinite there
    check(op, constant=constant, **arguments)


@pytest.mark.parametrize("name", CASES)
def test_operators_have_second_derivatives(name):
    op, arguments = CASES[name]
    numbers = {key: arguments[key] for key in op.ain if arguments[key] != 0}
    hyper = {key: value for key, value in arguments.items() if key not in numbers}
    with Builder() as m:
        results = op(**{key: m.input(key) for key in numbers}, **hyper)
        results = results if isinstance(results, list) else [results]
        m.output(**{f"y{i}": y for i, y in enumerate(results)})
    rng = np.random.default_rng(3)
    names = [f"y{i}" for i in range(len(results))]
    values = m.compute(names, numbers)
    w = {
        "_" + name: rng.normal(size=np.shape(y)) / np.abs(y).max()
        for name, y in zip(names, values, strict=True)
    }
    v = {key: value * rng.uniform(-1, 1) for key, value in numbers.items()}

    def gradient(h):
        point = {key: value + h * v[key] for key, value in numbers.items()}
        return np.array(m.compute_with_vjp(point, w)[1])

    _, pulled, hvp = m.compute_with_hvp(
        names, numbers, {**{key + "_": value for key, value in v.items()}, **w}
    )
    np.testing.assert_array_equal(pulled, gradient(0))
    h = 1e-4
    expected = (gradient(h) - gradient(-h)) / (2 * h)
    np.testing.assert_allclose(hvp, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())


def test_operators_agree_with_the_classes():
    m, point = growth_model(Ok0=0.1)
    D1, f1, D2, f2 = m.compute(["D1", "f1", "D2", "f2"], init=point)
    pt = MatterDominated(0.31, Omega0_k=0.1)
    for ours, theirs in zip((D1, f1, D2, f2), (pt.D1(A), pt.f1(A), pt.D2(A), pt.f2(A)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    m, point = one_parameter_model(expansion_rate, a=A, Ok0=0.1)
    np.testing.assert_allclose(m.compute("y", init=point), pt.E(A), rtol=1e-14)
    ai, ac, af = np.array([[0.1, 0.2, 0.4], [0.5, 0.6, 0.6]]).T
    m, point = one_parameter_model(kick_factor, ai=ai, ac=ac, af=af, Ok0=0.1)
    kick = (pt.Gf(af) - pt.Gf(ai)) / (ac**2 * pt.E(ac) * pt.gf(ac))
    np.testing.assert_allclose(m.compute("y", init=point), kick, rtol=1e-12)
    m, point = one_parameter_model(drift_factor, ai=ai, ac=ac, af=af, Ok0=0.1)
    drift = (pt.Gp(af) - pt.Gp(ai)) / (ac**3 * pt.E(ac) * pt.gp(ac))
    np.testing.assert_allclose(m.compute("y", init=point), drift, rtol=1e-12)
    cosmology = Cosmology(**PARAMETERS, Ok0=0.1)
    m, point = one_parameter_model(comoving_distance, z=2.0, Ok0=0.1)
    assert m.compute("y", init=point) == pytest.approx(cosmology.comoving_distance(2.0), rel=1e-14)
    m, point = power_model(z=2.0, Ok0=0.1)
    P = m.compute("y", init=point)
    np.testing.assert_allclose(P[:-1], LinearPower(cosmology, z=2.0)(WAVENUMBERS), rtol=1e-13)
    assert P[-1] == 0


def test_constant_parameters_cost_no_derivative(monkeypatch):
    from vmad_lit.lib import cosmology

    steps = []
    push = cosmology._push_forward
    monkeypatch.setattr(cosmology, "_push_forward", lambda *args: steps.append(1) or push(*args))
    with Builder() as m:
        sigma8 = m.input("sigma8")
        m.output(P=linear_power(0.31, 0.68, 0.965, sigma8, 0.049, k=WAVENUMBERS))
    P, [slope] = m.compute_with_vjp(init=dict(sigma8=0.8), v={"_P": np.ones_like(WAVENUMBERS)})
    assert slope == pytest.approx(2 * np.sum(P[0]) / 0.8, rel=1e-12)  # P goes with the square of sigma8
    assert len(steps) == 1


@pytest.mark.collective
def test_wavenumbers_may_be_distributed():
    """Each rank has its own wavenumbers; the gradient on every rank is that of the sum over all of them."""
    MPI = pytest.importorskip("mpi4py.MPI")
    mpi = pytest.importorskip("vmad_lit.lib.mpi")
    comm = MPI.COMM_WORLD
    mine = WAVENUMBERS[comm.rank :: comm.size]

    def gradient(k, spread):
        with Builder() as m:
            m.output(P=linear_power(*[spread(p) for p in m.input(*PARAMETERS)], k=k))
        return m.compute_with_vjp(init=PARAMETERS, v={"_P": 1e-3 * k})[1]

    ours = gradient(mine, lambda p: mpi.allbcast(p, comm))
    np.testing.assert_allclose(ours, gradient(WAVENUMBERS, lambda p: p), rtol=1e-11)


def test_factors_of_a_simulation_are_those_of_the_background():
    stages = np.array([0.1, 0.2, 0.5, 1.0])
    for Ok0 in (0.0, 0.1):
        pt = MatterDominated(0.31, Omega0_k=Ok0)
        expected = []
        for ai, af in pairwise(stages):
            ac = (ai * af) ** 0.5
            expected.append(
                [
                    1.5 * 0.31 * (pt.Gf(ac) - pt.Gf(ai)) / (ai**2 * pt.E(ai) * pt.gf(ai)),
                    (pt.Gp(af) - pt.Gp(ai)) / (ac**3 * pt.E(ac) * pt.gp(ac)),
                    1.5 * 0.31 * (pt.Gf(af) - pt.Gf(ac)) / (af**2 * pt.E(af) * pt.gf(af)),
                ]
            )
        np.testing.assert_allclose(step_factors.function(0.31, stages, Ok0), expected, rtol=1e-11)
        expected = [pt.D1(0.2), pt.D2(0.2), pt.Gf(0.2), pt.Gf2(0.2)]
        np.testing.assert_allclose(start_factors.function(0.31, 0.2, Ok0), expected, rtol=1e-13)
    assert step_factors.function(0.31, [0.5]).shape == (0, 3)
