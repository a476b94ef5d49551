"""Band powers of the initial conditions, from the most probable initial conditions.

A map that maximises the posterior has too little power: what the data do not tell, the prior sets to zero. By how much
is found from simulations, whatever the forward model; so is how the power of the map answers to power that is
injected. Reference: U. Seljak, G. Aslanyan, Y. Feng & C. Modi, JCAP 12 (2017) 009, arXiv:1706.06645.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy
from numpy.typing import ArrayLike

from vmad_lit.core.arguments import positive, real_array, real_number, whole_number
from vmad_lit.core.autooperator import AutoOperator
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.lib.files import Path, replacing
from vmad_lit.lib.fingerprint import differences, fingerprint
from vmad_lit.lib.lpt import check_power
from vmad_lit.lib.mesh import Field, ParticleMesh, RealField, agree, check_field
from vmad_lit.lib.mpi import MPI, on_root, run_together
from vmad_lit.lib.shards import StateError
from vmad_lit.lib.spectra import Shells, wavenumbers
from vmad_lit.contrib.cosmo4d import Data, reconstruction_problem, white_noise
from vmad_lit.contrib.optimize import LBFGS, Optimizer, Preconditioner, Problem, State

Power = Callable[[Any], Any]  # a power spectrum in (Mpc/h)^3, a function of k in h/Mpc


def moduli(modes: Field) -> Array:
    """The wavenumbers |k| of the modes of a field, in h/Mpc."""
    k: Array = numpy.sqrt(sum(ki**2 for ki in wavenumbers(modes)))
    return k


def filtered(white: RealField, factor: Array) -> RealField:
    """A real field whose modes are multiplied by an array of factors. Collective."""
    modes = white.r2c()
    modes.value[...] *= factor
    field: RealField = modes.c2r()
    return field


class Bands:
    """Bands of wavenumbers on a mesh, and a fiducial power spectrum in them.

    Parameters
    ----------
    pm : ParticleMesh
    edges : array (nband + 1,)
        Edges of the bands in h/Mpc, the first above 0.
    power : function of k
        The fiducial power spectrum in (Mpc/h)^3: the one that white noise of unit variance stands for.
    parts : int
        Into how many parts each band is cut for window functions.

    Attributes
    ----------
    k, counts, fiducial : arrays (nband * parts,)
        Mean wavenumber, number of modes, and mean fiducial power of each part.
    """

    def __init__(self, pm: ParticleMesh, edges: ArrayLike, power: Power, parts: int = 1) -> None:
        def prepare() -> tuple[Array, int]:
            check_power(power, pm)
            where = real_array("the increasing edges of bands", edges, shape=(None,), above=0)
            if len(where) < 2 or not (numpy.diff(where) > 0).all():
                raise ValueError(f"the edges of bands must be at least two increasing numbers, not {edges!r}")
            return where, whole_number("parts", parts, least=1)

        self.pm, self.power = pm, power
        self.edges, self.parts = run_together(pm.comm, prepare)
        n = len(self.edges) - 1
        self.fine = numpy.interp(
            numpy.arange(n * self.parts + 1) / self.parts, numpy.arange(n + 1), self.edges
        )
        self.shells = Shells(pm, self.fine)
        # Refuse bands without modes
        filled = numpy.histogram(self.shells.k, self.fine)[0] > 0
        if not filled.all():
            empty = int(numpy.flatnonzero(~filled)[0])
            low, high = self.fine[empty : empty + 2]
            highest = float(((numpy.pi * pm.Nmesh / pm.BoxSize) ** 2).sum() ** 0.5)
            raise ValueError(
                f"{'a part of ' if self.parts > 1 else ''}band {empty // self.parts}, {low:.4g} to {high:.4g} h/Mpc, "
                f"has no modes on this mesh, whose modes are {2 * numpy.pi / pm.BoxSize.min():.4g} apart and end "
                f"at {highest:.4g}"
            )

        self.k: Array = self.shells.k
        self.counts: Array = numpy.asarray(self.shells.counts)
        self.fiducial = self.average(power)
        if not (self.fiducial > 0).all():
            raise ValueError("the fiducial power must be above 0 in all bands")

    def __len__(self) -> int:
        return len(self.edges) - 1

    def join(self, parts: Array) -> Array:
        """The sums over the parts of each band, of an array (..., nband * parts)."""
        return parts.reshape(*parts.shape[:-1], len(self), self.parts).sum(axis=-1)

    def average(self, power: Power, over: Power | None = None) -> Array:
        """The mean of a spectrum, or of its ratio to another, over the modes of each part. Collective."""
        modes = self.pm.create(type="complex")
        k = moduli(modes)
        values = numpy.where(k > 0, power(numpy.where(k > 0, k, self.edges[0])), 0.0)
        if over is not None:
            below = over(numpy.where(k > 0, k, self.edges[0]))
            values = numpy.divide(values, below, out=numpy.zeros(values.shape), where=below > 0)
        return self.shells.average(modes, values, [1.0])[0]

    def energies(self, white: RealField) -> Array:
        """Half the sum of |w_k|^2 over the modes of each part, for modes of unit variance if `white` is. Collective."""
        agree(self.pm.comm, lambda: (check_field(white, RealField, self.pm),))
        cells = float(self.pm.Nmesh.prod())
        return 0.5 * self.counts * cells / self.shells.volume * self.shells.power(white)

    def amplify(self, white: RealField, changes: ArrayLike) -> RealField:
        """White noise with the power of each part changed by so many times the fiducial one. Collective."""
        modes = white.r2c()
        factor = numpy.sqrt(1 + real_array("changes", changes, shape=self.k.shape, least=-1)) - 1
        field: RealField = (
            modes + self.shells.spread(modes, factor * self.counts / self.shells.volume)
        ).c2r()
        return field

    def recolour(self, white: RealField, power: Power) -> RealField:
        """White noise that under the fiducial spectrum has another `power`. Collective."""
        k = moduli(self.pm.create(type="complex"))
        k = numpy.where(k > 0, k, self.edges[0])
        return filtered(white, numpy.sqrt(power(k) / self.power(k)))


class Experiment:
    """How data come from white noise, and which problem is solved to find it again.

    Parameters
    ----------
    pm : ParticleMesh
    power : function of k
        The fiducial power spectrum, which makes modes of white noise, in simulations and in problems.
    simulate : function (white, seed)
        Data from a RealField of white noise, with noise, and whatever else is random, drawn from a seed.
    problem : function (data)
        The :class:`~vmad_lit.contrib.optimize.Problem` whose solution is the most probable vector.
    white : function (x), optional
        The white noise in a vector; by default the vector itself is one.
    start : function (), optional
        The vector to start from; by default a field of zeros.
    identity : dict, optional
        What distinguishes the experiment from others, for saved simulations.
    """

    def __init__(
        self,
        pm: ParticleMesh,
        power: Power,
        simulate: Callable[[RealField, int], Any],
        problem: Callable[[Any], Problem],
        white: Callable[[Any], RealField] | None = None,
        start: Callable[[], Any] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.pm, self.power, self.simulate, self.problem = pm, power, simulate, problem
        self.white: Callable[[Any], RealField] = (lambda x: x) if white is None else white
        self.start: Callable[[], Any] = (lambda: pm.create(type="real", value=0)) if start is None else start
        self.identity = dict(identity or {})

    @classmethod
    def of_posterior(cls, posterior: Any, field: str) -> Experiment:
        """The experiment of a posterior one of whose parameters is a Gaussian field.

        Other parameters are drawn from their priors in simulations, and found together with the field in maps.

        Parameters
        ----------
        posterior : Posterior
            Of :mod:`vmad_lit.contrib.posterior`, with a fixed fiducial power spectrum.
        field : str
            The name of the field, whose prior is a `GaussianField`.
        """

        prior = posterior.priors.get(field)
        if not hasattr(prior, "pm") or not callable(getattr(prior, "power", None)) or prior.depends:
            known = ", ".join(posterior.priors)
            raise ValueError(
                f"field must name a Gaussian field of a fixed power spectrum, not {field!r}; there are {known}"
            )

        def simulate(white: RealField, seed: int) -> Any:
            return posterior.simulate(seed, {**posterior.draw(seed), field: white})[1]

        return cls(
            prior.pm,
            prior.power,
            simulate,
            posterior.with_data,
            lambda z: z[field],
            posterior.zeros,
            dict(posterior=posterior.ingredients()),
        )


class DensityExperiment(Experiment):
    """The density of matter in every cell, with independent noise.

    Parameters
    ----------
    forward : function (power)
        A `WhiteNoiseOperator` for a power spectrum, with all other hyper-parameters bound.
    power : function of k
        The fiducial power spectrum.
    sigma : float
        The standard deviation of the noise in a cell.
    observed : function (power), optional
        The forward operator of the simulations, if it is another than that of the problem.
    """

    def __init__(
        self,
        pm: ParticleMesh,
        forward: Callable[[Power], AutoOperator],
        power: Power,
        sigma: float,
        observed: Callable[[Power], AutoOperator] | None = None,
    ) -> None:

        self.sigma = run_together(pm.comm, lambda: positive("sigma", sigma))
        self.forward = forward(power)
        self.observed = self.forward if observed is None else observed(power)
        noise_power = self.sigma**2 * float(pm.BoxSize.prod() / pm.Nmesh.prod())
        self._preconditioner = linear_theory(pm, power, noise_power)
        identity = dict(forward=self.forward, observed=self.observed, sigma=self.sigma)
        super().__init__(pm, power, self._simulate, self._problem, identity=identity)

    def _simulate(self, white: RealField, seed: int) -> RealField:
        clean = self.observed.build().compute("fs", init=dict(x=white))
        return clean + white_noise(self.pm, seed, purpose="noise of band powers") * self.sigma

    def _problem(self, data: RealField | Data) -> Problem:
        data = data if isinstance(data, Data) else Data(data, self.sigma)
        problem = reconstruction_problem(self.forward, data)
        problem.preconditioner = self._preconditioner
        return problem


def linear_theory(pm: ParticleMesh, power: Power, noise_power: float) -> Preconditioner:
    """The variables z_k = (1 + P / N)^(1/2) w_k, in which the Hessian of linear theory is a unit matrix."""
    k = moduli(pm.create(type="complex"))
    size = numpy.sqrt(1 + numpy.where(k > 0, power(numpy.where(k > 0, k, 1.0)), 0.0) / noise_power)
    return Preconditioner.symmetric(lambda v: filtered(v, size), lambda v: filtered(v, 1 / size))


class Simulations:
    """The energies of simulations and of their maps, by name, in a file that is complete after each of them.

    Parameters
    ----------
    comm : communicator
    identity : dict
        What they are simulations of. A file of others is refused.
    path : str, optional
        The file. If it is there, what it holds need not be computed again.
    """

    def __init__(self, comm: MPI.Comm, identity: Mapping[str, Any], path: Path | None = None) -> None:
        self.comm, self.path = comm, path
        self.identity = json.loads(json.dumps(fingerprint(dict(identity), comm)))
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None:
            self.rows = on_root(comm, self._read)

    def _read(self) -> dict[str, dict[str, Any]]:
        assert self.path is not None
        try:
            with open(self.path) as file:
                content = json.load(file)
            identity, rows = content["identity"], content["simulations"]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            raise StateError(f"{self.path} is no file of simulations of band powers") from None
        found = differences(identity, self.identity)
        if found:
            told = "".join(f"\n  {name}: {old} before, {new} now" for name, (old, new) in found.items())
            raise StateError(f"{self.path} holds other simulations:{told}\nchoose another file, or remove it")
        return dict(rows)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Note the results of a simulation, and save all. Collective."""
        self.rows[name] = row
        if self.path is not None:
            on_root(self.comm, self._write)

    def _write(self) -> None:
        assert self.path is not None
        with replacing(self.path) as file:
            file.write(json.dumps(dict(identity=self.identity, simulations=self.rows)).encode())


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What simulations have told of an estimator.

    Attributes
    ----------
    truth, found : arrays (nsim, nband)
        The realised power of the true white noise, in units of the expected one, and the energies of its map.
    injected : array (ninject, nband, nband * parts)
        The change of the energies of the map for each part's injected power, in units of that power.
    response : array (nband, nband * parts)
        The mean of `injected`, corrected for the realised power of what has been amplified.
    matrix : array (nband, nband)
        The response to whole bands: the Fisher matrix, in units of the fiducial power.
    unfinished : int
        How many maps the optimiser has left at its last iteration.
    """

    truth: Array
    found: Array
    injected: Array
    response: Array
    matrix: Array
    unfinished: int = 0

    def amplitudes(self, energies: Array) -> Array:
        """Solve for amplitudes of bands, before the bias is subtracted; (..., nband)."""
        return numpy.linalg.solve(self.matrix, energies[..., None])[..., 0]

    @property
    def excess(self) -> Array:
        """What each simulation's amplitudes are above the truth, (nsim, nband): the bias on average, and noise."""
        return self.amplitudes(self.found) - self.truth

    @property
    def bias(self) -> Array:
        """The bias of the amplitudes, (nband,)."""
        return self.excess.mean(axis=0)

    def covariance(self, counts: Array) -> Array:
        """The covariance of the amplitudes less bias: that of cosmic variance, of the noise, and of the bias itself."""
        n = len(self.excess)
        noise = numpy.atleast_2d(numpy.cov(self.excess.T))
        return numpy.diag(2 / counts) + noise * (1 + 1 / n)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Band powers, in units of the power spectrum; all arrays are the same on all ranks.

    Attributes
    ----------
    k, power, fiducial, counts : arrays (nband,)
        Mean wavenumber, measured and fiducial power, and number of modes.
    covariance : array (nband, nband)
        Of `power`; sigma is the root of its diagonal.
    windows : array (nband, nband * parts)
        What each measured power is expected to be, in terms of the powers of the parts of all bands, both in units of
        the fiducial power.
    noise_bias : array (nband,)
        What has been subtracted: the power that would be reported of a universe without any.
    fisher : array (nband, nband)
        The response of the map's energies to injected power: in the approximation of Laplace the inverse of `covariance`.
    nsim : int
        The number of simulations that bias and covariance come from.
    """

    k: Array
    power: Array
    fiducial: Array
    counts: Array
    covariance: Array
    windows: Array
    noise_bias: Array
    fisher: Array
    nsim: int

    @property
    def sigma(self) -> Array:
        """The standard deviations."""
        return numpy.sqrt(numpy.diag(self.covariance))

    def expected(self, model: ArrayLike) -> Array:
        """What is measured on average if the spectrum is a `model`, see `BandPowers.model`; (nband,)."""
        model = real_array("the model", model, shape=(self.windows.shape[1],))
        return self.fiducial * (self.windows @ model)

    def chisquare(self, model: ArrayLike) -> float:
        """Chi-square of a model, see `BandPowers.model`; there are `len(k)` degrees of freedom."""
        r = self.power - self.expected(model)
        return float(r @ numpy.linalg.solve(self.covariance, r))

    def spectrum(self, power: Power, least: float = 0.1) -> Power:
        """The fiducial spectrum `power` times what was measured of it, at least so much: a better fiducial one."""
        k, amplitude = self.k, numpy.maximum(self.power / self.fiducial, least)
        return lambda x: power(x) * numpy.interp(x, k, amplitude)

    def decorrelated(self) -> Measurement:
        """Mixtures of the bands with uncorrelated errors; their windows say what they are mixtures of."""
        relative = self.covariance / numpy.outer(self.fiducial, self.fiducial)
        values, vectors = numpy.linalg.eigh(relative)
        root = (vectors / numpy.sqrt(values)) @ vectors.T
        mix = root / root.sum(axis=1, keepdims=True)
        units = mix * self.fiducial[:, None] / self.fiducial
        back = numpy.linalg.inv(units)
        return dataclasses.replace(
            self,
            power=units @ self.power,
            covariance=units @ self.covariance @ units.T,
            windows=mix @ self.windows,
            noise_bias=units @ self.noise_bias,
            fisher=back.T @ self.fisher @ back,
        )

    def save(self, path: Path) -> None:
        """Write everything to a file of JSON."""
        values = {
            name: value.tolist() if isinstance(value, numpy.ndarray) else value
            for name, value in vars(self).items()
        }
        with replacing(path) as file:
            file.write(json.dumps(values).encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` has written."""
        with open(path) as file:
            values = json.load(file)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise StateError(f"{path} is no file of measured band powers")
        arrays: dict[str, Any] = {n: numpy.array(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**arrays)


class BandPowers:
    """Measure the power of the initial conditions in bands.

    Parameters
    ----------
    experiment : Experiment
    edges : array (nband + 1,)
        Edges of the bands in h/Mpc.
    optimizer : Optimizer, optional
        Finds the maps, those of simulations as those of data.
    parts : int
        Into how many parts to cut each band for window functions.
    step : float
        Power that is injected, in units of the fiducial one; its sign alternates.

    Attributes
    ----------
    bands : Bands
    calibration : Calibration or None
    """

    def __init__(
        self,
        experiment: Experiment,
        edges: ArrayLike,
        optimizer: Optimizer | None = None,
        parts: int = 1,
        step: float = 0.2,
    ) -> None:
        if not isinstance(experiment, Experiment):
            raise TypeError(f"experiment must be an Experiment, not {type(experiment).__name__}")
        self.experiment, self.comm = experiment, experiment.pm.comm
        self.step = run_together(self.comm, lambda: real_number("step", step, above=0, below=1))
        self.bands = Bands(experiment.pm, edges, experiment.power, parts)
        self.optimizer = LBFGS(maxiter=200, gtol=0.0, ftol=3e-5) if optimizer is None else optimizer
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, not {type(optimizer).__name__}")
        self.calibration: Calibration | None = None

    def maximum(self, data: Any, **options: Any) -> State:
        """The most probable vector for data, as the last state of the optimiser; `options` go to `minimize`. Collective."""
        return self.optimizer.minimize(self.experiment.problem(data), self.experiment.start(), **options)

    def energies(self, state: State) -> Array:
        """The energies of the map in the bands, (nband,). Collective."""
        return self.bands.join(self.bands.energies(self.experiment.white(state.x)))

    def mock(self, seed: int, power: Power | None = None) -> tuple[Any, Array]:
        """Data of a made-up universe, of the fiducial spectrum or another, and its realised band powers. Collective."""
        white = white_noise(self.experiment.pm, seed, purpose="mock for band powers")
        if power is not None:
            white = self.bands.recolour(white, power)
        return self.experiment.simulate(white, seed), self._realised(white) * self._fiducial

    def _realised(self, white: RealField) -> Array:
        """The power of white noise in each band, in units of the expected one."""
        return 2 * self.bands.join(self.bands.energies(white)) / self._counts

    @property
    def _counts(self) -> Array:
        return self.bands.join(self.bands.counts)

    def _mean(self, parts: Array) -> Array:
        """The means over the modes of each band of numbers of its parts."""
        return self.bands.join(self.bands.counts * parts) / self._counts

    @property
    def _fiducial(self) -> Array:
        return self._mean(self.bands.fiducial)

    def model(self, power: Power) -> Array:
        """A spectrum in units of the fiducial one, in the parts of all bands, (nband * parts,). Collective."""
        return self.bands.average(power, self.experiment.power)

    # Run simulations
    def _identity(self, seed: int) -> dict[str, Any]:
        """What distinguishes the simulations from others."""
        options = {name: getattr(self.optimizer, name) for name in self.optimizer.options()}
        return dict(
            experiment=self.experiment.identity,
            power=self.bands.fiducial,
            edges=self.bands.edges,
            parts=self.bands.parts,
            optimizer=dict(name=type(self.optimizer).__name__, **options),
            step=self.step,
            seed=seed,
        )

    def _simulation(self, seed: int, i: int, j: int) -> dict[str, Any] | None:
        """The results of simulation i, with power injected into part j unless that is negative."""
        words = numpy.random.SeedSequence(seed, spawn_key=(i,)).generate_state(4)
        number = sum(int(word) << 32 * n for n, word in enumerate(words))
        white = white_noise(self.experiment.pm, number, purpose="simulation for band powers")
        truth = 2 * self.bands.energies(white) / self.bands.counts
        if j >= 0:
            changes = numpy.zeros(len(self.bands.k))
            changes[j] = self._step(i)
            white = self.bands.amplify(white, changes)
        state = self.maximum(self.experiment.simulate(white, number))
        if state.status == "signal":
            return None
        found = self.energies(state)
        return dict(truth=truth.tolist(), found=found.tolist(), status=state.status, nit=state.nit)

    def _step(self, i: int) -> float:
        return self.step if i % 2 == 0 else -self.step

    def calibrate(
        self,
        nsim: int = 64,
        ninject: int = 8,
        seed: int = 1,
        path: Path | None = None,
        monitor: Callable[[int, int], object] | None = None,
    ) -> Calibration | None:
        """Run simulations of the fiducial spectrum, and learn bias, response and covariance from them. Collective.

        Parameters
        ----------
        nsim : int
            The number of simulations.
        ninject : int
            In how many of them power is injected into each part of each band, one after the other.
        seed : int
            For all random numbers.
        path : str, optional
            A file that keeps what each simulation has given, so that they can go on after a crash, or be added to.
        monitor : function (done, total), optional
            Called after each map.

        Returns
        -------
        Calibration, or None if a signal has ended the optimiser before all was done.
        """

        def check() -> tuple[int, int, int]:
            number = whole_number("nsim", nsim, least=len(self.bands) + 2)
            return number, whole_number("ninject", ninject, 1, number), whole_number("seed", seed, least=0)

        nsim, ninject, seed = run_together(self.comm, check)
        simulations = Simulations(self.comm, self._identity(seed), path)
        nparts = len(self.bands.k)
        todo = [(i, j) for i in range(nsim) for j in range(-1, nparts if i < ninject else 0)]
        for done, (i, j) in enumerate(todo, start=1):
            name = f"{i}" if j < 0 else f"{i}, injected {j}"
            if name not in simulations.rows:
                row = self._simulation(seed, i, j)
                if row is None:
                    return None
                simulations.add(name, row)
            if monitor is not None:
                monitor(done, len(todo))
        self.calibration = self._evaluate(simulations.rows, nsim, ninject)
        return self.calibration

    def _evaluate(self, rows: Mapping[str, Mapping[str, Any]], nsim: int, ninject: int) -> Calibration:
        """The calibration from the results of all simulations."""
        truth = numpy.array([rows[f"{i}"]["truth"] for i in range(nsim)])
        found = numpy.array([rows[f"{i}"]["found"] for i in range(nsim)])
        nparts = len(self.bands.k)
        injected = numpy.array(
            [[rows[f"{i}, injected {j}"]["found"] for j in range(nparts)] for i in range(ninject)]
        )
        steps = numpy.array([self._step(i) for i in range(ninject)])
        injected = numpy.swapaxes((injected - found[:ninject, None]) / steps[:, None, None], 1, 2)
        response = injected.mean(axis=0) / truth[:ninject].mean(axis=0)
        unfinished = sum(row["status"] == "maxiter" for row in rows.values())
        matrix = self.bands.join(response)
        return Calibration(self._mean(truth), found, injected, response, matrix, unfinished)

    # Measure
    def estimate(self, data: Any, **options: Any) -> Measurement:
        """Measure the band powers of data; `options` go to the optimiser's `minimize`. Collective."""
        if self.calibration is None:
            raise ValueError("bias and response are not known yet: call calibrate() first")
        return self.measure(self.energies(self.maximum(data, **options)))

    def measure(self, energies: ArrayLike) -> Measurement:
        """The band powers from the energies of a map, (nband,)."""
        c, fiducial = self.calibration, self._fiducial
        if c is None:
            raise ValueError("bias and response are not known yet: call calibrate() first")
        found = c.amplitudes(real_array("the energies of a map", energies, shape=fiducial.shape))
        units = numpy.outer(fiducial, fiducial)
        return Measurement(
            k=self._mean(self.bands.k),
            power=(found - c.bias) * fiducial,
            fiducial=fiducial,
            counts=self._counts,
            covariance=c.covariance(self._counts) * units,
            windows=numpy.linalg.solve(c.matrix, c.response),
            noise_bias=c.bias * fiducial,
            fisher=c.matrix / units,
            nsim=len(c.found),
        )
