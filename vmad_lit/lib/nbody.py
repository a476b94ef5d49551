"""N-body simulation by the FastPM scheme: kicks and drifts that know about growth, with derivatives.

Feng, Chu, Seljak & McDonald (2016), MNRAS 463, 2273.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import ArrayLike, DTypeLike

from vmad_lit import autooperator, operator
from vmad_lit.core.arguments import real_array, real_number
from vmad_lit.core.chain import checkpoint
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Symbol, Value
from vmad_lit.lib import memory

from vmad_lit.lib.axpy import (
    add_multiple,
    alike,
    axpy,
    copy_of,
    multiple,
    own_copy,
    plus_multiple,
    room_for,
    sum_products,
)
from vmad_lit.lib.cosmology import (
    Background,
    HasMatter,
    MatterDominated,
    Numbers,
    SymbolicBackground,
    drift_factor,
    kick_factor,
    start_factors,
    step_factors,
)
from vmad_lit.lib.exchange import Displaced, agree_on_lattice, decompose, lay_out
from vmad_lit.lib.force import force, window_for_force
from vmad_lit.lib.linalg import einsum, reshape
from vmad_lit.lib.mesh import Field, ParticleMesh, agree, as_rows, common_dtypes, is_zero
from vmad_lit.lib.mpi import add_up, allbcast
from vmad_lit.lib.painting import in_dtype_of

# Import what the whole simulation needs
from vmad_lit.lib.costs import check_simulation
from vmad_lit.lib.lpt import lpt

try:
    from vmad_lit.lib import loops
except ImportError:  # no numba
    loops = None  # type: ignore[assignment]

AnyBackground = Background | SymbolicBackground
Pair = tuple[Array, Array]


@autooperator("dx -> f, potk")
def gravity(dx: Symbol, q: Array, pm: ParticleMesh, keep_potential: bool = True) -> tuple[Symbol, Symbol]:
    """The force on particles at q + dx.

    Parameters
    ----------
    dx : (N, ndim) displacements
    q : (N, ndim) lattice
    pm : ParticleMesh on which the force is computed
    keep_potential : see `force`

    Returns
    -------
    f : (N, ndim), minus the gradient of the potential whose Laplacian is the density contrast
    potk : complex field, the modes of the potential. It costs nothing if it is not used
    """
    x, lattice = (axpy(q, dx, 1.0), None) if isinstance(q, Symbol) else (dx, q)
    return force(x, decompose(x, pm, lattice=lattice), pm, keep_potential=keep_potential, lattice=lattice)


def KickFactor(pt: AnyBackground, ai: Numbers, ac: Numbers, af: Numbers) -> Numbers:
    """FastPM's coefficient of a kick from ai to af by a force at ac (Feng et al. 2016).

    `pt` is the background, such as `MatterDominated`. The momentum changes by 1.5 * Om0 * KickFactor * f.
    """
    if isinstance(pt, SymbolicBackground):
        return kick_factor(pt.Om0, ai, ac, af, pt.Ok0)
    return 1 / (ac**2 * pt.E(ac)) * (pt.Gf(af) - pt.Gf(ai)) / pt.gf(ac)


def DriftFactor(pt: AnyBackground, ai: Numbers, ac: Numbers, af: Numbers) -> Numbers:
    """FastPM's coefficient of a drift from ai to af with the momentum at ac (Feng et al. 2016)."""
    if isinstance(pt, SymbolicBackground):
        return drift_factor(pt.Om0, ai, ac, af, pt.Ok0)
    return 1 / (ac**3 * pt.E(ac)) * (pt.Gp(af) - pt.Gp(ai)) / pt.gp(ac)


def factors_of_step(pt: Background, ai: float, af: float) -> tuple[float, float, float]:
    """The coefficients of the two kicks and the drift between them: kick, drift, kick."""
    ac = (ai * af) ** 0.5
    return (
        float(KickFactor(pt, ai, ai, ac) * 1.5 * pt.Om0),
        float(DriftFactor(pt, ai, ac, af)),
        float(KickFactor(pt, ac, af, af) * 1.5 * pt.Om0),
    )


def join_kicks(n: int) -> Array:
    """The matrix that makes the kicks and drifts in turn from kick, drift and kick of each of n steps."""
    matrix = numpy.zeros((2 * n + 1, 3 * n))
    for i in range(n):
        for j in range(3):
            matrix[2 * i + j, 3 * i + j] = 1.0
    return matrix


class ForceAt:
    """The force on particles displaced by `dx` from a lattice `q`, and its transpose, which add to what is there.

    `layout`, `pot` and `factor` are those that an earlier object had for the same positions, or None. Displacements
    that are new are made by a function, whose errors all ranks raise.
    """

    def __init__(
        self,
        dx: Array | Callable[[], Array],
        q: Array,
        pm: ParticleMesh,
        layout: Any = None,
        pot: Field | None = None,
        factor: float | None = None,
    ) -> None:

        if callable(dx):
            x, layout = lay_out(dx, pm, new=False, lattice=q)
        else:
            x = Displaced(dx, q)
        self.x, self.layout, self.pm, self.pot = x, layout, pm, pot
        self.factor = force.find_factor(x, pm) if factor is None else factor
        self._window = window_for_force(pm, layout)
        self._local_x = self._window.bring(x)

    def kick(self, p: Array, c: float, out: Array) -> None:
        """p + c * force into `out`, which may be `p`."""
        meshes = self._meshes()
        self._add(lambda rows, **to: self._window.readout(meshes, self._local_x[rows], **to), p, c, out)

    def force(self) -> Iterator[tuple[slice, Array]]:
        """Rows of particles, and the force on them."""
        meshes = self._meshes()
        for rows in self._blocks():
            yield rows, self._bring_back(self._window.readout(meshes, self._local_x[rows]))

    def write_force(self, out: Array) -> Array:
        """The force on all particles, into `out`."""
        for rows, part in self.force():
            out[rows] = part
        return out

    def pull(self, _f: Array, _x: Array, c: float, out: Array) -> None:
        """_x plus c times the cotangent of the positions from that of the force, into `out`, which may be `_x`; once."""
        _f, x, w = self._window.bring(_f), self._local_x, self._window
        _potk = force.pull_meshes(w, x, _f, 1)
        pot, self.pot = force.find_potential(self.pot, w, x, self.factor, 1), None
        meshes = force.meshes(w, pot, 1, force.pull_density(_potk, self.factor))
        del pot, _potk
        self._add(lambda rows, **to: w.weighted_gradient(meshes, x[rows], _f[rows], **to), _x, c, out)

    def record(self) -> dict[str, Any]:
        """What the derivatives of the force ask for; the potential is computed once."""
        self._find_potential()
        return dict(x=self.x, layout=self.layout, pm=self.pm, order=1, pot=self.pot, factor=self.factor)

    def push(self, x_: Value) -> Value:
        """The tangent of the force on all particles from that of the positions."""
        return force.jvp.impl(None, x_=x_, **self.record())["f_"]

    def pull_change(self, _f: Value, _f_: Value, x_: Value) -> Value:
        """The change of the cotangent of all positions, from that of the force, its change, and a tangent."""
        record = dict(_potk=ZeroGradient, **self.record())
        return plus_multiple(
            force.vjp.impl(None, _f=_f_, **record)["_x"],
            force.hvp.impl(None, _f=_f, x_=x_, **record)["_x_"],
            1.0,
        )

    # Add what is found for particles
    def _add(self, find: Callable[..., Array], base: Array, c: float, out: Array) -> None:
        """base + c * what `find` finds for rows of particles, into `out`; for some at a time, if need be."""
        direct = (
            self._window.stays and self._window.compiled and alike(base, out) and out.dtype == self.x.dtype
        )
        for rows in [slice(None)] if direct else self._blocks():
            if direct:
                find(rows, out=out[rows], base=base[rows], factor=c)
            else:
                add_multiple(base[rows], self._bring_back(find(rows)), c, out=out[rows])

    def _blocks(self) -> Iterator[slice]:
        """The rows of some particles after others; all at once, if they travel between ranks."""
        if not self._window.stays:
            yield slice(None)
            return
        for start in range(0, len(self.x), self.BLOCK):
            yield slice(start, start + self.BLOCK)

    def _bring_back(self, values: Array) -> Array:
        return in_dtype_of(self._window.bring_back(values), self.x)

    def _find_potential(self) -> None:
        self.pot = force.find_potential(self.pot, self._window, self._local_x, self.factor, 1)

    def _meshes(self) -> list[Any]:
        """The components of the force on the mesh."""
        self._find_potential()
        return force.meshes(self._window, self.pot, 1)

    BLOCK = 1 << 17  # particles: some megabytes of their forces


def check_state(q: Value, dx: Value, p: Value, *coefficients: Value) -> str:
    """Raise an error unless lattice, displacements and momenta are arrays of one shape, and coefficients numbers."""
    shapes = [numpy.shape(x) for x in (q, dx, p)]
    if len(set(shapes)) > 1 or not all(isinstance(x, numpy.ndarray) for x in (q, dx, p)):
        raise ValueError(
            f"lattice, displacements and momenta must be arrays of one shape, not {', '.join(map(str, shapes))}"
        )
    return f"{len([float(c) for c in coefficients])} coefficients"


def _apply_kick_drift(
    gravity: ForceAt,
    dx_i: Array,
    p_i: Array,
    kick: float,
    drift: float,
    dx: Array,
    p: Array,
    f: Array | None = None,
) -> None:
    """p_i + kick * f into `p`, and dx_i plus drift times that into `dx`; the force into `f`, if it is given."""
    if f is None:
        gravity.kick(p_i, kick, p)
    else:
        add_multiple(p_i, gravity.write_force(f), kick, out=p)
    if drift or dx is not dx_i:
        add_multiple(dx_i, p, drift, out=dx)


@operator
class kick_drift:
    """A kick by the force at the positions, and the drift after it.

    Parameters
    ----------
    dx_i, p_i : (N, ndim) displacements and momenta
    kick, drift : numbers, as in `axpy`
    q : (N, ndim) lattice
    pm : ParticleMesh on which the force is computed
    keep_potential : see `force`

    Returns
    -------
    p : (N, ndim), p_i + kick * f, with the force of `gravity` at dx_i
    dx : (N, ndim), dx_i + drift * p
    """

    ain = {"dx_i": "ndarray", "p_i": "ndarray", "kick": "*", "drift": "*"}
    aout = {"dx": "ndarray", "p": "ndarray"}
    collective = True
    fresh = True
    inplace = "p_i", "_dx", "_p"

    def apl(node, dx_i, p_i, kick, drift, q, pm, keep_potential=True):
        def find_displacements() -> Array:
            check_state(q, dx_i, p_i, kick, drift)
            return dx_i

        gravity = ForceAt(find_displacements, q, pm)
        if (
            not node.needs("dx")
            and not node.needs("p")
            and node.is_literal("kick")
            and node.is_literal("drift")
        ):
            return dict(dx=None, p=None, f=None, gravity=gravity)

        # The tape keeps the displacements before
        dx, p = memory.empty_like(dx_i), room_for(node, "p_i", p_i, p_i)
        f = None if node.is_literal("kick") else memory.empty_like(p)
        _apply_kick_drift(gravity, dx_i, p_i, float(kick), float(drift), dx, p, f)
        return dict(dx=dx, p=p, f=f, gravity=gravity)

    def rcd(node, dx_i, p_i, kick, drift, q, pm, keep_potential, dx, p, f, gravity):
        return dict(
            dx_i=gravity.x.displacement,
            q=gravity.x.lattice,
            layout=gravity.layout,
            pot=gravity.pot if keep_potential else None,
            factor=gravity.factor,
            kick=kick,
            drift=drift,
            pm=pm,
            f=f,
            p=None if node.is_literal("drift") else copy_of(p),
        )

    def vjp(node, _dx, _p, dx_i, q, layout, pot, factor, f, p, kick, drift, pm):
        # Pull the cotangents back through a kick and a drift
        dtypes = [dtype for dtype in common_dtypes(pm.comm, _dx, _p) if dtype is not None]
        if not dtypes:
            return dict(_dx_i=ZeroGradient, _p_i=ZeroGradient, _kick=ZeroGradient, _drift=ZeroGradient)
        dtype, _kick, _drift = numpy.result_type(*dtypes), ZeroGradient, ZeroGradient
        _dx = as_rows(0.0 if is_zero(_dx) else _dx, dx_i.shape, dtype)
        if node.needs("drift"):
            _drift = sum_products(_dx, p)

        if is_zero(_p):
            # In memory of its own even if the drift is one, since _dx may be overwritten
            _p_i = numpy.multiply(_dx, float(drift), out=memory.empty_like(_dx))
        else:
            _p = as_rows(_p, dx_i.shape, dtype)
            _p_i = add_multiple(_p, _dx, float(drift), out=room_for(node, "_p", _p, _p))

        if node.needs("kick"):
            _kick = sum_products(_p_i, f)
        _dx_i = room_for(node, "_dx", _dx, _dx)
        ForceAt(dx_i, q, pm, layout, pot, factor).pull(_p_i, _dx, float(kick), _dx_i)
        return dict(_dx_i=_dx_i, _p_i=_p_i, _kick=_kick, _drift=_drift)

    def jvp(node, dx_i_, p_i_, kick_, drift_, dx_i, q, layout, pot, factor, f, p, kick, drift, pm):
        f_ = ForceAt(dx_i, q, pm, layout, pot, factor).push(dx_i_)
        p_ = plus_multiple(plus_multiple(p_i_, f_, kick), f, kick_)
        return dict(dx_=plus_multiple(plus_multiple(dx_i_, p_, drift), p, drift_), p_=p_)

    def hvp(node, _dx, _p, dx_i_, p_i_, kick_, drift_, dx_i, q, layout, pot, factor, f, kick, drift, pm):
        # Change the cotangents of a kick and a drift
        gravity, _kick_, _drift_ = ForceAt(dx_i, q, pm, layout, pot, factor), ZeroGradient, ZeroGradient
        _p_i, _p_i_ = plus_multiple(_p, _dx, drift), multiple(_dx, drift_)
        _f, _f_ = multiple(_p_i, kick), plus_multiple(multiple(_p_i_, kick), _p_i, kick_)
        _dx_i_ = gravity.pull_change(_f, _f_, dx_i_)
        if node.needs("kick") or node.needs("drift"):
            f_ = gravity.push(dx_i_)
            _kick_ = sum_products(_p_i, f_) + sum_products(_p_i_, f)
            _drift_ = sum_products(_dx, plus_multiple(plus_multiple(p_i_, f_, kick), f, kick_))
        return dict(_dx_i_=_dx_i_, _p_i_=_p_i_, _kick_=_kick_, _drift_=_drift_)


class StepFactors:
    """The coefficients of the kicks and drifts between scale factors, in turn.

    Parameters
    ----------
    pt : background, such as `MatterDominated`
    stages : sequence of n + 1 scale factors
    pm : ParticleMesh, whose ranks share the coefficients

    Attributes
    ----------
    n : the number of steps
    factors : (2 n + 1,) the coefficients; a symbol if the background is one
    Om0 : of the background
    """

    __symbols__ = "Om0", "factors"

    def __init__(self, pt: AnyBackground, stages: Sequence[float], pm: ParticleMesh) -> None:
        self.n = len(stages) - 1
        if isinstance(pt, SymbolicBackground):
            # Compute the coefficients from a symbol
            self.Om0 = allbcast(pt.Om0, pm.comm)
            table = allbcast(step_factors(pt.Om0, list(stages), pt.Ok0), pm.comm)
            self.factors = einsum("ij,j->i", [join_kicks(self.n), reshape(table, (3 * self.n,))])
        else:
            steps = [factors_of_step(pt, ai, af) for ai, af in zip(stages[:-1], stages[1:])]
            self.Om0, self.factors = pt.Om0, join_kicks(self.n) @ numpy.ravel(steps)

    def kick(self, i: int) -> Any:
        """The coefficient of the kick at stage i."""
        return self[2 * i]

    def drift(self, i: int) -> Any:
        """The coefficient of the drift from stage i to the next."""
        return self[2 * i + 1]

    def __getitem__(self, i: int) -> Any:
        return pick(self.factors, i) if isinstance(self.factors, Symbol) else float(self.factors[i])


@autooperator("dx_i, p_i -> dx, p")
def leapfrog_step(
    dx_i: Symbol,
    p_i: Symbol,
    q: Array,
    steps: StepFactors,
    pm: ParticleMesh,
    i: int,
    keep_potential: bool = True,
) -> Symbol:
    """The kick at a stage and the drift to the next.

    Parameters
    ----------
    dx_i, p_i : (N, ndim) displacements and momenta; the momenta are those in the middle of the step before
    q : (N, ndim) lattice
    steps : `StepFactors`
    pm : ParticleMesh on which the force is computed
    i : the number of the stage
    keep_potential : see `force`

    Returns
    -------
    dx, p : displacements at the next stage, and momenta in the middle of the step
    """
    return kick_drift(dx_i, p_i, steps.kick(i), steps.drift(i), q, pm, keep_potential)


@operator
class pick:
    """A number of an array as a float, by its position in the order of rows."""

    ain = {"x": "ndarray"}
    aout = {"y": "*"}

    def apl(node, x, at):
        return dict(y=float(numpy.ravel(x)[at]), shape=numpy.shape(x))

    def vjp(node, _y, at, shape):
        _x = numpy.zeros(shape)
        _x.flat[at] = _y
        return dict(_x=_x)

    def jvp(node, x_, at):
        return dict(y_=float(numpy.ravel(x_)[at]))

    hvp = ZeroGradient


@operator
class scale:
    """c * v, for an array and a number c; as `axpy`."""

    ain = {"v": "ndarray", "c": "*"}
    aout = {"y": "ndarray"}

    def apl(node, v, c):
        return dict(y=multiple(v, float(c)))

    def rcd(node, v, c, y):
        return dict(c=c, v=None if node.is_literal("c") else v)

    def vjp(node, _y, v, c):
        return dict(_v=multiple(_y, float(c)), _c=sum_products(_y, v) if node.needs("c") else ZeroGradient)

    def jvp(node, v_, c_, v, c):
        return dict(y_=plus_multiple(multiple(v_, float(c)), v, c_))

    def hvp(node, _y, v_, c_):
        return dict(_v_=_y * c_, _c_=sum_products(_y, v_) if node.needs("c") else ZeroGradient)


@autooperator("dx_i, p_i -> dx, p, f")
def leapfrog(
    dx_i: Symbol,
    p_i: Symbol,
    q: Array,
    stages: ArrayLike,
    pt: AnyBackground,
    pm: ParticleMesh,
    ram: int | None = None,
    reversible: bool = False,
    keep_potential: bool = True,
    disk: int | None = None,
    folder: str | None = None,
) -> tuple[Symbol, Symbol, Symbol]:
    """Evolve particles through kick-drift-kick steps between the given scale factors.

    Parameters
    ----------
    dx_i, p_i : (N, ndim) displacements and momenta at stages[0]
    q : (N, ndim) lattice
    stages : sequence of scale factors
    pt : background, such as `MatterDominated`
    pm : ParticleMesh on which the force is computed
    ram, disk : how many states to keep in memory and on disk for the derivatives, which recompute steps between
        them; if both are None, all steps are kept
    reversible : keep the last state only, and undo the steps for the derivatives, see `reversible_leapfrog`
    keep_potential : keep the potential of each step besides the positions, see `force`
    folder : where to put the states on disk, see `checkpoint`

    Returns
    -------
    dx, p : displacements and momenta at stages[-1]
    f : the force there, times 1.5 * Om0
    """

    steps = StepFactors(pt, check_stages(stages, backwards=True), pm)
    # Evolve by steps that can be undone
    if reversible:
        if ram is not None or disk is not None:
            raise ValueError("either keep states (ram, disk) or undo the steps (reversible), not both")
        dx, p, f = reversible_leapfrog(dx_i, p_i, steps.factors, q, pm)
        return dx, p, scale(f, 1.5 * steps.Om0)
    dx, p = dx_i, p_i
    if ram is None and disk is None or steps.n == 0:
        for i in range(steps.n):
            dx, p = leapfrog_step(dx, p, q, steps, pm, i, keep_potential)
    else:
        # Evolve with checkpoints
        chain = checkpoint(leapfrog_step, n=steps.n, ram=ram or 0, disk=disk or 0, folder=folder)
        dx, p = chain(dx, p, q=q, steps=steps, pm=pm, keep_potential=keep_potential)
    f, potk = gravity(dx, q, pm, keep_potential)
    return dx, axpy(p, f, steps.kick(steps.n)), scale(f, 1.5 * steps.Om0)


def check_stages(stages: ArrayLike, backwards: bool = False) -> list[float]:
    """The scale factors of a simulation as a list of floats, which must rise, to at most 1, or also fall (`backwards`)."""
    stages = numpy.atleast_1d(
        real_array("stages, positive scale factors,", stages, above=0, most=1 + 1e-9)
    ).astype("f8")
    steps = numpy.diff(stages)
    in_order = (steps > 0).all() or backwards and (steps < 0).all()
    if stages.ndim != 1 or len(stages) == 0 or not in_order:
        raise ValueError(
            f"stages must be a sequence of positive scale factors, each larger than the last, not {stages}"
        )
    return stages.tolist()


@operator
class reversible_leapfrog:
    """Kick-drift-kick steps whose derivatives keep the last state and integrate backwards.

    Rounding errors grow on the way back as they do on the way there, so that the derivatives are those of
    the steps up to these errors; how large they are is measured in the chapter on what a run costs.

    Parameters
    ----------
    dx_i, p_i : (N, ndim) displacements and momenta at the first stage
    factors : (2 n + 1,) coefficients of the kicks and drifts of n steps in turn, as of `StepFactors`
    q : (N, ndim) lattice
    pm : ParticleMesh on which the force is computed

    Returns
    -------
    dx, p, f : (N, ndim) displacements, momenta, and the force of `gravity`, after the last step
    """

    ain = {"dx_i": "ndarray", "p_i": "ndarray", "factors": "*"}
    aout = {"dx": "ndarray", "p": "ndarray", "f": "ndarray"}
    collective = True
    fresh = True
    inplace = "dx_i", "p_i", "dx", "p", "_dx", "_p"

    # Undo the steps
    @staticmethod
    def undo(
        dx: Array,
        p: Array,
        factors: Array,
        q: Array,
        pm: ParticleMesh,
        kicked: bool = True,
        _p: Value = ZeroGradient,
    ) -> Iterator[tuple[int, ForceAt | None, float]]:
        """From the state at the end: the state before each kick i, last first.

        Yields (i, gravity, _p . f), while `dx`, `p`, which are overwritten, are the state and `gravity` knows
        the force there. If `kicked` is false the last kick has not been taken, and `gravity` is None.
        """

        n = len(factors) // 2
        for i in reversed(range(n + 1)):
            if i < n or kicked:
                yield i, *reversible_leapfrog.take_back(dx, p, factors[2 * i], q, pm, _p)
            else:
                yield i, None, 0.0
            if i > 0:
                add_multiple(dx, p, -factors[2 * i - 1], out=dx)

    @staticmethod
    def take_back(
        dx: Array, p: Array, kick: float, q: Array, pm: ParticleMesh, _p: Value
    ) -> tuple[ForceAt, float]:
        """Undo a kick in place."""
        gravity, product = ForceAt(lambda: dx, q, pm), 0.0
        if is_zero(_p):
            gravity.kick(p, -float(kick), p)
            return gravity, product
        for rows, f in gravity.force():
            product += sum_products(_p[rows], f)
            add_multiple(p[rows], f, -kick, out=p[rows])
        return gravity, product

    # There and back
    def apl(node, dx_i, p_i, factors, q, pm):
        agree(pm.comm, lambda: (check_state(q, dx_i, p_i, *factors),))
        dx, p, f, n = (
            own_copy(node, "dx_i", dx_i, dx_i),
            own_copy(node, "p_i", p_i, p_i),
            None,
            len(factors) // 2,
        )

        for i in range(n):
            gravity = ForceAt(lambda: dx, q, pm)
            _apply_kick_drift(gravity, dx, p, factors[2 * i], factors[2 * i + 1], dx, p)
            del gravity
        if node.needs("p") or node.needs("f"):
            f = memory.empty_like(p)
            _apply_kick_drift(ForceAt(lambda: dx, q, pm), dx, p, factors[2 * n], 0.0, dx, p, f)
        return dict(dx=dx, p=p, f=f)

    def rcd(node, dx_i, p_i, factors, q, pm, dx, p, f):
        return dict(
            dx=copy_of(dx),
            p=copy_of(p) if node.needs("p") else p,
            factors=factors,
            q=q,
            pm=pm,
            kicked=f is not None,
        )

    def vjp(node, _dx, _p, _f, dx, p, factors, q, pm, kicked):
        of_dx, of_p, of_f = dtypes = common_dtypes(pm.comm, _dx, _p, _f)
        if not any(dtypes):
            return dict(_dx_i=ZeroGradient, _p_i=ZeroGradient, _factors=ZeroGradient)
        _dx, _p = (own_copy(node, name, _y, dx) for name, _y in (("_dx", _dx), ("_p", _p)))
        dx, p = (own_copy(node, name, x, x) for name, x in (("dx", dx), ("p", p)))
        _factors, of_forces = numpy.zeros(len(factors)), _p if node.needs("factors") else ZeroGradient
        for i, gravity, product in reversible_leapfrog.undo(dx, p, factors, q, pm, kicked, of_forces):
            # Pull the cotangents back through a kick and the drift before it
            kick, _factors[2 * i] = float(factors[2 * i]), product
            if 2 * i + 1 == len(factors) and of_f is not None:
                _f = as_rows(0.0 if is_zero(_f) else _f, dx.shape, dx.dtype)
                gravity.pull(add_multiple(_f, _p, kick), _dx, 1.0, _dx)
            elif 2 * i + 1 < len(factors) or of_p is not None:
                gravity.pull(_p, _dx, kick, _dx)
            del gravity
            if i > 0:
                if node.needs("factors"):
                    _factors[2 * i - 1] = sum_products(_dx, p)
                add_multiple(_p, _dx, float(factors[2 * i - 1]), out=_p)
        return dict(_dx_i=_dx, _p_i=_p, _factors=_factors)

    def jvp(node, dx_i_, p_i_, factors_, dx, p, factors, q, pm, kicked):
        dtypes = common_dtypes(pm.comm, dx_i_, p_i_, factors_)
        if not any(dtypes):
            return dict(dx_=ZeroGradient, p_=ZeroGradient, f_=ZeroGradient)
        dx_, p_ = (own_copy(node, name, x_, dx) for name, x_ in (("dx_i_", dx_i_), ("p_i_", p_i_)))
        factors_ = as_rows(0.0 if is_zero(factors_) else factors_, (len(factors),), "f8")
        dx, p = (own_copy(node, name, x, x) for name, x in (("dx", dx), ("p", p)))
        for i, gravity, product in reversible_leapfrog.undo(dx, p, factors, q, pm, kicked):
            del gravity
        last = node.needs("p") or node.needs("f")
        # Push the tangents forward with the steps
        f_ = ZeroGradient
        for i, (kick, kick_) in enumerate(zip(factors[::2], factors_[::2])):
            more = 2 * i + 1 < len(factors)
            if not (more or last):
                break
            drift, drift_ = (c[2 * i + 1] if more else 0.0 for c in (factors, factors_))
            gravity, f = (
                ForceAt(lambda: dx, q, pm),
                memory.empty_like(p) if kick_ else ZeroGradient,
            )

            _apply_kick_drift(gravity, dx, p, kick, 0.0, dx, p, f if kick_ else None)
            f_ = gravity.push(dx_)
            add_multiple(dx, p, drift, out=dx)
            for x_, v, c in (p_, f_, kick), (p_, f, kick_), (dx_, p_, drift), (dx_, p, drift_):
                if c:
                    add_multiple(x_, v, c, out=x_)
        return dict(dx_=dx_, p_=p_, f_=f_)

    def hvp(node, _dx, _p, _f, dx_i_, p_i_, factors_, dx, p, factors, q, pm, kicked):
        # Walk back with the state, its tangent, its cotangent and the change of that
        dtypes = common_dtypes(pm.comm, _dx, _p, _f, dx_i_, p_i_, factors_)
        if not any(dtypes[:3]) or not any(dtypes[3:]):
            return dict(_dx_i_=ZeroGradient, _p_i_=ZeroGradient, _factors_=ZeroGradient)
        _dx, _p, _f = (as_rows(0.0 if is_zero(_y) else _y, dx.shape, dx.dtype) for _y in (_dx, _p, _f))
        dx_, p_ = (own_copy(node, name, x_, dx) for name, x_ in (("dx_i_", dx_i_), ("p_i_", p_i_)))
        factors_ = as_rows(0.0 if is_zero(factors_) else factors_, (len(factors),), "f8")
        _dx_, _p_, _factors_ = ZeroGradient, ZeroGradient, numpy.zeros(len(factors))
        dx, p, last = copy_of(dx), copy_of(p), kicked

        for i, gravity, product in reversible_leapfrog.undo(dx, p, factors, q, pm, kicked):
            del gravity
        # Push the tangents forward with the steps
        f_ = ZeroGradient
        for i, (kick, kick_) in enumerate(zip(factors[::2], factors_[::2])):
            more = 2 * i + 1 < len(factors)
            if not (more or last):
                break
            drift, drift_ = (c[2 * i + 1] if more else 0.0 for c in (factors, factors_))
            gravity, f = (
                ForceAt(lambda: dx, q, pm),
                memory.empty_like(p) if kick_ else ZeroGradient,
            )

            _apply_kick_drift(gravity, dx, p, kick, 0.0, dx, p, f if kick_ else None)
            f_ = gravity.push(dx_)
            add_multiple(dx, p, drift, out=dx)
            for x_, v, c in (p_, f_, kick), (p_, f, kick_), (dx_, p_, drift), (dx_, p, drift_):
                if c:
                    add_multiple(x_, v, c, out=x_)
        for i, gravity, product in reversible_leapfrog.undo(dx, p, factors, q, pm, kicked):
            if gravity is not None:
                # Pull back through the kick, and undo its tangent
                kick, kick_ = float(factors[2 * i]), float(factors_[2 * i])
                f_, f = gravity.push(dx_), gravity.write_force(memory.empty_like(p))
                for v, c in (f_, kick), (f, kick_):
                    add_multiple(p_, v, -c, out=p_)
                _factors_[2 * i] = sum_products(_p_, f) + sum_products(_p, f_)
                del f, f_
                _f, _f_ = plus_multiple(_f, _p, kick), plus_multiple(multiple(_p_, kick), _p, kick_)
                _dx_ = plus_multiple(_dx_, gravity.pull_change(_f, _f_, dx_), 1.0)
                _dx = plus_multiple(
                    _dx, force.vjp.impl(None, _f=_f, _potk=ZeroGradient, **gravity.record())["_x"], 1.0
                )
                _f = ZeroGradient
                del gravity
            if i > 0:
                # Pull back through the drift, and undo its tangent
                drift, drift_ = float(factors[2 * i - 1]), float(factors_[2 * i - 1])
                _factors_[2 * i - 1] = sum_products(_dx_, p) + sum_products(_dx, p_)
                _p, _p_ = (
                    plus_multiple(_p, _dx, drift),
                    plus_multiple(plus_multiple(_p_, _dx_, drift), _dx, drift_),
                )
                for v, c in (p_, drift), (p, drift_):
                    add_multiple(dx_, v, -c, out=dx_)
        return dict(_dx_i_=_dx_, _p_i_=_p_, _factors_=_factors_)


def _mix(a: Array, b: Array, matrix: Any, outs: Pair) -> Pair:
    """The product of a matrix (2, 2) of numbers with a pair of arrays, in two arrays, which may be these."""
    if alike(a, b, *outs):
        loops.mix(a, b, matrix, outs)
    else:
        sums = [a * row[0] + b * row[1] for row in matrix]
        for out, value in zip(outs, sums):
            out[...] = value
    return outs


@operator
class superpose:
    """Displacements and momenta from those of first and second order: D1 dx1 + D2 dx2, and Gf1 dx1 + Gf2 dx2.

    `dx1`, `dx2` : (N, ndim); the coefficients are numbers, as in `axpy`
    """

    ain = {"dx1": "ndarray", "dx2": "ndarray", "D1": "*", "D2": "*", "Gf1": "*", "Gf2": "*"}
    aout = {"dx": "ndarray", "p": "ndarray"}
    fresh = True
    inplace = "dx1", "dx2", "_dx", "_p"

    def apl(node, dx1, dx2, D1, D2, Gf1, Gf2):
        matrix = [[float(D1), float(D2)], [float(Gf1), float(Gf2)]]
        if all(map(node.is_literal, ("D1", "D2", "Gf1", "Gf2"))):
            outs = room_for(node, "dx1", dx1, dx1), room_for(node, "dx2", dx2, dx2)
        else:
            outs = memory.empty_like(dx1), memory.empty_like(dx2)
        dx, p = _mix(dx1, dx2, matrix, outs)
        return dict(dx=dx, p=p)

    def rcd(node, dx1, dx2, D1, D2, Gf1, Gf2, dx, p):
        constant = all(map(node.is_literal, ("D1", "D2", "Gf1", "Gf2")))
        return dict(
            like=(dx1.shape, dx1.dtype),
            arrays=None if constant else (dx1, dx2),
            matrix=numpy.array([[D1, D2], [Gf1, Gf2]], dtype="f8"),
        )

    def vjp(node, _dx, _p, like, arrays, matrix):
        _of = dict.fromkeys(("D1", "D2", "Gf1", "Gf2"), ZeroGradient)
        if arrays is not None:
            products = [sum_products(_y, x) for _y in (_dx, _p) for x in arrays]
            _of.update((name, _c) for name, _c in zip(_of, products) if node.needs(name))
        _dx, _p = (as_rows(0.0 if is_zero(_y) else _y, *like) for _y in (_dx, _p))
        outs = room_for(node, "_dx", _dx, _dx), room_for(node, "_p", _p, _p)
        _dx1, _dx2 = _mix(_dx, _p, matrix.T, outs)
        return dict(_dx1=_dx1, _dx2=_dx2, **{"_" + name: _c for name, _c in _of.items()})

    def jvp(node, dx1_, dx2_, D1_, D2_, Gf1_, Gf2_, like, arrays, matrix):
        dx1, dx2 = (ZeroGradient, ZeroGradient) if arrays is None else arrays
        return {
            name: plus_multiple(
                plus_multiple(plus_multiple(multiple(dx1_, c1), dx2_, c2), dx1, c1_), dx2, c2_
            )
            for name, (c1, c2), c1_, c2_ in (
                ("dx_", matrix[0].tolist(), D1_, D2_),
                ("p_", matrix[1].tolist(), Gf1_, Gf2_),
            )
        }

    def hvp(node, _dx, _p, dx1_, dx2_, D1_, D2_, Gf1_, Gf2_):
        # The changes of the cotangents of a superposition
        changes = dict(
            _dx1_=plus_multiple(multiple(_dx, D1_), _p, Gf1_),
            _dx2_=plus_multiple(multiple(_dx, D2_), _p, Gf2_),
        )
        for name, _y, x_ in ("D1", _dx, dx1_), ("D2", _dx, dx2_), ("Gf1", _p, dx1_), ("Gf2", _p, dx2_):
            changes[f"_{name}_"] = sum_products(_y, x_) if node.needs(name) else ZeroGradient
        return changes


def factors_of_start(pt: AnyBackground, a: float, pm: ParticleMesh) -> Sequence[Any]:
    """The coefficients of both displacements at scale factor a: in the displacement, and in the momentum."""
    if isinstance(pt, SymbolicBackground):
        table = allbcast(start_factors(pt.Om0, a, pt.Ok0), pm.comm)
        return [pick(table, i) for i in range(4)]
    D1, D2 = float(pt.D1(a)), float(pt.D2(a))
    rate1, rate2 = (float(a**2 * f(a) * pt.E(a)) for f in (pt.f1, pt.f2))
    return D1, D2, D1 * rate1, D2 * rate2


@autooperator("rhok -> dx, p")
def firststep(
    rhok: Symbol,
    q: Array,
    a: float,
    pt: AnyBackground,
    pm: ParticleMesh,
    dtype: DTypeLike | None = None,
) -> list[Symbol]:
    """Displacements and momenta at scale factor a by second-order perturbation theory.

    Parameters
    ----------
    rhok : complex field, the linear density contrast today
    q : (N, ndim) lattice
    a : scale factor
    pt : background
    pm : ParticleMesh
    dtype : of displacements and momenta, by default that of `q`

    Returns
    -------
    dx, p : (N, ndim)
    """
    dx1, dx2 = lpt(rhok, q, pm, dtype)
    return superpose(dx1, dx2, *factors_of_start(pt, a, pm))


def find_background(cosmology: HasMatter, stages: ArrayLike) -> AnyBackground:
    """The background of a cosmology, for steps between the given scale factors."""
    if isinstance(cosmology, (MatterDominated, SymbolicBackground)):
        return cosmology
    stages = numpy.array(check_stages(stages))
    support = numpy.sort(numpy.concatenate([(stages[1:] * stages[:-1]) ** 0.5, stages]))
    if hasattr(cosmology, "background"):
        return cosmology.background(a=support)
    if isinstance(cosmology.Om0, Symbol):
        return SymbolicBackground(cosmology.Om0)
    return MatterDominated(cosmology.Om0, a=support)


@autooperator("rhok -> dx, p, f")
def nbody(
    rhok: Symbol, q: Array, stages: ArrayLike, cosmology: HasMatter, pm: ParticleMesh
) -> tuple[Symbol, Symbol, Symbol]:
    """A FastPM simulation, with forces on the mesh of the initial conditions.

    Parameters
    ----------
    rhok : complex field, the linear density contrast today
    q : (N, ndim) lattice
    stages : sequence of scale factors, beginning with that of the initial conditions
    cosmology : has an attribute `Om0`; or a `Cosmology`, or a background. Gradients flow to an `Om0` that is
        a symbol
    pm : ParticleMesh

    Returns
    -------
    dx, p, f : (N, ndim) displacements, momenta, and force times 1.5 * Om0, at stages[-1]
    """

    stages, q = check_stages(stages), agree_on_lattice(q, pm)
    pt = find_background(cosmology, stages)
    dx, p = firststep(rhok, q, stages[0], pt, pm)
    return leapfrog(dx, p, q, stages, pt, pm)


class FastPMSimulation:
    """A FastPM simulation of particles from a lattice.

    Parameters
    ----------
    stages : sequence of scale factors, beginning with that of the initial conditions
    cosmology : has an attribute `Om0`; or a `Cosmology`, or a background. Gradients flow to an `Om0` that is
        a symbol
    pm : ParticleMesh of the initial conditions
    B : the mesh of the force has B times as many points along each axis
    q : (N, ndim) lattice, whose precision is that of the particles. By default a particle in the middle of each cell
        of `pm`, in the precision of the mesh; and if that would round the lattice, this alone is in double precision
    ram, reversible, keep_potential, disk, folder : what the derivatives keep, and where, see `leapfrog`
    check_memory : bool, whether to refuse a run that will not fit into memory, before the lattice is made

    Attributes
    ----------
    stages, pm, q, ram, reversible, keep_potential, disk, folder : as given
    dtype : of displacements and momenta
    pt : the background
    fpm : ParticleMesh of the force
    """

    __symbols__ = ("pt",)

    def __init__(
        self,
        stages: ArrayLike,
        cosmology: HasMatter,
        pm: ParticleMesh,
        B: float = 1,
        q: ArrayLike | None = None,
        ram: int | None = None,
        reversible: bool = False,
        keep_potential: bool = True,
        disk: int | None = None,
        folder: str | None = None,
        check_memory: bool = True,
    ) -> None:

        self.stages = numpy.array(check_stages(stages))
        self.pt = find_background(cosmology, stages)
        self.pm, self.reversible, self.keep_potential = pm, reversible, keep_potential
        self.ram, self.disk, self.folder = ram, disk, folder
        # Make the mesh of the force
        if not real_number("B", B) > 0 or (numpy.asarray(B) * pm.Nmesh % 1 != 0).any():
            raise ValueError(
                f"B times the mesh {pm.Nmesh.tolist()} must be whole numbers of points, but B is {B}"
            )
        self.fpm, self._B = pm if B == 1 else pm.reshape(Nmesh=(pm.Nmesh * B).astype(int)), float(B)
        q = None if q is None else agree_on_lattice(q, pm)
        self._count = int(pm.Nmesh.prod()) if q is None else add_up(pm.comm, len(q))
        if check_memory:
            self.check_memory(gradient=False)
        # Choose a lattice and the precision of particles
        if q is None:
            self.dtype = pm.create(type="real").dtype
            exact = pm.generate_uniform_particle_grid(shift=0.5)
            q = exact.astype(self.dtype, copy=False)
            if add_up(pm.comm, int((q != exact).any())) > 0:
                q = exact
        else:
            self.dtype = q.dtype
        self.q = numpy.ascontiguousarray(q)

    @property
    def comm(self) -> Any:
        """The communicator of the ranks that run the simulation together."""
        return self.pm.comm

    def check_memory(self, gradient: bool = True, extra: int = 0) -> None:
        """Raise MemoryError on all ranks if a run, or its gradient, will not fit into the memory of a node. Collective.

        `extra` are bytes on each rank that the program needs beside it.
        """
        policy = dict(
            ram=self.ram, disk=self.disk, reversible=self.reversible, keep_potential=self.keep_potential
        )
        mesh, steps = self.pm.Nmesh.tolist(), len(self.stages) - 1
        check_simulation(self.comm, mesh, self._count, steps, policy, gradient, self._B, extra)

    def KickFactor(self, ai: Numbers, ac: Numbers, af: Numbers) -> Numbers:
        """See the function `KickFactor`."""
        return KickFactor(self.pt, ai, ac, af)

    def DriftFactor(self, ai: Numbers, ac: Numbers, af: Numbers) -> Numbers:
        """See the function `DriftFactor`."""
        return DriftFactor(self.pt, ai, ac, af)

    @autooperator("rhok -> dx, p")
    def firststep(self, rhok: Symbol) -> list[Symbol]:
        """Displacements and momenta at the first stage."""
        return firststep(rhok, self.q, float(self.stages[0]), self.pt, self.pm, self.dtype)

    @autooperator("dx -> f, potk")
    def gravity(self, dx: Symbol) -> list[Symbol]:
        """The force on particles at q + dx, on the mesh of the force, and the potential."""
        return gravity(dx, self.q, self.fpm, self.keep_potential)

    @autooperator("rhok -> dx, p, f")
    def run(self, rhok: Symbol) -> tuple[Symbol, Symbol, Symbol]:
        """The simulation: displacements, momenta and force times 1.5 * Om0 at the last stage."""
        dx, p = self.firststep(rhok)
        return leapfrog(
            dx,
            p,
            self.q,
            self.stages,
            self.pt,
            self.fpm,
            self.ram,
            self.reversible,
            self.keep_potential,
            self.disk,
            self.folder,
        )
