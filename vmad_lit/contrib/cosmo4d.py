"""Reconstruction of the initial conditions of the universe: forward operators, residuals and data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy

from vmad_lit import autooperator
from vmad_lit.core.arguments import one_of, positive, real_array, real_number
from vmad_lit.core.autooperator import AutoOperator
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Symbol, Value

from vmad_lit.lib import fastpm, tracers, unary
from vmad_lit.lib.catalogue import Block, write_together
from vmad_lit.lib.cosmology import HasMatter
from vmad_lit.lib.exchange import agree_on_lattice
from vmad_lit.lib.files import replacing
from vmad_lit.lib.lpt import check_power
from vmad_lit.lib.mesh import (
    BaseComplexField,
    Field,
    Generator,
    ParticleMesh,
    RealField,
    agree,
    check_field,
    on_mesh,
)
from vmad_lit.lib.mpi import MPI, on_root, run_together
from vmad_lit.lib.noise import Purpose
from vmad_lit.lib.signals import Interrupt
from vmad_lit.lib.transfer import Transfer, evaluate_transfer, fixed_transfer, multiply_field
from vmad_lit.contrib.chisquare import MPIChiSquareProblem, MPIVectorSpace
from vmad_lit.contrib.optimize import Accepted, Monitor, Optimizer, Preconditioner, Problem, State
from vmad_lit.contrib.optimize import Validation, minimize_in_epochs


@autooperator("x -> modes")
def linear_modes(x: Symbol, power: Callable[[Any], Any], pm: ParticleMesh) -> Symbol:
    """The linear modes delta_k = sqrt(P(k) / V) w_k of white noise x of unit variance."""
    unit_modes = fastpm.r2c(on_mesh(x, pm, RealField)) * float(pm.Nmesh.prod()) ** 0.5
    return fastpm.induce_correlation(unit_modes, power, pm)


@autooperator("x -> s, fs")
def FastPMOperator(
    x: Symbol, q: Array, stages: Sequence[float], cosmology: HasMatter, pm: ParticleMesh
) -> dict[str, Symbol]:
    """From linear modes to the density today.

    Parameters
    ----------
    x : ComplexField
        The linear modes today, delta_k.
    q : array (N, ndim)
        Positions of the particles before they move, this rank's part.
    stages : sequence of float
        Scale factors: none for linear theory, one for second-order LPT, several for N-body steps.
    cosmology : object with `Om0`
    pm : ParticleMesh

    Returns
    -------
    s : ComplexField
        `x` itself.
    fs : RealField
        The density in units of its mean, 1 + delta.
    """
    if numpy.size(stages) == 0:
        fs = fastpm.c2r(on_mesh(x, pm)) + 1.0
    else:
        q = agree_on_lattice(q, pm)
        dx, p, f = fastpm.nbody(x, q, stages, cosmology, pm)
        fs = tracers.density(q + dx, 1.0, q, pm)
    return dict(s=x, fs=fs)


@autooperator("x -> s, fs")
def WhiteNoiseOperator(
    x: Symbol,
    power: Callable[[Any], Any],
    q: Array,
    stages: Sequence[float],
    cosmology: HasMatter,
    pm: ParticleMesh,
) -> dict[str, Symbol]:
    """From white noise, a RealField of unit variance, to the density today.

    `power` is the linear power spectrum today, a function of k in h/Mpc; for the rest see
    `FastPMOperator`. Here `s` is the white noise.
    """
    modes = linear_modes(x, power, pm)
    _, fs = FastPMOperator(modes, q, stages, cosmology, pm)
    return dict(s=x, fs=fs)


class Data:
    """A density that was observed, or made up.

    Attributes
    ----------
    d : RealField
        The density 1 + delta.
    sigma : float
        The standard deviation of the noise in a cell.
    truth : RealField or None
        The white noise that the data were made from, if known.
    clean : RealField or None
        The density without noise, if known.
    """

    def __init__(
        self, d: RealField, sigma: float, truth: RealField | None = None, clean: RealField | None = None
    ) -> None:
        for name, field in dict(d=d, truth=truth, clean=clean).items():
            if not isinstance(field, RealField) and (name == "d" or field is not None):
                raise TypeError(f"{name} must be a real field on the mesh, not {type(field).__name__}")
        self.d, self.sigma, self.truth, self.clean = d, positive("sigma", sigma), truth, clean

    @classmethod
    def synthetic(
        cls,
        pm: ParticleMesh,
        forward: AutoOperator,
        sigma: float,
        seed: int,
        generator: Generator = "philox",
    ) -> Self:
        """Draw the truth, `white_noise(pm, seed, generator)`, run `forward` (a `WhiteNoiseOperator` with bound
        hyper-parameters), and add noise, which no field of any seed shares."""
        sigma = run_together(pm.comm, lambda: positive("sigma", sigma))
        truth = white_noise(pm, seed, generator)
        clean = forward.build().compute("fs", init=dict(x=truth))
        noise = white_noise(pm, seed, purpose="noise of data")
        return cls(clean + noise * sigma, sigma, truth, clean)

    # Save and load data
    def save(self, folder: str) -> None:
        """Write the data into a folder. Collective."""
        pm = self.d.pm
        on_root(pm.comm, lambda: os.makedirs(folder, exist_ok=True))
        for name in "d", "truth", "clean":
            if getattr(self, name) is not None:
                save_field(os.path.join(folder, f"{name}.npy"), getattr(self, name))
        header = dict(
            Nmesh=[int(n) for n in pm.Nmesh], BoxSize=[float(b) for b in pm.BoxSize], sigma=self.sigma
        )

        def write_header() -> None:
            with replacing(os.path.join(folder, "data.json")) as file:
                file.write(json.dumps(header).encode())

        on_root(pm.comm, write_header)

    @classmethod
    def load(cls, folder: str, comm: MPI.Comm, **options: Any) -> Self:
        """Read what `save` wrote, on any number of ranks; `options` go to `ParticleMesh`. Collective."""

        def read_header() -> tuple[dict[str, Any], set[str]]:
            with open(os.path.join(folder, "data.json")) as file:
                return json.load(file), set(os.listdir(folder))

        header, files = on_root(comm, read_header)
        pm = fastpm.ParticleMesh(Nmesh=header["Nmesh"], BoxSize=header["BoxSize"], comm=comm, **options)
        fields: dict[str, Any] = {
            name: load_field(os.path.join(folder, f"{name}.npy"), pm) if f"{name}.npy" in files else None
            for name in ("d", "truth", "clean")
        }
        return cls(sigma=header["sigma"], **fields)


def white_noise(
    pm: ParticleMesh, seed: int, generator: Generator = "philox", purpose: Purpose = "field"
) -> RealField:
    """A RealField of independent normal numbers of unit variance, the same on any number of ranks. Collective.

    Fields of different seeds, which are whole numbers of any size, and of different purposes are independent. The
    field of the `generator` 'pmesh' is pmesh's own, whose mean is 0; see `ParticleMesh.generate_whitenoise`.
    """
    mean = 0.0 if generator == "pmesh" else None
    field = pm.generate_whitenoise(seed, type="real", mean=mean, generator=generator, purpose=purpose)
    return field * float(pm.Nmesh.prod()) ** -0.5


def save_field(path: str, field: RealField) -> None:
    """Write a real field to a `.npy` file of the shape of the whole mesh. Collective."""
    if not isinstance(field, RealField):
        raise TypeError(f"a file of the whole mesh is written of a real field, not of {type(field).__name__}")
    dtype = field.value.dtype
    block = Block.of_field(field, dtype)

    def write_header(beside: str) -> int:
        with open(beside, "r+b") as file:
            descr = numpy.lib.format.dtype_to_descr(dtype)
            header = dict(descr=descr, fortran_order=False, shape=block.shape)
            numpy.lib.format.write_array_header_1_0(file, header)
            return file.tell()

    write_together(path, field.pm.comm, write_header, block.write)


def load_field(path: str, pm: ParticleMesh) -> RealField:
    """Read a RealField from a `.npy` file; each rank reads its own slab. Collective."""

    def examine() -> None:
        array = numpy.load(path, mmap_mode="r")
        if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "biuf":
            kind = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"{path} must hold one array of real numbers, not {kind}")
        if array.shape != tuple(pm.Nmesh):
            mesh = tuple(map(int, pm.Nmesh))
            raise ValueError(f"{path} holds an array of shape {array.shape}, expected the mesh {mesh}")

    on_root(pm.comm, examine)

    def read() -> RealField:
        field = pm.create(type="real")
        field[...] = real_array(path, numpy.load(path, mmap_mode="r")[field.slices])
        return field

    return run_together(pm.comm, read)


@autooperator("s, fs -> y")
def NLResidualOperator(s: Symbol, fs: Symbol, d: RealField, invN: Value) -> Symbol:
    """The residual of the density: (fs - d) invN**(1/2), with the inverse variance per cell (a number
    or a field)."""
    return (fs - d) * weight(invN)


def weight(invN: Value) -> Value:
    """The square root of an inverse variance: of a number, an array, or a field."""
    return real_array("invN", getattr(invN, "value", invN), least=0)[()] ** 0.5


@autooperator("s, fs -> y")
def SmoothedNLResidualOperator(s: Symbol, fs: Symbol, d: RealField, invN: Value, scale: float) -> Symbol:
    """The residual of the density, smoothed with a Gaussian of a given scale (Mpc/h)."""
    residual = fastpm.apply_transfer(fastpm.r2c(fs - d), gaussian(scale))
    return fastpm.c2r(residual) * weight(invN)


def gaussian(scale: float) -> Transfer:
    """The transfer function of a Gaussian window."""
    scale = real_number("scale", scale, least=0)

    def transfer(k: Any) -> Array:
        return numpy.exp(-0.5 * scale**2 * sum(ki**2 for ki in k))

    return transfer


@autooperator("s, fs -> y")
def LNResidualOperator(s: Symbol, fs: Symbol, d: RealField, invN: Value, floor: float = 0.1) -> Symbol:
    """The residual of the logarithm of the density, log(floor + fs) - log(floor + d), with negative
    data taken as 0."""
    positive("floor", floor)
    target: Any = numpy.log(floor + numpy.maximum(numpy.asarray(getattr(d, "value", d)), 0.0))
    target = d.pm.create(type=type(d), value=target) if isinstance(d, Field) else target
    return (unary.log(fs + floor) - target) * weight(invN)


@autooperator("s, fs -> y")
def WhitePriorOperator(s: Symbol, fs: Symbol) -> Symbol:
    """The prior of white noise: y = s, so that the sum of squares is |s|^2."""
    return s * 1.0


@autooperator("s, fs -> y")
def PriorOperator(s: Symbol, fs: Symbol, power: Callable[[Any], Any], pm: ParticleMesh) -> Symbol:
    """The prior of linear modes with the power spectrum `power`: the sum of squares of y is sum_k V
    |s_k|^2 / P(k)."""
    check_power(power, pm)
    volume, cells = float(pm.BoxSize.prod()), float(pm.Nmesh.prod())

    def transfer(k: Any) -> Array:
        P = numpy.asarray(power(sum(ki**2 for ki in k) ** 0.5), dtype=float)
        return numpy.where(P > 0, (volume / cells / numpy.where(P > 0, P, 1.0)) ** 0.5, 0.0)

    return fastpm.c2r(fastpm.apply_transfer(on_mesh(s, pm), transfer))


class FastPMVectorSpace(MPIVectorSpace):
    """Vectors that are pmesh fields, or distributed arrays."""


class ChiSquareProblem(MPIChiSquareProblem):
    """A chi-square problem whose parameters are a field.

    Parameters
    ----------
    comm : MPI communicator
    forward_operator : autooperator
        From `x` to `s, fs`, with its hyper-parameters bound.
    residuals : list of autooperators
        From `s, fs` to `y`, with their hyper-parameters bound.
    identity : dict, optional
        What else a saved state is to know the problem by.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        forward_operator: Callable[..., Any],
        residuals: Iterable[Callable[..., Any]],
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(comm, forward_operator, residuals, FastPMVectorSpace(comm), identity=identity)

    def set_preconditioner(self, kind: Literal["complex", "real"]) -> None:
        """In which variables to optimise modes: 'complex', the modes themselves, or 'real', the field
        in configuration space."""
        one_of("the kind of variables", kind, ("complex", "real"))
        self.preconditioner = Preconditioner(Pvp=to_real, vPp=to_modes) if kind == "real" else None


def to_real(v: BaseComplexField, direction: int = 1) -> RealField:
    return v.c2r() * float(v.Nmesh.prod()) ** -0.5


def to_modes(v: RealField, direction: int = 1) -> BaseComplexField:
    return v.r2c() * float(v.Nmesh.prod()) ** 0.5


def linear_preconditioner(power: Callable[[Any], Any], pm: ParticleMesh, sigma: float) -> Preconditioner:
    """White noise with its modes stretched by the root of the curvature that they have in linear theory.

    Parameters
    ----------
    power : function of k in h/Mpc, the linear power spectrum today in (Mpc/h)^3
    pm : ParticleMesh
    sigma : the standard deviation of the noise in a cell
    """
    noise = positive("sigma", sigma) ** 2 * float(pm.BoxSize.prod() / pm.Nmesh.prod())

    def by(exponent: float) -> Callable[[RealField], RealField]:
        @fixed_transfer
        def stretch(k: Any) -> Array:
            P = numpy.asarray(power(sum(ki**2 for ki in k) ** 0.5), dtype=float)
            return (1 + numpy.maximum(P, 0) / noise) ** exponent

        def apply(v: RealField) -> RealField:
            modes = v.r2c()
            return multiply_field(modes, evaluate_transfer(modes, stretch, "wavenumber")).c2r()

        return apply

    return Preconditioner.symmetric(by(0.5), by(-0.5))


def reconstruction_problem(
    forward: AutoOperator, data: Data, smoothing: float = 0.0, identity: Mapping[str, Any] | None = None
) -> ChiSquareProblem:
    """The problem of finding the white noise that explains a density; see `reconstruct`.

    A saved state knows it by the hyper-parameters of `forward`, the data, the noise, and the `identity`.
    """
    d, invN = data.d, data.sigma**-2.0
    smoothing = run_together(d.pm.comm, lambda: real_number("smoothing", smoothing, least=0))
    if smoothing:
        likelihood = SmoothedNLResidualOperator.bind(d=d, invN=invN, scale=smoothing)
    else:
        likelihood = NLResidualOperator.bind(d=d, invN=invN)
    return ChiSquareProblem(d.pm.comm, forward, [likelihood, WhitePriorOperator], identity)


def reconstruct(
    forward: AutoOperator,
    data: Data,
    optimizer: Optimizer,
    start: RealField | None = None,
    smoothing: float = 0.0,
    monitor: Monitor | Iterable[Monitor] | None = None,
    state: State | None = None,
    progress: bool = False,
    accept: Accepted = False,
    interrupt: Interrupt | None = None,
    epochs: Iterable[Mapping[str, Any]] | None = None,
    validation: Validation | Problem | Callable[[RealField], Any] | None = None,
    keep_best: bool = False,
    preconditioner: Preconditioner | None = None,
) -> State:
    """Find the white noise that explains a density.

    Parameters
    ----------
    forward : WhiteNoiseOperator
        With its hyper-parameters bound.
    data : Data
    optimizer : Optimizer
        For example `LBFGS(maxiter=100)`.
    start : RealField, optional
        Where to begin; by default at zero, the most probable field before any data were seen.
    smoothing : float
        Compare densities smoothed at this scale, in Mpc/h.
    epochs : list of dict, optional
        Anneal: for each epoch its `smoothing`, if it is another than that above, and options of the optimiser, as in
        ``[dict(smoothing=8, maxiter=20), dict(smoothing=4, maxiter=20), dict()]``. A state that was saved in an epoch goes
        on in it; see `minimize_in_epochs`.
    preconditioner : Preconditioner, optional
        Such as `linear_preconditioner`, which together with epochs saves gradients (`python -m benchmarks reconstruction --compare`).
    monitor, state, progress, accept, interrupt, validation, keep_best
        Passed to the optimiser.

    Returns
    -------
    State
        With the white noise in `x`, chi-square in `y`, and the table of iterations in `history`.
    """

    def make_problem(smoothing: float = smoothing) -> ChiSquareProblem:
        problem = reconstruction_problem(forward, data, smoothing)
        problem.preconditioner = preconditioner
        return problem

    d = data.d
    agree(d.pm.comm, lambda: ("no start" if start is None else check_field(start, RealField, d.pm),))
    if start is None and state is None:
        start = d.pm.create(type="real", value=0)
    options: dict[str, Any] = dict(monitor=monitor, progress=progress, accept=accept, interrupt=interrupt)
    options.update(state=state, validation=validation, keep_best=keep_best)
    if epochs is None:
        return optimizer.minimize(make_problem(), start, **options)
    return minimize_in_epochs(optimizer, make_problem, epochs, start, **options)
