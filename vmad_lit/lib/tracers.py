"""From particles to what is observed: densities, positions in redshift space, and biased tracers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy

from vmad_lit import autooperator, operator
from vmad_lit.core.arguments import plain_array, positive, real_array, whole_number
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import BaseSymbol, Symbol, Value
from vmad_lit.lib import fastpm, linalg
from vmad_lit.lib.cosmology import Background
from vmad_lit.lib.exchange import agree_on_lattice
from vmad_lit.lib.mesh import ParticleMesh, on_mesh
from vmad_lit.lib.mpi import MPI, add_up, allbcast
from vmad_lit.lib.spectra import Direction, unit_vector
from vmad_lit.lib.transfer import Transfer

is_zero = type(ZeroGradient).is_zero


@autooperator("x, mass -> rho")
def density(x: Symbol, mass: Value, q: Array, pm: ParticleMesh) -> Symbol:
    """The density of particles in units of its mean, 1 + delta.

    Parameters
    ----------
    x : (N, ndim) positions
    mass : one number or (N,), in units of the mass that each would have if all had the same
    q : (N, ndim) the lattice from which they came; it only tells how many there are on all ranks
    pm : ParticleMesh of any number of cells
    """
    number = add_up(pm.comm, len(agree_on_lattice(q, pm)))
    if number == 0:
        raise ValueError("a density in units of its mean needs particles, but q has none on any rank")
    per_cell = number / float(pm.Nmesh.prod())
    return fastpm.paint(x, mass, fastpm.decompose(x, pm), pm) * (1.0 / per_cell)


@operator
class plain_numbers:
    """Numbers as they are, after a check that they are finite and have the shape expected, under a name."""

    ain = {"x": "*"}
    aout = {"y": "*"}
    hvp = ZeroGradient

    def apl(node, x, name, shape):
        return dict(y=real_array(name, x, shape=shape).copy()[()])

    def vjp(node, _y):
        return dict(_x=_y)

    def jvp(node, x_):
        return dict(y_=x_)


def velocity(p: Value, a: float) -> Value:
    """Peculiar velocities in km/s, from momenta a^2 dx/dt / H0 in Mpc/h at scale factor a."""
    factor = 100.0 / positive("a", a)
    return (p if isinstance(p, BaseSymbol) else real_array("p", p)) * factor


def redshift_factor(pt: Background, a: float) -> float:
    """The factor 1 / (a^2 E) from momenta to displacements in redshift space; `pt` is the background."""
    a = positive("a", a)
    return float(1 / (a**2 * pt.E(a)))


def _dot(a: Array, b: Array) -> Array:
    return (a * b).sum(axis=-1, keepdims=True)


def vectors(name: str, v: Any) -> Array:
    """`v` as an array (N, ndim) of real numbers, without a look at all of them."""
    v = plain_array(name, v)
    if v.ndim != 2 or v.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers of the shape (N, ndim), not {v.dtype}{v.shape}")
    return v


class Sight:
    """Lines of sight: unit vectors `n`, and inverse distances `w`, which are 0 for a distant observer."""

    n: Array
    w: Value

    def __init__(self, x: Array, los: Direction, observer: Direction) -> None:
        if (los is None) == (observer is None):
            raise ValueError("give either los, an axis or a direction, or the position of an observer")
        x = vectors("positions", x)
        ndim, dtype = x.shape[1], numpy.result_type(x, "f4")
        if observer is None:
            self.n, self.w = unit_vector("los", los, ndim).astype(dtype), 0

        else:
            r = x - real_array("observer", observer, shape=(ndim,)).astype(dtype)
            distance = _dot(r, r) ** 0.5
            self.w = numpy.divide(1, distance, out=numpy.zeros_like(distance), where=distance > 0)
            self.n = r * self.w

    def across(self, v: Array) -> Array:
        """P v: the part of `v` perpendicular to the line of sight, over the distance."""
        return (v - self.n * _dot(self.n, v)) * self.w


@operator
class along_sight:
    """The component of vectors along the line of sight, (v . n) n.

    Parameters
    ----------
    x, v : (N, ndim) positions and vectors
    los : an axis or a direction, for an observer at a great distance; or
    observer : (ndim,) the position of a near one
    """

    ain = {"x": "ndarray", "v": "ndarray"}
    aout = {"y": "ndarray"}

    def apl(node, x, v, los=None, observer=None):
        n, v = Sight(x, los, observer).n, vectors("v", v)
        if v.shape != numpy.shape(x):
            raise ValueError(f"v must have the shape of the positions, {numpy.shape(x)}, not {v.shape}")
        return dict(y=_dot(v, n) * n)

    def vjp(node, _y, x, v, los, observer):
        s = Sight(x, los, observer)
        across = observer is not None and not node.is_literal("x")
        _x = s.across(v) * _dot(s.n, _y) + s.across(_y) * _dot(s.n, v) if across else ZeroGradient
        return dict(_x=_x, _v=_dot(s.n, _y) * s.n)

    def jvp(node, x_, v_, x, v, los, observer):
        s = Sight(x, los, observer)
        y_ = 0 if is_zero(v_) else _dot(s.n, v_) * s.n
        if observer is not None and not is_zero(x_):
            n_ = s.across(x_)
            y_ = y_ + _dot(v, n_) * s.n + _dot(v, s.n) * n_
        return dict(y_=ZeroGradient if numpy.ndim(y_) == 0 else y_)

    # The second derivative of the component along the line of sight
    def hvp(node, _y, x_, v_, x, v, los, observer):
        if observer is None:
            return dict(_x_=ZeroGradient, _v_=ZeroGradient)
        s = Sight(x, los, observer)
        x_, v_ = (numpy.zeros_like(x) if is_zero(d) else d for d in (x_, v_))
        n_ = s.across(x_)

        def change(u: Array) -> Array:
            return -(n_ * _dot(s.n, u) + s.n * _dot(n_, u) + s.across(u) * _dot(s.n, x_)) * s.w

        _x_ = s.across(v) * _dot(n_, _y) + (change(v) + s.across(v_)) * _dot(s.n, _y)
        _x_ = _x_ + s.across(_y) * (_dot(n_, v) + _dot(s.n, v_)) + change(_y) * _dot(s.n, v)
        return dict(_x_=_x_, _v_=n_ * _dot(s.n, _y) + s.n * _dot(n_, _y))


@autooperator("x, p, factor -> s")
def redshift_space(
    x: Symbol,
    p: Symbol,
    factor: Value,
    comm: MPI.Comm,
    los: Direction = None,
    observer: Direction = None,
) -> Symbol:
    """Positions in redshift space, from positions and momenta.

    Parameters
    ----------
    x, p : (N, ndim) positions, and momenta a^2 dx/dt / H0 as in FastPM
    factor : number, 1 / (a^2 E), see `redshift_factor`; replicated
    comm : MPI communicator
    los, observer : see `along_sight`

    Returns
    -------
    s : (N, ndim), not wrapped into the box
    """
    factor = allbcast(plain_numbers(factor, "factor", ()), comm)
    return x + along_sight(x, p, los, observer) * factor


@functools.lru_cache(maxsize=None)
def tidal_transfer(i: int, j: int) -> Transfer:
    """The transfer function k_i k_j / k^2 of second derivatives of an inverse Laplacian, 0 for the mean."""
    i, j = (whole_number("an axis", axis, least=0) for axis in (i, j))

    @fastpm.fixed_transfer
    def transfer(k: Any) -> Array:
        k2 = k.normp(2)
        product = k[i] * k[j] / numpy.where(k2 == 0, 1, k2)
        for d in {i, j} if i != j else ():
            product = product * (abs(k[d]) < numpy.pi / k.BoxSize[d] * (k.Nmesh[d] - 0.01))
        return product

    return transfer


@fastpm.fixed_transfer
def laplace_transfer(k: Any) -> Array:
    """The transfer function of the Laplacian, -k^2."""
    return -k.normp(2)


def tidal_square(rhok: Symbol, delta: Symbol, pm: ParticleMesh) -> Symbol:
    """The square of the traceless tidal field, from the modes of a field and its values."""
    total = delta * delta * (-1.0 / pm.ndim)
    for j in range(pm.ndim):
        for i in range(j + 1):
            D = fastpm.c2r(fastpm.apply_transfer(rhok, tidal_transfer(i, j)))
            total = total + D * D * (1.0 if i == j else 2.0)
    return total


BIAS_TERMS = ("b1", "b2", "bs2", "bnabla2")


def check_terms(terms: Sequence[str]) -> None:
    """Raise an error unless these are names of terms of the bias expansion."""
    if not isinstance(terms, (list, tuple)) or not terms or any(term not in BIAS_TERMS for term in terms):
        raise ValueError(f"terms must be some of {BIAS_TERMS}, not {terms!r}")


@autooperator("rhok -> fields")
def lagrangian_fields(rhok: Symbol, q: Array, pm: ParticleMesh, terms: Sequence[str] = BIAS_TERMS) -> Symbol:
    """The terms of the Lagrangian bias expansion at the points of a lattice.

    Parameters
    ----------
    rhok : complex field, the linear density contrast to which the bias parameters refer
    q : (N, ndim) lattice; the fields are read with the window of `pm`, which at points of the mesh is exact
    pm : ParticleMesh
    terms : which terms: any of 'b1' (delta), 'b2' (delta^2), 'bs2' (s^2), 'bnabla2' (Laplacian of delta)

    Returns
    -------
    fields : (N, nterms); squares have no mean
    """

    check_terms(terms)
    rhok, q = on_mesh(rhok, pm), agree_on_lattice(q, pm)
    delta = fastpm.c2r(rhok)
    meshes = []
    for term in terms:
        if term == "b1":
            meshes.append(delta)
        elif term == "bnabla2":
            meshes.append(fastpm.c2r(fastpm.apply_transfer(rhok, laplace_transfer)))
        else:
            square = delta * delta if term == "b2" else tidal_square(rhok, delta, pm)
            meshes.append(square - linalg.mean(square))
    return fastpm.readout_all(meshes, q, fastpm.decompose(q, pm))


@autooperator("rhok, b -> w")
def lagrangian_weights(
    rhok: Symbol, b: Value, q: Array, pm: ParticleMesh, terms: Sequence[str] = BIAS_TERMS
) -> Symbol:
    """The weights of particles as biased tracers, 1 + sum of b times the fields (Modi, Chen & White 2020).

    `b` are the bias parameters (nterms,), replicated; for the rest see `lagrangian_fields`. The weights are
    those of Lagrangian space: carried along with the particles, they make a tracer of linear bias 1 + b1.
    """
    check_terms(terms)
    b = plain_numbers(b, "b", (len(terms),))
    fields = lagrangian_fields(rhok, q, pm, terms)
    return linalg.einsum("ij,j->i", [fields, allbcast(b, pm.comm)]) + 1.0


@autooperator("rho, b -> y")
def eulerian_bias(rho: Symbol, b: Value) -> Symbol:
    """The density 1 + b (rho - 1) of tracers of linear bias b, a number, from that of matter."""
    return (rho - 1.0) * plain_numbers(b, "b", ()) + 1.0
