"""The posterior: parameters with priors, a forward model, and likelihoods, as one problem of white latents."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np

from vmad_lit.contrib.likelihoods import Likelihood, numbers_of
from vmad_lit.contrib.optimize import ModelProblem, Preconditioner, Problem
from vmad_lit.contrib.priors import LOG_ROOT, Prior
from vmad_lit.contrib.vectorspace import ProductSpace, Vector

from vmad_lit.core.autooperator import AutoOperator
from vmad_lit.core.error import did_you_mean
from vmad_lit.core.model import Model
from vmad_lit.core.symbol import Symbol
from vmad_lit.core.tape import Tape
from vmad_lit.core.together import together
from vmad_lit.lib import mpi
from vmad_lit.lib.cosmology import OutOfDomain
from vmad_lit.lib.mpi import MPI

Forward = Callable[..., Any]
LOSS = "loss"  # the name of the objective of the model


class Posterior(ModelProblem):
    """The problem of the white latents of parameters, given data.

    The objective is minus the logarithm of the density of the latents, up to a constant: half the sum of their
    squares, minus the logarithm of the likelihood. A vector is a dictionary of the latents by the names of the
    parameters.

    Parameters
    ----------
    priors : dict
        A `Prior` for each parameter, by name.
    forward : function
        Of the symbols of parameters, by name, those that its signature names. It returns what is compared with
        data: a dictionary of symbols by name, or one symbol. An autooperator will do. Without it parameters are
        compared themselves.
    likelihoods : Likelihood, or dict
        A `Likelihood`, or a list of several, for each result of `forward` that has been observed. One alone is
        that of the only result.
    comm : MPI communicator, optional
        By default that of the first field.
    preconditioner, identity : see `Problem`

    Attributes
    ----------
    names : list of str
        The parameters.
    size : int
        The number of latents on all ranks.
    """

    def __init__(
        self,
        priors: Mapping[str, Prior],
        forward: Forward | None,
        likelihoods: Likelihood | Mapping[str, Any],
        comm: MPI.Comm | None = None,
        preconditioner: Preconditioner | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:

        self.priors, self.forward, self.likelihoods = dict(priors), forward, likelihoods
        self.comm = find_comm(self) if comm is None else comm
        together(self.comm, self.check)
        parts: list[Any] = [*self.priors.values(), *(likelihood for _, likelihood in self.pairs())]
        for x in (x for part in parts for x in part.replicated()):
            mpi.agreed(x, self.comm)

        m = Model()
        losses, roots = self.compare(m)
        m.output(**{LOSS: sum(losses[1:], start=losses[0])}, **roots)

        vs = ProductSpace({name: prior.space(self.comm) for name, prior in self.priors.items()})
        super().__init__(
            m, LOSS, list(self.priors), list(roots), vs, preconditioner, identity, temperature=1.0
        )
        self._forecast: Model | None = None
        self._is_outside = False
        ones = {name: prior.zeros() + 1.0 for name, prior in self.priors.items()}
        self.size = round(vs.dot(ones, ones))

    def __repr__(self) -> str:
        width = max(map(len, (*self.priors, *(name for name, _ in self.pairs()))))
        lines = [f"Posterior of {self.size} latents"]
        lines += [f"  {name:{width}} ~ {prior!r}" for name, prior in self.priors.items()]
        lines += [f"  {name:{width}} : {likelihood!r}" for name, likelihood in self.pairs()]
        return "\n".join(lines)

    def pairs(self) -> list[tuple[str, Likelihood]]:
        """Each likelihood, and the name of what it is for."""
        if not isinstance(self.likelihoods, Mapping):
            return [(self.only_result, self.likelihoods)]
        several = {k: v if isinstance(v, (list, tuple)) else [v] for k, v in self.likelihoods.items()}
        return [(name, likelihood) for name, listed in several.items() for likelihood in listed]

    only_result = "prediction"

    def check(self) -> None:
        """Raise an error if the arguments are not what they should be."""
        for name, prior in self.priors.items():
            if not isinstance(prior, Prior):
                raise TypeError(f"the prior of {name!r} must be a Prior, such as Normal(0, 1), not {prior!r}")
            if not str(name).isidentifier() or name[0] == "_" or name[-1] == "_":
                raise ValueError(f"{name!r} is no name for a parameter: letters, digits and _ between them")
            for other in prior.depends:
                if other not in self.priors:
                    raise ValueError(
                        f"{name!r} depends on {other!r}, which has no prior"
                        + did_you_mean(other, list(self.priors))
                    )

        for _, likelihood in self.pairs():
            if not isinstance(likelihood, Likelihood):
                raise TypeError(
                    f"a likelihood was expected, such as Gaussian(data, sigma), not {likelihood!r}"
                )
        if not self.priors or not self.pairs():
            raise ValueError("a posterior needs at least one prior and one likelihood")
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"forward must be a function of symbols, not {self.forward!r}")

    def express(self, m: Model) -> tuple[dict[str, Symbol], dict[str, Symbol]]:
        """The inputs of a model, and the symbols of parameters and of what the forward model makes of them."""
        values: dict[str, Symbol] = {}
        waiting = dict(self.priors)
        while waiting:
            ready = [name for name, prior in waiting.items() if values.keys() >= set(prior.depends)]
            if not ready:
                raise ValueError(f"the priors of {', '.join(waiting)} depend on each other")
            for name in ready:
                prior = waiting.pop(name)
                z = m.input(name, placement=prior.placement, comm=self.comm)
                values[name] = prior.express(z, values, self.comm)
        return values, run_forward(self.forward, values, self.only_result)

    def compare(self, m: Model) -> tuple[list[Symbol], dict[str, Symbol]]:
        """The loss of each likelihood, and the roots of all by names of their own, as symbols of a model."""
        values, outputs = self.express(m)
        pool, losses = {**values, **outputs}, []
        roots: dict[str, Symbol] = {}
        for name, likelihood in self.pairs():
            if name not in pool:
                raise ValueError(f"the forward model has no result {name!r}" + did_you_mean(name, list(pool)))
            loss, found = likelihood.express(pool[name], finder(pool), self.comm)
            losses.append(loss)
            roots.update((f"root{len(roots)}", root) for root in found)
        return losses, roots

    # The problem
    def _forward(self, x: Vector) -> Any:
        with self._zero_outside():
            return self._add_prior(super()._forward(x))
        return np.inf

    def _pull_back(self, x: Vector) -> Vector:
        self.objective(x)
        if self._is_outside:
            return self.vs.scale(np.nan, x)
        return self.vs.addmul(super()._pull_back(x), x, 1.0)

    def _forward_and_pull(self, x: Vector) -> tuple[Any, Vector]:
        with self._zero_outside():
            loss, slope = super()._forward_and_pull(x)
            return self._add_prior(loss), self.vs.addmul(slope, x, 1.0)
        return np.inf, self.vs.scale(np.nan, x)

    def _add_prior(self, loss: Any) -> Any:
        loss = loss + 0.5 * self.vs.dot(self._point, self._point)
        return np.inf if np.isnan(loss) else loss

    def _gauss_newton(self, x: Vector, v: Vector) -> Vector:
        return self.vs.addmul(super()._gauss_newton(x, v), v, 1.0)

    def _exact(self, x: Vector, v: Vector) -> Vector:
        return self.vs.addmul(super()._exact(x, v), v, 1.0)

    @contextmanager
    def _zero_outside(self) -> Iterator[None]:
        """For a run of the model, which ends without an error where parameters have left their domain."""
        self._is_outside = False
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                yield
        except OutOfDomain:
            self._is_outside, self._tape = True, None

    def _tape_at(self, x: Vector) -> Tape:
        self.objective(x)
        if self._is_outside:
            raise ValueError(f"there are no second derivatives where the density is zero: {self.explain(x)}")
        return super()._tape_at(x)

    def ingredients(self) -> dict[str, Any]:
        """The priors, the forward model and the likelihoods, besides what all problems have."""
        own = dict(priors=self.priors, forward=self.forward, likelihoods=self.likelihoods)
        return {**Problem.ingredients(self), **own}

    def explain(self, z: Vector) -> str:
        """Which part of the posterior is not finite at latents, in words; nothing if all are. Collective."""
        losses = Model()
        losses.output(**{f"{LOSS}{i}": loss for i, loss in enumerate(self.compare(losses)[0])})
        forecast = self._forecast_model()
        parts = [(f"the parameter {name!r}", forecast, name) for name in self.priors]
        results = [name for name in forecast._outputs if name not in self.priors]
        parts += [(f"the result {name!r} of the forward model", forecast, name) for name in results]
        pairs = [f"{name!r}, {likelihood!r}," for name, likelihood in self.pairs()]
        parts += [(f"the likelihood of {pair}", losses, f"{LOSS}{i}") for i, pair in enumerate(pairs)]
        for what, model, name in parts:
            # Say what is wrong with a part
            try:
                with np.errstate(all="ignore"):
                    value = model.compute(name, init=dict(z))
            except OutOfDomain as error:
                return f"{what} has no value: {error}"
            if self.vs.any(not np.isfinite(numbers_of(value)).all()):
                return f"{what} is not finite"
        return ""

    # Latents and values
    def zeros(self) -> Vector:
        """The latents zero, the most probable ones before there are data."""
        return {name: prior.zeros() for name, prior in self.priors.items()}

    def draw(self, seed: int) -> Vector:
        """Latents drawn from the prior, the same on any number of ranks."""
        return self.vs.normal(self.zeros(), seed, "prior")

    def values(self, z: Vector) -> dict[str, Any]:
        """The values of the parameters for latents."""
        return self.forecast(z, self.names)

    def predict(self, z: Vector) -> dict[str, Any]:
        """What the forward model predicts for latents, by name."""
        return self.forecast(z, [n for n in self._forecast_model()._outputs if n not in self.priors])

    def forecast(self, z: Vector, names: Sequence[str]) -> dict[str, Any]:
        """Parameters and predictions for latents."""
        return self._forecast_model().compute(list(names), init=dict(z), return_dict=True)

    def _forecast_model(self) -> Model:
        if self._forecast is None:
            self._forecast = Model()
            values, outputs = self.express(self._forecast)
            self._forecast.output(**{**outputs, **values})
        return self._forecast

    def latents(self, values: Mapping[str, Any]) -> Vector:
        """The latents of values of the parameters."""
        missing = [name for name in self.priors if name not in values]
        if missing:
            raise ValueError(f"values are needed of all parameters, also of {', '.join(missing)}")
        return {name: prior.latent(values[name], values) for name, prior in self.priors.items()}

    def summary(self, z: Vector) -> dict[str, Any]:
        """What a chain records of latents: the values of numbers and small arrays, the band powers of fields."""
        found: dict[str, Any] = {}
        for name, value in self.values(z).items():
            found.update(self.priors[name].summary(name, value))
        return found

    def log_prior(self, z: Vector) -> float:
        """The logarithm of the density of the latents before there are data."""
        return -0.5 * self.vs.dot(z, z) - self.size * LOG_ROOT

    def log_likelihood(self, z: Vector) -> float:
        """The logarithm of the probability of the data for latents."""
        loss = self.objective(z) - 0.5 * self.vs.dot(z, z)
        return -loss - sum(likelihood.constant() for _, likelihood in self.pairs())

    # Data
    def simulate(self, seed: int, z: Vector = None) -> tuple[Vector, Any]:
        """Latents drawn from the prior, unless they are given, and data drawn from the likelihoods.

        Returns
        -------
        z, data
            The data in the form of `likelihoods`; for `with_data`.
        """
        z = self.draw(seed) if z is None else z
        found = self.forecast(z, list(self._forecast_model()._outputs))
        numbers = itertools.count()

        def draw(name: str, likelihood: Likelihood) -> Any:
            return likelihood.draw(found[name], finder(found), seed, f"data {next(numbers)}")

        return z, self._map(draw)

    def _map(self, function: Callable[..., Any], *others: Any) -> Any:
        """What a function makes of each likelihood and of what stands in its place in `others`."""
        if not isinstance(self.likelihoods, Mapping):
            return function(self.only_result, self.likelihoods, *others)
        found: dict[str, Any] = {}
        for name, listed in self.likelihoods.items():
            given = [listed, *(other[name] for other in others)]
            several = isinstance(listed, (list, tuple))
            items = zip(*given, strict=True) if several else [given]
            results = [function(name, *item) for item in items]
            found[name] = results if several else results[0]
        return found

    def with_data(self, data: Any) -> Self:
        """The same posterior for other data, such as those of `simulate`."""
        likelihoods = self._map(lambda name, likelihood, new: likelihood.with_data(new), data)
        options = self.comm, self.preconditioner, self.identity
        return type(self)(self.priors, self.forward, likelihoods, *options)


def finder(pool: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A function that finds what a name stands for; what is no name it returns."""

    def find(x: Any) -> Any:
        if isinstance(x, str) and x not in pool:
            raise ValueError(f"there is no parameter or result {x!r}" + did_you_mean(x, list(pool)))
        return pool[x] if isinstance(x, str) else x

    return find


def find_comm(posterior: Posterior) -> MPI.Comm:
    """The communicator of the first field of a posterior, or that of all ranks."""
    comms = [prior.pm.comm for prior in posterior.priors.values() if hasattr(prior, "pm")]
    comms += [getattr(likelihood, "comm", None) for _, likelihood in posterior.pairs()]
    return next((comm for comm in comms if comm is not None), MPI.COMM_WORLD)


def run_forward(forward: Forward | None, values: Mapping[str, Symbol], only: str) -> dict[str, Symbol]:
    """What a forward model makes of the symbols of parameters, by name."""
    if forward is None:
        return {}
    found = forward(**choose_arguments(forward, values))
    if isinstance(forward, AutoOperator) and isinstance(found, (list, tuple)):
        found = dict(zip(forward.aout, found, strict=True))
    found = {only: found} if isinstance(found, Symbol) else found
    if not isinstance(found, Mapping) or not all(isinstance(x, Symbol) for x in found.values()):
        raise TypeError(f"forward must return a symbol, or a dictionary of symbols by name, not {found!r}")
    for name in found:
        if name in values:
            raise ValueError(f"a result of the forward model has the name of a parameter, {name!r}")
    return dict(found)


def choose_arguments(forward: Forward, values: Mapping[str, Symbol]) -> dict[str, Symbol]:
    """The parameters that a forward model takes."""
    if isinstance(forward, AutoOperator):
        names = needed = list(forward.ain)
    else:
        known = inspect.signature(forward).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in known):
            return dict(values)
        names = [p.name for p in known]
        needed = [p.name for p in known if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    for name in needed:
        if name not in values:
            raise ValueError(
                f"the forward model needs {name!r}, which has no prior" + did_you_mean(name, list(values))
            )
    return {name: values[name] for name in names if name in values}
