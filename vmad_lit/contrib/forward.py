"""Forward models of parameters by name: from linear modes to the density of matter, or of tracers, today."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vmad_lit.contrib.priors import Names, names_of
from vmad_lit.core.arguments import one_of
from vmad_lit.core.error import did_you_mean
from vmad_lit.core.symbol import Symbol, Value
from vmad_lit.core.together import together
from vmad_lit.lib import fastpm, linalg, tracers
from vmad_lit.lib.cosmology import Cosmology, Planck15
from vmad_lit.lib.mesh import ParticleMesh, RealField, check_field
from vmad_lit.lib.nbody import check_stages, find_background
from vmad_lit.lib.spectra import Direction, unit_vector


class Density:
    """The density of matter or of tracers in units of its mean, as a function of symbols of parameters.

    Parameters
    ----------
    pm : ParticleMesh
    stages : sequence of float
        Scale factors: none for linear theory, one for second-order perturbation theory, several for N-body steps.
    cosmology : Cosmology
    depends : str or sequence of str
        The parameters of the cosmology that are arguments: 'Om0' is the only one that the evolution knows.
    bias : 'none', 'eulerian' or 'lagrangian'
        Whether the tracers are matter; or have a density that is linear in that of matter; or are particles with
        weights of linear theory.
    terms : sequence of str
        The bias parameters that are arguments; see `lagrangian_weights`. For the Eulerian bias 'b1' alone.
    los, observer : the line of sight, for densities in redshift space; see `along_sight`
    selection : RealField, optional
        What the density is multiplied by.
    modes : str
        The name of the argument that is the linear modes.
    q : array (N, ndim), optional
        Where the particles begin; by default one in the middle of each cell.
    """

    def __init__(
        self,
        pm: ParticleMesh,
        stages: ArrayLike = (),
        cosmology: Cosmology = Planck15,
        depends: Names = (),
        bias: str = "none",
        terms: Sequence[str] | None = None,
        los: Direction = None,
        observer: Direction = None,
        selection: RealField | None = None,
        modes: str = "delta",
        q: Any = None,
    ) -> None:

        self.pm, self.cosmology, self.modes = pm, cosmology, modes
        self.los, self.observer, self.selection = los, observer, selection
        self.depends = names_of(depends)
        self.bias = one_of("bias", bias, ("none", "eulerian", "lagrangian"))
        terms = (
            terms
            if terms is not None
            else {"none": (), "eulerian": ("b1",), "lagrangian": ("b1", "b2")}[bias]
        )
        self.terms = tuple(terms)
        self.stages = tuple(check_stages(stages)) if np.size(stages) else ()
        together(pm.comm, self.check)
        self.q = pm.generate_uniform_particle_grid(shift=0.5) if q is None and self.stages else q

        names = (modes, *self.depends, *self.terms)
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        self.__signature__ = inspect.Signature(parameters)

    def check(self) -> None:
        """Raise an error unless the arguments fit together."""
        for name in self.depends:
            if name not in self.cosmology.__symbols__:
                raise ValueError(
                    f"{name!r} is no parameter of a cosmology"
                    + did_you_mean(name, self.cosmology.__symbols__)
                )
        if self.bias == "lagrangian":
            tracers.check_terms(self.terms)
            if not self.stages:
                raise ValueError("a Lagrangian bias is that of particles: give stages, or an Eulerian bias")

        elif self.terms != (("b1",) if self.bias == "eulerian" else ()):
            raise ValueError(f"the terms of the bias {self.bias!r} are other ones than {self.terms}")
        if self.los is not None and self.observer is not None:
            raise ValueError("give either los or observer")
        if self.observer is not None and not self.stages:
            raise ValueError("linear theory in redshift space needs a line of sight: los, and no observer")
        if self.selection is not None:
            check_field(self.selection, RealField, self.pm)

    def __call__(self, **given: Symbol) -> dict[str, Symbol]:
        """The symbol of the density, by the name 'density'."""
        cosmology = self.cosmology.replace(**{name: given[name] for name in self.depends})
        b = [given[name] for name in self.terms]
        make = self.of_particles if self.stages else self.of_modes
        density = make(given[self.modes], cosmology, b)
        return dict(density=density if self.selection is None else density * self.selection)

    def of_modes(self, modes: Symbol, cosmology: Cosmology, b: Sequence[Symbol]) -> Symbol:
        """Linear theory today, in redshift space that of Kaiser (1987): 1 + (b + f mu^2) delta."""
        density = fastpm.c2r(modes) * b[0] if b else fastpm.c2r(modes)
        if self.los is not None:
            f = cosmology.background(a=np.array([1.0])).f1(1.0)
            density = density + fastpm.c2r(fastpm.apply_transfer(modes, self.along())) * f
        return density + 1.0

    def along(self) -> Any:
        """The transfer function mu^2 of the line of sight."""
        n = unit_vector("los", self.los, self.pm.ndim)

        @fastpm.fixed_transfer
        def transfer(k: Any) -> Any:
            k2 = k.normp(2)
            return sum(ki * ni for ki, ni in zip(k, n)) ** 2 / np.where(k2 == 0, 1, k2)

        return transfer

    def of_particles(self, modes: Symbol, cosmology: Cosmology, b: Sequence[Symbol]) -> Symbol:
        """Particles where the displacements bring them, painted with their weights."""
        q, pm, a = self.q, self.pm, self.stages[-1]
        dx, p, _ = fastpm.nbody(modes, q, self.stages, cosmology, pm)
        x = q + dx
        if self.los is not None or self.observer is not None:
            factor = redshift_factor(find_background(cosmology, self.stages), a)
            x = tracers.redshift_space(x, p, factor, pm.comm, self.los, self.observer)
        weights: Value = 1.0
        if self.bias == "lagrangian":
            weights = tracers.lagrangian_weights(modes, linalg.stack(b), q, pm, self.terms)
        density = tracers.density(x, weights, q, pm)
        return tracers.eulerian_bias(density, b[0]) if self.bias == "eulerian" else density


def redshift_factor(background: Any, a: float) -> Value:
    """The factor 1 / (a^2 E) of `tracers.redshift_factor`, also for a background of symbols."""
    E = background.E(a)
    return 1.0 / (E * a**2) if isinstance(E, Symbol) else tracers.redshift_factor(background, a)
