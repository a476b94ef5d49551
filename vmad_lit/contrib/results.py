"""The results of a reconstruction: fields, curves and draws, in files and in a report."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from vmad_lit import __version__
from vmad_lit.contrib import chains
from vmad_lit.contrib.configuration import OPTIONAL, SAMPLERS, SCHEMA, Configuration, ConfigurationError
from vmad_lit.contrib.configuration import free_of, options_of, write_toml
from vmad_lit.contrib.cosmo4d import gaussian, white_noise
from vmad_lit.contrib.laplace import Laplace, curvature, marginal_of
from vmad_lit.contrib.posterior import Posterior
from vmad_lit.contrib.report import Report, curve_picture, map_picture, picture_of
from vmad_lit.contrib.survey import cosmology_of
from vmad_lit.contrib.vectorspace import Vector
from vmad_lit.lib.catalogue import save
from vmad_lit.lib.cosmology import LinearPower
from vmad_lit.lib.mesh import RealField
from vmad_lit.lib.mpi import on_root
from vmad_lit.lib.spectra import Shells, projection


def meaning(text: str, units: str = "dimensionless") -> dict[str, str]:
    """The attributes of a data set."""
    return dict(description=text, units=units)


#: The fields that are written, and what they are.
MEANING = {
    "data": meaning("the observed density in units of its mean, 1 + delta; 0 where nothing was observed"),
    "mask": meaning("the part of each cell that was observed"),
    "counts": meaning("how many objects were observed in each cell"),
    "clean": meaning("the true density in units of its mean, without noise"),
    "density": meaning("the density that the most probable initial conditions predict for the data"),
    "white_noise": meaning("the most probable initial conditions, as white noise of unit variance"),
    "linear": meaning("the most probable linear density contrast today, delta"),
    "mean_white_noise": meaning("the mean of the posterior of the initial conditions, as white noise"),
    "sd_white_noise": meaning("the standard deviation of the posterior of that white noise in each cell"),
    "mean_linear": meaning("the linear density contrast today that belongs to the mean of the posterior"),
    "true_white_noise": meaning("the true initial conditions as white noise of unit variance"),
    "true_linear": meaning("the true linear density contrast today, delta"),
}


class ParameterError(NamedTuple):
    """The error of a parameter by Laplace's approximation, at least and at most, and how far it is to the minimum, in errors."""

    least: float
    most: float
    shift: float


def errors_of(
    problem: Posterior, x: Vector, bounds: Mapping[str, Mapping[str, float]], interrupt: Any = None
) -> tuple[dict[str, ParameterError | None], int]:
    """The errors of the numbers of a posterior at its most probable point, whatever the modes are, by name; None where
    a bound has stopped it. And how many products with the Hessian that has taken. Collective."""
    names = [name for name in problem.names if name != "modes"]
    free = [n for n in names if all(x[n] != bound.get(n) for bound in bounds.values())]
    if not free:
        return dict.fromkeys(names), 0
    precondition = shell_curvature(problem, x, free)
    found = marginal_of(problem, x, free, ERROR_RTOL, ERROR_PRODUCTS, precondition, interrupt)
    errors: dict[str, ParameterError | None] = dict.fromkeys(names)
    for i, name in enumerate(free):
        prior: Any = problem.priors[name]
        least = float(found.covariance[i, i])
        most = min(1.0, least + float(found.missing[i]))
        slope, shift = float(prior.slope(x[name])), float(found.shift[i])
        errors[name] = ParameterError(slope * least**0.5, slope * most**0.5, shift / most**0.5)
    return errors, found.products + len(free) + 1


def shell_curvature(problem: Posterior, x: Vector, names: Sequence[str]) -> Callable[[Vector], Vector]:
    """A function that multiplies latents by about their covariance: modes by shells of k, each number by itself. Collective."""
    vs, pm = problem.vs, x["modes"].pm
    zero, shells, probe = vs.zeros_like(x), Shells(pm), white_noise(pm, 0, purpose="curvature of shells")
    answer = curvature(problem, x, {**zero, "modes": probe})["modes"]
    r, t = shells.compare(answer, probe)
    bends = numpy.maximum(numpy.nan_to_num(r * t), 0.0)
    own = {n: curvature(problem, x, {**zero, n: 1.0})[n] for n in names}

    def apply(v: Vector) -> Vector:
        modes = (
            v["modes"].r2c().apply(lambda k, m: m / (1 + numpy.interp(k.normp(2) ** 0.5, shells.k, bends)))
        )
        numbers = {n: part / (1 + max(own.get(n, 0.0), 0.0)) for n, part in v.items() if n != "modes"}
        return {**numbers, "modes": modes.c2r()}

    return apply


ERROR_RTOL = 0.1  # the share of a variance that may be missing
ERROR_PRODUCTS = 150  # at most, for each number
MEANING_OF_ERRORS = (
    "Errors are those of Laplace's approximation: the posterior is taken for a normal density around the most "
    "probable point, with the Gauss-Newton curvature there. The error of a number is its standard deviation whatever "
    "the modes and the other numbers are, good to a twentieth, or between the limits that are given; 'to go' is how far "
    "the minimum of the parabola is from the point that the solver has reached."
)


def cells_of(error: ParameterError | None) -> tuple[Any, Any]:
    """Two cells of a table, for the error and for the way to go."""
    if error is None:
        return "none, at a bound", ""
    least, most, shift = error
    exact = least**2 >= (1 - 2 * ERROR_RTOL) * most**2
    return least if exact else f"{least:.2g} to {most:.2g}", shift


class Results:
    """What is known at the end, for files and the report. Its methods are collective, where they do not say otherwise.

    Parameters
    ----------
    run : Reconstruction
        that has been solved.

    Attributes
    ----------
    values : dict
        The most probable parameters: linear modes, and numbers by name.
    fields : dict of RealField
        What is written, by name; see `MEANING`.
    truth : dict
        The true parameters of a mock, or nothing.
    draws : list
        Chains, or a dictionary of arrays from Laplace's approximation; nothing without a sampler.
    curves : dict
        (r, t) by title: correlation with, and transfer function with respect to, what the title names.
    power : dict
        Power spectra of linear modes by title, (Mpc/h)^3, at the wavenumbers of `shells`.
    """

    def __init__(self, run: Any) -> None:
        self.run, self.c, self.problem, self.pm = run, run.c, run.problem, run.pm
        self.shells = Shells(run.pm)
        self.values = self._values(run.x)
        self.modes = {"most probable": self.values["modes"]}
        self.fields: dict[str, RealField] = {"data": run.survey.d, "density": self.values.pop("density")}
        self.fields.update(white_noise=run.x["modes"], linear=self.values["modes"].c2r())
        for name in "mask", "counts", "clean":
            if getattr(run.survey, name) is not None:
                self.fields[name] = getattr(run.survey, name)

        self.draws = self._draw()
        self.truth: dict[str, Any] = {}
        if run.survey.truth is not None:
            self.truth = self._values(run.survey.truth)
            self.modes["truth"] = self.truth["modes"]
            self.fields.update(
                true_white_noise=run.survey.truth["modes"], true_linear=self.modes["truth"].c2r()
            )
        self.curves = self._compare()
        self.power = {title: self.shells.power(modes) for title, modes in self.modes.items()}
        linear = LinearPower(cosmology_of(self.c, self.values), transfer=self.c.model.transfer)
        self.power["linear theory"] = linear(self.shells.k)

    def _values(self, z: Any) -> dict[str, Any]:
        """Modes, density and numbers for latents."""
        found = self.problem.forecast(z, ["density", *self.problem.names])
        return {k: v if k in ("modes", "density") else float(v) for k, v in found.items()}

    def _draw(self) -> list[Any]:
        """The draws of the sampler; its mean and standard deviation become fields."""
        found = [chain for chain in self.run.chains if isinstance(chain, Laplace) or len(chain)]
        if not found or isinstance(found[0], Laplace) and found[0].status != "complete":
            return []
        if isinstance(found[0], Laplace):
            mean, variance = found[0].x, [found[0].variance["modes"]]
            draws: list[Any] = [found[0].draws(self.c.sampler.draws, self.c.sampler.seed)]

        else:
            vs, draws = self.problem.vs, found
            mean = found[0].mean
            for i, chain in enumerate(found[1:], 2):
                mean = vs.addmul(mean, vs.addmul(chain.mean, mean, -1.0), 1.0 / i)
            variance = [chain.variance["modes"] for chain in found if chain.moments.count > 1]
        self.fields["mean_white_noise"] = mean["modes"]
        if variance:
            square = numpy.mean([v.value for v in variance], axis=0)
            self.fields["sd_white_noise"] = self.pm.create(type="real", value=numpy.sqrt(square))
        self.modes["mean of the posterior"] = self._values(mean)["modes"]
        self.fields["mean_linear"] = self.modes["mean of the posterior"].c2r()
        return draws

    def _compare(self) -> dict[str, tuple[Any, Any]]:
        """The curves."""
        compare, f = self.shells.compare, self.fields
        if "clean" not in f:
            return {"final density, against the data": compare(f["density"], f["data"])}
        truth = f["true_white_noise"]
        curves = {"initial modes, against the truth": compare(f["white_noise"], truth)}
        if "mean_white_noise" in f:
            curves["mean modes, against the truth"] = compare(f["mean_white_noise"], truth)
        curves["final density, against the truth"] = compare(f["density"], f["clean"])
        return curves

    # Files
    def save_fields(self, path: str) -> None:
        """Write the fields to an HDF5 file, with attributes that say what they are."""
        c, state = self.c, self.run.state
        attributes: dict[str, Any] = {f"fields/{name}": MEANING[name] for name in self.fields}
        attributes.update(title=c.output.title, program=f"vmad_lit.reconstruct {__version__}")
        attributes.update(BoxSize=self.pm.BoxSize, Nmesh=self.pm.Nmesh, UnitLength="Mpc/h")
        attributes.update(ScaleFactor=c.model.scale_factor, configuration=configuration_text(c))
        attributes.update(iterations=state.nit, status=state.message)
        for name in free_of(c):
            attributes[f"parameter {name}"] = self.values[name]
            if (error := self.run.errors.get(name)) is not None:
                attributes[f"error of {name}"] = error.least
        save(path, self.pm.comm, fields=self.fields, attributes=attributes, dtype=c.output.precision)

    def save_draws(self, path: str) -> None:
        """Write the draws to an HDF5 file."""
        if self.draws and isinstance(self.draws[0], Mapping):
            on_root(self.pm.comm, lambda: chains.write(path, self.draws))
        else:
            chains.write(path, self.draws)

    # The report
    def write_report(self, path: str) -> None:
        """Write the report, which rank 0 draws."""
        run, c = self.run, self.c
        nmesh = " x ".join(map(str, run.nmesh))
        subtitle = f"{c.data.kind}, mesh {nmesh}, box {c.mesh.box} Mpc/h, on {run.comm.size} rank{'s' * (run.comm.size > 1)}"
        page, maps, fit = Report(c.output.title, subtitle), self.maps(), self.fit()

        def write() -> None:
            page.section("Fit").table(["", ""], fit)
            self.add_parameters(page)
            page.section("Maps").pictures(*maps)
            page.section("Modes").pictures(*self.pictures_of_modes())
            self.add_shells(page)
            page.section("Iterations").pictures(self.picture_of_iterations())
            page.code(str(run.state.history), "the table")
            page.section("Configuration").code(configuration_text(c))
            page.section("Run").table(["", ""], self.run_table())
            page.save(path)

        on_root(run.comm, write)

    def fit(self) -> list[tuple[str, Any]]:
        """What the fit is like, in rows of a table."""
        z, problem, state = self.run.x, self.problem, self.run.state
        prior = problem.vs.dot(z, z)
        [(_, likelihood)] = problem.pairs()
        rows: list[tuple[str, Any]] = [("data", likelihood.count), ("unknowns", problem.size)]

        if likelihood.is_sum_of_squares and "sigma" not in self.values:
            chisquare = 2 * (problem.objective(z) - 0.5 * prior)
            rows += [
                ("chi-square of the data", chisquare),
                ("the same for each of them", chisquare / likelihood.count),
            ]
        rows += [
            ("sum of squares of the white unknowns", prior),
            ("-log posterior, up to a constant", problem.objective(z)),
        ]
        # Tell what the validation says
        if self.c.validation.kind is not None:
            [(_, judge)] = self.run.survey.judge.pairs()
            value = self.run.survey.doubt(z)
            rows.append(("data that are not fitted, for the validation", judge.count))
            if judge.is_sum_of_squares and "sigma" not in self.values:
                rows.append(("chi-square for each of them", 2 * value / judge.count))
            else:
                rows.append(("-log likelihood for each of them, up to a constant", value / judge.count))
        if self.c.solver.keep_best and state.best is not None:
            rows.append(("the best point, which is what is shown, is that of iteration", state.best.nit))
        rows += [("iterations", state.nit), ("gradients", state.gev), ("the solver", state.message)]
        return rows + [
            (f"the sampler, chain {i + 1}", found.message) for i, found in enumerate(self.run.chains)
        ]

    def add_parameters(self, page: Report) -> None:
        """The free parameters, and what the sampler has found. For one rank."""
        free = free_of(self.c)
        rows = [[name, write_toml(prior), self.values[name]] for name, prior in free.items()]
        head = ["parameter", "prior", "most probable"]
        if self.truth:
            head.append("truth")
            rows = [[*row, self.truth[row[0]]] for row in rows]
        if errors := self.run.errors:
            head += ["error", "to go, in errors"]
            rows = [[*row, *cells_of(errors[row[0]])] for row in rows]
        found = chains.collect(self.draws) if self.draws else {}
        if found:
            head += ["mean", "sd"]
            rows = [[*row, found[row[0]].mean(), found[row[0]].std()] for row in rows]

        told = self.diagnoses()
        if told:
            head += ["R-hat", "ESS"]
            rows = [[*row, float(told[row[0]]["r_hat"]), float(told[row[0]]["ess_bulk"])] for row in rows]
        if rows:
            page.section("Parameters").table(head, rows)
        if errors:
            page.text(MEANING_OF_ERRORS)
        if warning := self.caution():
            page.text(warning)
        if not found:
            return
        power = told.get("modes_power")
        page.section("Posterior").pictures(*self.pictures_of_draws(found))
        if power is not None:
            k, r_hat, ess = self.shells.k, power["r_hat"], power["ess_bulk"]
            some = spread(len(k), 12)
            caption = "Convergence of the power of the linear modes"
            page.table(["k [h/Mpc]", "R-hat", "ESS"], [[k[i], r_hat[i], ess[i]] for i in some], caption)

    def caution(self) -> str:
        """What is to be minded of free parameters, if they are known only at the point where they and the modes together are
        most probable, or from draws that are not exact; nothing otherwise."""
        drawn = self.draws and not isinstance(self.draws[0], Mapping)
        names = list(free_of(self.c))
        if not names or drawn and not self._has_long_steps():
            return ""
        if drawn:
            return (
                f"Mind what is said of {', '.join(names)}: the draws of MCLMC are not exact, and the mean of a number on which "
                "all modes depend may be off by several tenths of its error. Draw again with a hundredth of the "
                "energy_variance in [sampler], and compare."
            )
        samplers = " or ".join(f'"{name}"' for name in SAMPLERS)
        return (
            f"Mind what is said of {', '.join(names)}: where all unknowns together are most probable, the modes included, "
            "a parameter is not at the mean of its posterior, and may be several errors away from that, and from the "
            f"truth. For means and errors that can be quoted, draw from the posterior: name = {samplers} in [sampler]."
        )

    def _has_long_steps(self) -> bool:
        """Whether draws are those of MCLMC, with steps that may be too long for parameters."""
        default = options_of("MCLMC")["energy_variance"].default
        allowed = self.c.values["sampler"].get("energy_variance", default)
        return self.c.sampler.name == "MCLMC" and allowed > default / 20

    def diagnoses(self) -> dict[str, Any]:
        """R-hat and effective sample sizes of two chains or more. For one rank."""
        if len(self.draws) < 2 or min(map(len, self.draws)) < 4:
            return {}
        return chains.diagnose(self.draws)

    def pictures_of_draws(self, found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """The band powers with credible regions, and the numbers draw after draw. For one rank."""
        k, power = self.shells.k, found["modes_power"]
        bands = {f"{share:.0%} of the draws": chains.credible(power, share) for share in (0.95, 0.68)}
        curves = {"median of the draws": numpy.median(power.reshape(-1, len(k)), axis=0)}
        curves |= {name: self.power[name] for name in ("truth", "linear theory") if name in self.power}
        style = dict(xscale="log", yscale="log")
        bars = curve_picture(k, curves, "k [h/Mpc]", "P(k) [(Mpc/h)^3]", bands, **style)
        alt = (
            f"Band powers with credible regions against k, from {len(power)} chains of {power.shape[1]} draws"
        )
        pictures = [(bars, alt, "Power of the linear modes today: median and credible regions")]

        for name in free_of(self.c):
            lines = {f"chain {i + 1}": draws for i, draws in enumerate(found[name])}
            trace = curve_picture(numpy.arange(found[name].shape[1]), lines, "draw", name)
            pictures.append(
                (trace, f"{name} against the number of the draw, a line for each chain", f"Draws of {name}")
            )
        if len(free_of(self.c)) > 1:
            figure = chains.plot_corner(self.draws, list(free_of(self.c)))
            alt = f"Contours of the densities of pairs of {', '.join(free_of(self.c))}"
            pictures.append((picture_of(figure), alt, "Pairs of parameters: 68 % and 95 % of the draws"))
        return pictures

    def maps(self) -> list[tuple[str, str, str]]:
        """Pictures of densities and of initial conditions, projected through an eighth of the box."""
        shown = {"clean": "the true density", "data": "the data", "density": "the reconstructed density"}
        shown |= {"true_linear": "the true linear modes", "linear": "the most probable linear modes"}
        shown |= {"mean_linear": "the mean of the posterior of linear modes"}
        width = {name: 2.5 * float(numpy.std(self.projected(name))) for name in ("density", "linear")}
        pictures = []

        for name, title in shown.items():
            if name not in self.fields:
                continue
            image, linear = self.projected(name), "linear" in name
            scale = max(width["linear" if linear else "density"], 1e-12)
            more = ", smoothed by two cells" if linear else ""
            alt = f"Map of {title}: mean {numpy.mean(image):.2f}, standard deviation {numpy.std(image):.2f}"
            planes = f"{self.thickness} plane{'s' * (self.thickness > 1)}"
            caption = f"{title[:1].upper()}{title[1:]}{more}; mean over {planes}"
            centre, sides = 0.0 if linear else 1.0, self.pm.BoxSize[:2]
            picture = map_picture(image, sides, centre, scale) if self.pm.comm.rank == 0 else ""
            pictures.append((picture, alt, caption))
        return pictures

    @property
    def thickness(self) -> int:
        """How many planes a map shows, an eighth of the box."""
        return max(1, int(self.pm.Nmesh[2]) // 8)

    def projected(self, name: str) -> Any:
        """The map of a field; linear modes are smoothed by two cells."""
        field = self.fields[name]
        if "linear" in name:
            smooth = gaussian(2 * (self.pm.BoxSize / self.pm.Nmesh).max())
            field = field.r2c().apply(lambda k, v: v * smooth(k)).c2r()
        return projection(field, 2, 0, self.thickness)

    def pictures_of_modes(self) -> list[tuple[str, str, str]]:
        """Pictures of r(k) and t(k), and of power spectra. For one rank."""
        curves = {}
        for title, (r, t) in self.curves.items():
            curves[f"r, {title}"], curves[f" t, {title}"] = r, t
        k, label = self.shells.k, "k [h/Mpc]"
        one = curve_picture(k, curves, label, "r(k), t(k)", ylim=(0, 1.1), xlim=(0, None))
        two = curve_picture(k, self.power, label, "P(k) [(Mpc/h)^3]", xscale="log", yscale="log")
        first = next(iter(self.curves.values()))[0]
        alt = f"Correlation and transfer function against k; the first curve falls from {first[0]:.2f} to {first[-1]:.2f}"
        return [
            (one, alt, "Correlation coefficient r, and transfer function t (dashed)"),
            (two, f"Power spectra against k: {', '.join(self.power)}", "Power of the linear modes today"),
        ]

    def add_shells(self, page: Report) -> None:
        """The table of the curves, of which some rows are enough. For one rank."""
        heads = [f"{letter}, {title.split(',')[0]}" for title in self.curves for letter in "rt"]
        heads += [f"P, {name}" for name in self.power]
        columns = [x for pair in self.curves.values() for x in pair] + list(self.power.values())
        table: Any = numpy.stack([self.shells.k, *columns], axis=-1)
        counts: Any = self.shells.counts
        rows = [[table[i, 0], int(counts[i]), *table[i, 1:]] for i in spread(len(table), 16)]
        caption = f"r and t of {' and of '.join(self.curves)}; P of the linear modes, (Mpc/h)^3"
        page.table(["k [h/Mpc]", "modes", *heads], rows, caption)

    def picture_of_iterations(self) -> tuple[str, str, str]:
        """A picture of the way to the most probable point. For one rank."""
        history = self.run.state.history
        y, g = history["y"], history["gnorm"]
        above = numpy.where(y > y.min(), y - y.min(), numpy.nan)
        curves = {"objective above the lowest": above, "length of the gradient": g}
        picture = curve_picture(history["nit"], curves, "iteration", "", yscale="log")
        alt = f"The objective and the length of its gradient, which goes from {g[0]:.3g} to {g[-1]:.3g}, by iteration"
        return picture, alt, "The way to the most probable initial conditions, in the last epoch"

    def run_table(self) -> list[tuple[str, Any]]:
        """Versions and timings, in rows of a table. For one rank."""
        names = ("numpy", "scipy", "mpi4py", "pmesh", "ducc0", "numba", "h5py", "arviz")
        versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in names}
        rows: list[tuple[str, Any]] = [("vmad_lit", __version__), ("python", platform.python_version())]
        rows += [(name, version) for name, version in versions.items() if version]
        rows += [("machine", platform.platform()), ("ranks", self.run.comm.size)]
        rows += [("threads of each", os.environ.get("OMP_NUM_THREADS", "not said"))]
        return rows + [(f"seconds, {name}", value) for name, value in self.run.seconds.items()]


def spread(n: int, most: int) -> list[int]:
    """At most so many indices out of n, evenly spread, with the first and the last."""
    return sorted({round(i) for i in numpy.linspace(0, n - 1, min(n, most))})


def configuration_text(c: Configuration) -> str:
    """A configuration in TOML as it was taken, with those defaults that have a meaning in it."""
    values: dict[str, Any] = {}
    for section in SCHEMA:
        space = getattr(c, section)
        spaces = space if isinstance(space, list) else [space]
        taken = [{k: v for k, v in vars(one).items() if v is not None} for one in spaces]
        values[section] = taken if isinstance(space, list) else taken[0]
    for section in OPTIONAL:
        if not c.says(section):
            del values[section]

    # Take out the defaults that contradict what is said
    try:
        Configuration(values)
    except ConfigurationError as error:
        for complaint in error.complaints:
            section, _, name = complaint.key.partition(".")
            values[section].pop(name, None)
    text = []
    for section, taken in values.items():
        for one in taken if isinstance(taken, list) else [taken]:
            header = f"[[{section}]]" if isinstance(taken, list) else f"[{section}]"
            text += (
                [header, *(f"{name} = {write_toml(value)}" for name, value in one.items()), ""] if one else []
            )
    return "\n".join(text)
