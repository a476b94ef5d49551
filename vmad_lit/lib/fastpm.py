"""Particles and meshes, and the FastPM scheme, under one name.

The operators live in `mesh`, `transfer`, `exchange`, `painting`, `force`, `lpt`, `axpy` and `nbody`.
"""

from vmad_lit.lib.mesh import (
    BaseComplexField,
    ComplexField,
    ParticleMesh,
    RealField,
    TransposedComplexField,
    UntransposedComplexField,
    as_complex_field,
    c2r,
    cdot,
    mode_weights,
    r2c,
    to_scalar,
)

from vmad_lit.lib.transfer import (
    apply_digitized,
    apply_transfer,
    fixed_transfer,
    fourier_space_laplace,
    fourier_space_neg_gradient,
)

__all__ = [
    "apply_digitized",
    "apply_transfer",
    "as_complex_field",
    "BaseComplexField",
    "c2r",
    "cdot",
    "ComplexField",
    "fixed_transfer",
    "fourier_space_laplace",
    "fourier_space_neg_gradient",
    "mode_weights",
    "ParticleMesh",
    "r2c",
    "RealField",
    "to_scalar",
    "TransposedComplexField",
    "UntransposedComplexField",
]

from vmad_lit.lib.exchange import GhostLayout, IdentityLayout, decompose, exchange, gather

__all__ += [
    "decompose",
    "exchange",
    "gather",
    "GhostLayout",
    "IdentityLayout",
]

from vmad_lit.lib.painting import paint, readout, readout_all

__all__ += [
    "paint",
    "readout",
    "readout_all",
]

from vmad_lit.lib.force import force, readout_neg_gradient

__all__ += [
    "force",
    "readout_neg_gradient",
]

from vmad_lit.lib.lpt import (
    color_modes,
    find_wavenumbers,
    fourier_space_second_derivative,
    in_precision,
    induce_correlation,
    lpt,
    lpt1,
    lpt2src,
    second_order_source,
)

__all__ += [
    "color_modes",
    "find_wavenumbers",
    "fourier_space_second_derivative",
    "in_precision",
    "induce_correlation",
    "lpt",
    "lpt1",
    "lpt2src",
    "second_order_source",
]

from vmad_lit.lib.axpy import axpy
from vmad_lit.lib.nbody import (
    DriftFactor,
    FastPMSimulation,
    KickFactor,
    StepFactors,
    factors_of_start,
    factors_of_step,
    find_background,
    firststep,
    gravity,
    join_kicks,
    kick_drift,
    leapfrog,
    leapfrog_step,
    nbody,
    pick,
    reversible_leapfrog,
    scale,
    superpose,
)

__all__ += [
    "axpy",
    "DriftFactor",
    "factors_of_start",
    "factors_of_step",
    "FastPMSimulation",
    "find_background",
    "firststep",
    "gravity",
    "join_kicks",
    "kick_drift",
    "KickFactor",
    "leapfrog",
    "leapfrog_step",
    "nbody",
    "pick",
    "reversible_leapfrog",
    "scale",
    "StepFactors",
    "superpose",
]
