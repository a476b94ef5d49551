"""What a configuration says was observed: the density on the mesh, its noise, and the likelihood of its causes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, NoReturn

import numpy

from vmad_lit.contrib.configuration import BIAS_KEYS, COSMOLOGY, UNITS, UNITS_WITHOUT_H
from vmad_lit.contrib.configuration import Configuration, KeyPath, bounds_of
from vmad_lit.contrib.cosmo4d import white_noise
from vmad_lit.contrib.datafiles import BadData, check_numbers, look_at_columns, look_at_mesh, names_of
from vmad_lit.contrib.datafiles import read_columns, read_mesh
from vmad_lit.contrib.forward import Density
from vmad_lit.contrib.likelihoods import Gaussian, Likelihood, Poisson, Smoothed
from vmad_lit.contrib.optimize import Validation
from vmad_lit.contrib.posterior import Posterior, finder
from vmad_lit.contrib.priors import LinearField, LogNormal, Normal, Numbers, TruncatedNormal, Uniform
from vmad_lit.contrib.vectorspace import Vector
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.lib.cosmology import Cosmology
from vmad_lit.lib.mesh import ParticleMesh, RealField
from vmad_lit.lib.mpi import MPI, add_up, on_root


def look_at_files(c: Configuration, comm: MPI.Comm) -> None:
    """See, without reading them, that the files of a configuration hold what they should. Collective.

    Raises
    ------
    ConfigurationError
        On all ranks, with everything that is wrong.
    """
    shape = list(c.mesh.cells) if isinstance(c.mesh.cells, list) else [c.mesh.cells] * 3

    def look(section: str) -> None:
        space = getattr(c, section)
        if section == "data" and c.data.kind == "catalogue":
            look_at_columns(c.path(space.file), space.format, names_of(space.position), space.weight)
        elif space.file is not None:
            look_at_mesh(c.path(space.file), space.format, section, space.array, shape)

    def look_at_all() -> list[tuple[KeyPath, str]]:
        found: list[tuple[KeyPath, str]] = []
        for section in "data", "mask", "noise":
            try:
                look(section)
            except BadData as error:
                found.append((tuple(error.key.split(".")), error.sentence))
        return found

    if found := on_root(comm, look_at_all):
        raise c.error(*found)


def read_catalogue(
    c: Configuration, pm: ParticleMesh, window: str | None = None, mask: RealField | None = None
) -> tuple[RealField, float]:
    """The catalogue that a configuration names, painted with a window, by default that of `pm`, and the number of its
    rows where the mask is above 0, or of rows of equal weight that would scatter as much. Collective.

    Raises
    ------
    BadData, on all ranks
    """
    path, comm = c.path(c.data.file), pm.comm
    x, w, begin = read_columns(path, c.data.format, c.data.position, c.data.weight, comm)
    unit = UNITS[c.data.units] if c.data.units in UNITS else UNITS_WITHOUT_H[c.data.units] * c.cosmology.h
    x = (x - c.data.origin) * unit

    told = check_numbers(comm, x, numpy.isfinite(x), (begin, 0), "values are not finite")
    if told:
        raise BadData(f"{path}: {told}", "data.position")
    inside = ((x >= 0) & (x <= pm.BoxSize)).all(axis=1)
    told = check_numbers(comm, x, inside, (begin,), f"positions are outside the box {box_of(pm)}")
    if told:
        raise BadData(f"{path}: {told} Mpc/h; are origin and units right?", "data.position")
    if w is not None and (told := check_numbers(comm, w, w >= 0, (begin,), "weights are not 0 or more")):
        raise BadData(f"{path}: {told}", "data.weight")

    w = numpy.ones(len(x)) if w is None else w
    layout = pm.decompose(x)
    part = 1.0 if mask is None else mask.readout(x, resampler="nnb", layout=layout)
    counted = w * (part > 0)
    weight, squares, all_of_it = (
        float(add_up(comm, total)) for total in (counted.sum(), (counted**2).sum(), w.sum())
    )
    if not all_of_it > 0:
        raise BadData(f"{path}: all weights are 0", "data.weight")
    if not weight > 0:
        raise BadData(f"{path}: no object is where the mask is above 0", "data.file")
    return pm.paint(x, mass=w, resampler=window, layout=layout), weight**2 / squares


def box_of(pm: ParticleMesh) -> str:
    """A box in words."""
    sides = [float(side) for side in pm.BoxSize]
    return f"[0, {sides[0]:g}]" if len(set(sides)) == 1 else f"of the sides {sides}"


KINDS: dict[str, type[Numbers]] = {
    "normal": Normal,
    "lognormal": LogNormal,
    "uniform": Uniform,
    "truncated": TruncatedNormal,
}


def prior_of(said: Mapping[str, Any]) -> Numbers:
    """The prior that a table of a configuration describes."""
    return KINDS[said["prior"]](**{name: value for name, value in said.items() if name != "prior"})


def free_parameters(c: Configuration) -> dict[str, Numbers]:
    """The parameters of the cosmology and of the bias that have priors in the place of numbers."""
    said = {**vars(c.cosmology), **{name: getattr(c.bias, name) for name in BIAS_KEYS[c.bias.kind]}}
    return {name: prior_of(value) for name, value in said.items() if isinstance(value, dict)}


def cosmology_of(c: Configuration, numbers: Mapping[str, Any]) -> Cosmology:
    """The cosmology of a configuration, with these numbers for parameters that are free."""
    return Cosmology(**{name: numbers.get(name, value) for name, value in vars(c.cosmology).items()})


def stages_of(c: Configuration) -> Array:
    """The scale factors of the evolution; none for linear theory."""
    end = [c.model.scale_factor]
    if c.model.evolution == "nbody":
        return numpy.linspace(c.model.start, end[0], c.model.steps + 1)
    return numpy.array(end if c.model.evolution == "lpt" else [])


def forward_model(c: Configuration, pm: ParticleMesh) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The priors of the linear modes and the free parameters, by name, and the function from them to the density."""
    free = free_parameters(c)
    cosmology = cosmology_of(c, {name: float(prior.value(0.0)) for name, prior in free.items()})
    depends = [name for name in COSMOLOGY if name in free]
    modes = LinearField(pm, cosmology, depends, c.model.transfer)
    # Leave out terms of the bias that vanish
    terms = [n for n in BIAS_KEYS[c.bias.kind] if n == "b1" or n in free or getattr(c.bias, n) != 0]

    density = Density(
        pm,
        stages_of(c),
        cosmology,
        depends=[name for name in depends if name == "Om0"],
        bias=c.bias.kind,
        terms=terms,
        los=c.model.line_of_sight if c.model.redshift_space else None,
        modes="modes",
    )
    fixed: dict[str, Any] = {name: float(getattr(c.bias, name)) for name in terms if name not in free}
    return {"modes": modes, **free}, functools.partial(density, **fixed)


#: Sections of a configuration that make the problem, and keys that do not.
OF_THE_PROBLEM = "mesh", "data", "mask", "noise", "bias", "model", "cosmology", "validation"
NOT_OF_THE_PROBLEM = "file", "every", "patience"


class Survey:
    """What was observed, or made up, and the likelihood of what it was made from. Collective.

    Attributes
    ----------
    priors, forward :
        of the modes and of the free parameters, by name; and the model from them to the density.
    d : RealField
        The density in units of its mean, 0 in cells that were not observed.
    counts : RealField or None
        How many objects are in each cell, if their number is what is compared.
    noise : float, RealField, or function of k
        The standard deviation of the noise of a density, if it is free for an amplitude of 1; or its power spectrum;
        or the number of objects that is expected in a cell of the mean density.
    mask : RealField or None
        The part of each cell that was observed.
    truth : dict or None
        The latents from which the data were made up.
    clean : RealField or None
        The density without noise, if known.
    held : array of truth values, or None
        Which cells of this rank are held out of the fit, for a validation.
    second : RealField or None
        Data with other noise, for a validation.

    Raises
    ------
    BadData
        On all ranks, if a file is not what it should be.
    """

    def __init__(self, c: Configuration, pm: ParticleMesh) -> None:
        self.pm, self.c = pm, c
        self.truth: dict[str, Any] | None = None
        self.clean: RealField | None = None
        self.counts: RealField | None = None
        self.second: RealField | None = None
        self.held: Array | None = None
        self.mask: RealField | None = None
        if c.mask.file is not None:
            self.mask = self._read_mask()
        self.priors, self.forward = forward_model(c, pm)
        self.poisson = c.noise.kind == "poisson"
        self.noise: Any = self._find_noise()
        if c.data.kind == "mock":
            self._make_up(c.data.seed)
        elif c.data.kind == "density":
            self._read_density()
        else:
            self._count()
        if c.validation.kind == "cells":
            self.held = self._hold_out()

    def likelihood(self, smoothing: float = 0.0, judge: bool = False) -> Likelihood:
        """The likelihood of a density, compared after smoothing with a Gaussian of a scale in Mpc/h; with `judge` that of
        what is not fitted."""
        cells = self.seen
        if self.held is not None:
            cells = cells & (self.held if judge else ~self.held)
        mask = None if self.mask is None and self.held is None else self._like(cells)
        data: Any = self.counts if self.poisson else self.d
        data = self.second if judge and self.second is not None else data
        if self.poisson:
            return Poisson(data, mean=self.noise, mask=mask, floor=FLOOR)
        if callable(self.noise):
            return Gaussian(data, power=self.noise)
        amplitude = "sigma" if "sigma" in self.priors else None
        given = dict(sigma=self._spread(self.noise), mask=mask, amplitude=amplitude)
        return Smoothed(data, scale=smoothing, **given) if smoothing else Gaussian(data, **given)

    def _hold_out(self) -> Array:
        """Which of the observed cells are held out of the fit."""
        v, comm = self.c.validation, self.pm.comm
        normal = white_noise(self.pm, v.seed, purpose="cells that are held out").value
        held = (normal < NormalDist().inv_cdf(v.share)) & self.seen
        number, seen = (int(add_up(comm, int(cells.sum()))) for cells in (held, self.seen))
        if not 0 < number < seen:
            told = f"a share of {v.share} of {seen} cells that were observed leaves {number} to be held out"
            raise BadData(told, "validation.share")
        return held

    def validation(self) -> Validation | None:
        """The validation that the configuration asks for."""
        v = self.c.validation
        if v.kind is None:
            return None
        return Validation(self.doubt, every=v.every, patience=v.patience)

    @functools.cached_property
    def judge(self) -> Posterior:
        """The posterior of what is not fitted."""
        likelihoods = dict(density=self.likelihood(judge=True))
        return Posterior(self.priors, self.forward, likelihoods, self.pm.comm)

    def doubt(self, z: Vector) -> float:
        """Minus the logarithm of the likelihood of what is not fitted, at latents z. Collective."""
        return self.judge.objective(z) - 0.5 * self.judge.vs.dot(z, z)

    def bounds(self) -> dict[str, dict[str, float]]:
        """The lower and upper bounds that the configuration gives to parameters, as those of their latents."""
        return {
            side: {name: float(self.priors[name].latent(value, {})) for name, value in bounds.items()}
            for side, bounds in bounds_of(self.c).items()
        }

    def posterior(self, smoothing: float | None = None) -> Posterior:
        """The posterior, by default with the smoothing of the configuration."""
        scale = self.c.data.smoothing if smoothing is None else smoothing
        likelihoods = dict(density=self.likelihood(scale))
        return Posterior(
            self.priors,
            self.forward,
            likelihoods,
            self.pm.comm,
            identity={**self.named(), "smoothing": scale},
        )

    def named(self) -> dict[str, Any]:
        """The values of the configuration that make the problem, by section and key."""
        sections = {name: said for name, said in self.c.values.items() if name in OF_THE_PROBLEM}
        return {
            name: {key: value for key, value in said.items() if key not in NOT_OF_THE_PROBLEM}
            for name, said in sections.items()
        }

    @property
    def seen(self) -> Array:
        """Which cells of this rank were observed, at least in part."""
        return (
            numpy.ones(self.pm.create(type="real").value.shape, "?")
            if self.mask is None
            else self.mask.value > 0
        )

    @property
    def part(self) -> Array:
        """Which part of each cell was observed; 1 where nothing was, so that one can divide by it."""
        return numpy.where(self.seen, 1.0 if self.mask is None else self.mask.value, 1.0)

    def _like(self, values: Array) -> RealField:
        return self.pm.create(type="real", value=values)

    def _spread(self, sigma: Any) -> Any:
        """The standard deviation in each cell, which is larger where only a part was observed."""
        return sigma if self.mask is None else self._like(getattr(sigma, "value", sigma) / self.part**0.5)

    # Read
    def _read_mask(self) -> RealField:
        mask = self._read_map("mask", "are not between 0 and 1", lambda v: (v >= 0) & (v <= 1))
        if not mask.csum() > 0:
            raise BadData(
                f"{self.c.path(self.c.mask.file)}: all values are 0, so nothing was observed", "mask.array"
            )
        return mask

    def _read_map(self, section: str, rule: str, good: Callable[[Array], Array]) -> RealField:
        """The mesh that a section names, if its values follow a rule where something was observed; 1 elsewhere."""
        space = getattr(self.c, section)
        path = self.c.path(space.file)
        field = read_mesh(path, section, space, self.pm, None if self.mask is None else self.seen)
        field = self._like(numpy.where(self.seen, field.value, 1.0))
        offset = [part.start for part in field.slices]
        if told := check_numbers(self.pm.comm, field.value, good(field.value), offset, f"values {rule}"):
            raise BadData(f"{path}: {told}", f"{section}.array")
        return field

    def _find_noise(self) -> Any:
        """What is said of the noise; None if it follows from the number of objects."""
        noise = self.c.noise
        if noise.spectrum is not None:
            return read_spectrum(self.c.path(noise.spectrum), self.pm)
        if noise.file is not None:
            return self._read_map("noise", "are not above 0", lambda v: v > 0)
        if isinstance(noise.sigma, dict):
            self.priors["sigma"] = prior_of(noise.sigma)
            return 1.0
        return noise.mean if self.poisson else noise.sigma

    def _read_density(self) -> None:
        """Read a density, and bring it to a mean of 1."""
        c = self.c
        d: Any = read_mesh(
            c.path(c.data.file), "data", c.data, self.pm, None if self.mask is None else self.seen
        )
        if c.data.contrast and not self._lowest(d.value) < 0:
            self._blame_contrast("no value is below 0, and a contrast has voids", "take contrast = true away")
        # Divide by the mean, if it is that of a density
        hint = "if this is delta, say contrast = true; if it is a density all the same, contrast = false"
        self.d, mean, spread = self._normalise(d + 1.0 if c.data.contrast else d)
        if not mean > 1e-3 * spread:
            self._blame_contrast(f"expected a density with a positive mean, got the mean {mean:.3g}", hint)
        # See that the density is not negative without a reason
        if c.says("data", "contrast"):
            return
        low = self.d.value + 7 * self._deviation()
        if self._lowest(low) < 0 and self._lowest(low) < 2 * self._lowest_of_model():
            count = int(add_up(self.pm.comm, numpy.sum((low < 0) & self.seen)))
            told = f"{count} cells are below 0 by more than the noise explains, down to {self._lowest(self.d.value):.3g} of the mean"
            self._blame_contrast(told, hint)

    def _lowest(self, values: Array) -> float:
        """The lowest of the values of all ranks in cells that were observed."""
        own = float(values[self.seen].min(initial=numpy.inf))
        return float(self.pm.comm.allreduce(own, MPI.MIN))

    def _blame_contrast(self, told: str, hint: str) -> NoReturn:
        """Raise BadData for the key that says whether a file has a density or a contrast."""
        raise BadData(f"{self.c.path(self.c.data.file)}: {told}; {hint}", "data.contrast")

    def _deviation(self) -> Any:
        """The standard deviation of the noise in each cell, at most; of one that has a prior at its upper end."""
        if callable(self.noise):
            modes = self.pm.create(type="complex", value=0).apply(
                lambda k, v: v + self.noise(k.normp() ** 0.5) ** 0.5
            )
            return (float(modes.cdot(modes).real) / float(self.pm.BoxSize.prod())) ** 0.5
        amplitude = float(self.priors["sigma"].value(3.0)) if "sigma" in self.priors else 1.0
        spread = self._spread(self.noise)
        return amplitude * getattr(spread, "value", spread)

    def _lowest_of_model(self) -> float:
        """The lowest density that the model makes of a draw from the priors, with the parameters in their middle."""
        z = {name: prior.zeros() for name, prior in self.priors.items()}
        z["modes"] = white_noise(self.pm, 0)
        return min(0.0, self._lowest(self.posterior().forecast(z, ["density"])["density"].value))

    def _count(self) -> None:
        """Read a catalogue, and find how many objects there are in a cell of the mean density."""
        counts, number = read_catalogue(self.c, self.pm, "nnb" if self.poisson else None, self.mask)
        cells = float(self.pm.Nmesh.prod()) if self.mask is None else float(self.mask.csum())
        if self.poisson:
            self.counts = self._like(numpy.where(self.seen, counts.value, 0.0))
            self.noise = self._expected(float(self.counts.csum()) / cells)
        elif self.noise is None:
            self.noise = (cells / number) ** 0.5
        self.d, _, _ = self._normalise(self._like(counts.value / self.part))

    def _expected(self, mean: float) -> Any:
        """The number of objects in each cell that is expected for the mean density."""
        return float(mean) if self.mask is None else self.mask * float(mean)

    def _normalise(self, d: RealField) -> tuple[RealField, float, float]:
        """A density in units of its mean over what was observed, and 0 where nothing was; its mean and its scatter."""
        _, power = math.frexp(max(0.0, -self._lowest(-abs(d.value))))
        d = self._like(numpy.where(self.seen, numpy.ldexp(d.value, -power), 0.0))
        weight = self._like(self.part * self.seen)
        total = weight.csum()
        mean = d.cdot(weight) / total
        spread = max((d * d).cdot(weight) / total - mean**2, 0.0) ** 0.5
        factor: Any = 1.0 / mean if mean else 1.0
        return d * factor, math.ldexp(mean, power), math.ldexp(spread, power)

    # Make up
    def _make_up(self, seed: int) -> None:
        """Data from white noise and the middle of the priors of free parameters, with noise."""
        zeros = {name: prior.zeros() for name, prior in self.priors.items()}
        self.truth = {**zeros, "modes": white_noise(self.pm, seed)}
        self.d = self.truth["modes"] * 0.0
        self.counts = self.d if self.poisson else None
        self.noise = self._expected(self.noise) if self.poisson else self.noise
        found = self.posterior().forecast(self.truth, ["density", *self.priors])
        self.clean = found["density"]
        likelihood = self.likelihood()
        drawn = likelihood.draw(found["density"], finder(found), seed, "noise of data")
        v = self.c.validation
        if v.kind == "noise":
            self.second = likelihood.draw(found["density"], finder(found), v.seed, "noise of a validation")
        if self.poisson:
            expected = numpy.where(self.seen, getattr(self.noise, "value", self.noise), 1.0)
            self.counts, self.d = drawn, self._like(drawn.value / expected)
        else:
            self.d = drawn


FLOOR = 0.01  # objects in a cell: the least that a model expects which may make densities below 0


def read_spectrum(path: str, pm: ParticleMesh) -> Callable[[Any], Any]:
    """The power spectrum of the noise in a file with two columns, k in h/Mpc and S in (Mpc/h)^3. Collective.

    Between the lines it is interpolated in the logarithms of both, and beyond the ends it is constant.
    """

    def read() -> Array:
        try:
            table = numpy.load(path) if path.endswith(".npy") else numpy.loadtxt(path)
        except Exception as error:  # a reader of files from anywhere
            raise BadData(f"{path} cannot be read as a table of numbers: {error}", "noise.spectrum") from None
        if table.ndim != 2 or table.shape[1] != 2 or len(table) < 2:
            raise BadData(
                f"{path}: expected two columns, k and S, got the shape {table.shape}", "noise.spectrum"
            )
        if not (numpy.isfinite(table) & (table > 0)).all() or not (numpy.diff(table[:, 0]) > 0).all():
            raise BadData(f"{path}: expected k that grow, and both columns above 0", "noise.spectrum")
        return numpy.log(table.astype("f8"))

    logs = on_root(pm.comm, read)
    return functools.partial(interpolated, logs)


def interpolated(logs: Array, k: Any) -> Any:
    """The power at k from a table of logarithms."""
    with numpy.errstate(divide="ignore"):
        return numpy.exp(numpy.interp(numpy.log(k), logs[:, 0], logs[:, 1]))
