"""Compile the loops of a simulation, once for all: `python -m vmad_lit.warm_up`."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

from vmad_lit.core.error import needed_for

PRECISIONS = "f8", "f4"


def simulate(dtype: str) -> None:
    """A small simulation in this precision, its gradient, and a Gauss-Newton product."""
    from vmad_lit import Builder
    from vmad_lit.lib import fastpm
    from vmad_lit.lib.mesh import ParticleMesh

    with needed_for("the loops of a simulation", extra="mesh"):
        from mpi4py import MPI

    pm = ParticleMesh([16] * 3, BoxSize=16.0, comm=MPI.COMM_SELF, dtype=dtype)
    q = pm.generate_uniform_particle_grid(shift=0.5).astype(dtype)
    simulation = fastpm.FastPMSimulation([0.1, 1.0], SimpleNamespace(Om0=0.3), pm, q=q)
    # Run a simulation with its derivatives
    with Builder() as m:
        wn = m.input("wn")
        dx, p, f = simulation.run(fastpm.induce_correlation(fastpm.r2c(wn), lambda k: 1 / (1 + k**2), pm))
        x = dx + q
        rho = fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)
        m.output(rho=rho, objective=fastpm.to_scalar(rho))
    noise = pm.generate_whitenoise(seed=1, type="real")
    m.compute_with_vjp(dict(wn=noise), dict(_rho=0.0, _objective=1.0))
    m.compute_with_gnDp(["rho"], dict(wn=noise), dict(wn_=noise))


def main() -> int:
    """Compile for all precisions, each in a process; returns how many of them failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "vmad_lit.warm_up"]
    running = [subprocess.Popen([*command, dtype], env=environment) for dtype in PRECISIONS]
    return sum(process.wait() != 0 for process in running)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        simulate(sys.argv[1])
    else:
        sys.exit(main())
