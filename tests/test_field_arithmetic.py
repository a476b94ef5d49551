"""Arithmetic, element-wise functions and overloaded operators on the fields of a mesh, on any number of ranks."""

import numpy as np
import pytest

pytest.importorskip("pmesh")

from mpi4py import MPI  # noqa: E402
from pmesh.pm import ParticleMesh, RealField  # noqa: E402

from vmad_lit import Builder  # noqa: E402
from vmad_lit.core import stdlib  # noqa: E402
from vmad_lit.core.error import BadArgument  # noqa: E402
from vmad_lit.core.valuetypes import SMALL, value_type  # noqa: E402
from vmad_lit.lib import binary, fastpm, linalg, unary  # noqa: E402, F401
from vmad_lit import testing  # noqa: E402
from vmad_lit.testing import check_rank_invariance  # noqa: E402

pytestmark = pytest.mark.collective


def check(*args, **kwargs):
    """The proof of all derivatives, which must include the second one."""
    report = testing.check(*args, **kwargs)
    assert report.second is not None
    return report


def fields(dtype="f8", comm=MPI.COMM_WORLD):
    """A real field with values between 0.2 and 0.8, and a complex one."""
    pm = ParticleMesh(Nmesh=[4, 6, 4], BoxSize=1.0, dtype=dtype, comm=comm)
    real = pm.generate_whitenoise(3, type="real")
    real[...] = 0.5 + 0.3 * np.tanh(real[...])
    return real, pm.generate_whitenoise(4, type="complex", mean=1.0)


def names(module):
    return [name for name in module.__all__ if not isinstance(getattr(module, name), type)]


@pytest.mark.parametrize("dtype", ["f8", "f4"])
@pytest.mark.parametrize(
    "op", [stdlib.add, stdlib.sub, stdlib.mul, stdlib.div, stdlib.pow], ids=lambda op: op.__name__
)
def test_arithmetic_of_fields_and_numbers(op, dtype):
    r, c = fields(dtype)
    for pair in (r, r * 1.1), (r, 2.0), (2.0, r), (r, np.array(2.0, dtype)):
        check(op, *pair)
    if op is not stdlib.pow:
        for pair in (c + 20, c + 20.0), (c + 20, 2.0), (2.0, c + 20):
            check(op, *pair)


@pytest.mark.parametrize("dtype", ["f8", "f4"])
@pytest.mark.parametrize("name", names(unary))
def test_unary(name, dtype):
    r, _ = fields(dtype)
    r = r + 1.6 if name == "arccosh" else r
    value = check(getattr(unary, name), r).value
    assert type(value) is type(r)
    np.testing.assert_allclose(value.value, getattr(np, name)(r.value), rtol=1e-5)


def is_comparison(op):
    return issubclass(op.prototype, binary.comparison)


@pytest.mark.parametrize("name", [name for name in names(binary) if not is_comparison(getattr(binary, name))])
def test_binary(name):
    r, _ = fields()
    op = getattr(binary, name)
    check(op, r, r * 1.1)
    check(op, r, 0.5)


@pytest.mark.parametrize("name", [name for name in names(binary) if is_comparison(getattr(binary, name))])
def test_comparison(name):
    r, _ = fields()
    with Builder() as m:
        m.output(y=getattr(binary, name)(m.input("r"), 0.5))
    y = m.compute("y", dict(r=r))
    np.testing.assert_array_equal(y, getattr(np, name)(r.value, 0.5))


def test_a_zero_hides_infinite_cells():
    """The rule for zero times infinity, for fields, of which only some ranks have the infinite cells."""
    r, c = fields()
    if r.size:
        r.value.flat[0] = c.value.flat[0] = np.inf
    with Builder() as m:
        s, w = m.input("s", "w")
        m.output(y=linalg.to_scalar(s), dot=linalg.dot(s, w), scaled=s * w, ratio=w / s, root=s**0.5)
    flat = r.copy()
    flat[...] = np.isfinite(r.value)
    for out, zero in dict(y=0.0, dot=0.0, scaled=0 * flat, ratio=0 * flat, root=0 * flat).items():
        with np.errstate(all="ignore"):
            _, [_s, _w] = m.compute_with_vjp(dict(s=r, w=r), {"_" + out: zero})
            y_ = m.compute_with_jvp(out, dict(s=r, w=r), dict(s_=0 * flat, w_=0 * flat))[1]
        for value in _s, _w, y_:
            assert np.all(np.equal(getattr(value, "value", value), 0))
    with np.errstate(all="ignore"):
        finite, every = (
            m.compute_with_jvp("y", dict(s=x, w=x), dict(s_=flat, w_=flat))[1] for x in (masked(r), r)
        )
    np.testing.assert_allclose(every, finite)


def masked(field):
    """A copy with zeros for infinities."""
    copy = field.copy()
    copy[...] = np.where(np.isfinite(field.value), field.value, 0.0)
    return copy


@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_overloaded(dtype):
    r, c = fields(dtype)
    for op in linalg.to_scalar, linalg.norm, linalg.copy:
        check(op, r)
        check(op, c)
    check(linalg.sum, r, truth=lambda x: x.csum())
    check(linalg.mean, r, truth=lambda x: x.cmean())
    check(linalg.dot, r, r * 2.0)
    check(linalg.dot, c, c * 2.0 + 1.0)
    check(lambda r, b: linalg.to_scalar(linalg.exp(r * b) - 1.0 / b), r, 0.7)


def test_an_axis_of_a_field_is_refused():
    r, _ = fields()
    with Builder() as m:
        m.output(y=linalg.sum(m.input("x"), axis=0))
    with pytest.raises(BadArgument, match="RealField takes no argument 'axis'"):
        m.compute("y", dict(x=r))


def test_rank_invariance():
    def gradient(comm):
        r, c = fields(comm=comm)
        with Builder() as m:
            b, x, k = m.input("b", "x", "k")
            m.output(y=linalg.sum(linalg.exp(b * x)) + linalg.norm(k * b + 1.0) + linalg.mean(x / b))
        (y,), (_b, _x, _k) = m.compute_with_vjp(dict(b=0.7, x=r, k=c), dict(_y=1.0))
        return [y, _b, _x, _k]

    check_rank_invariance(gradient)


def test_the_cotangent_of_a_number_is_summed_over_all_ranks():
    r, _ = fields()
    with Builder() as m:
        b, x = m.input("b", "x")
        m.output(y=b * x)
    _, (_b, _x) = m.compute_with_vjp(dict(b=2.0, x=r), dict(_y=r))
    assert np.ndim(_b) == 0
    np.testing.assert_allclose(float(_b), r.cnorm())


def test_an_array_of_the_shape_of_a_field_has_an_array_for_its_cotangent():
    pm = ParticleMesh([4, 4], 1.0, dtype="f8")
    field, array = pm.create(type=RealField, value=1.0), np.ones(pm.create(type=RealField).shape)
    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(y=a + b)
    _, cotangents = m.compute_with_vjp(dict(a=field, b=array), dict(_y=field))
    assert [type(g) for g in cotangents] == [RealField, np.ndarray]


def test_fields_are_summed_in_place_and_cotangents_stay(monkeypatch):
    pm = ParticleMesh([64, 64], 1.0, dtype="f8")
    values = [pm.create(type=RealField, value=float(i)) for i in range(6)]
    with Builder() as m:
        x = m.input("x")
        m.output(**{f"y{i}": x + (0.5 + i) for i in range(6)})
    fields = []
    kind = value_type(values[0])
    plain = kind.add_in_place
    monkeypatch.setattr(
        kind, "add_in_place", lambda total, part: plain(total, part) and not fields.append(total)
    )
    _, [_x] = m.compute_with_vjp(dict(x=values[0]), {f"_y{i}": values[i] for i in range(6)})
    assert type(_x) is RealField and np.all(_x.value == 15.0)
    assert all(np.all(value.value == i) for i, value in enumerate(values))
    assert len(fields) in (0, 4)  # few rows on a rank are a small array
    assert all(field is fields[0] and np.all(field.value == 15.0) for field in fields)
    assert all(field is not _x for field in fields)  # we hold the sum, too, so the caller gets a copy
    assert len(fields) == 4 or _x.value.nbytes < SMALL
