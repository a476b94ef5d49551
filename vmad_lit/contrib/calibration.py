"""Simulation-based calibration: whether a sampler and a posterior agree, for parameters drawn from the prior.

Reference: S. Talts et al., arXiv:1804.06788.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from vmad_lit.contrib.chains import collect
from vmad_lit.contrib.optimize import whole
from vmad_lit.contrib.vectorspace import Vector
from vmad_lit.core.error import needed_for
from vmad_lit.core.stdlib.operators import Array


class Calibration:
    """The ranks of true values among draws from the posteriors of data that were made from them.

    If the draws are from the posteriors the ranks are uniform on 0, 1, ..., levels.

    Attributes
    ----------
    levels : int
        how many draws each truth was compared with.
    ranks : dict
        by name, arrays (simulations, ...) of whole numbers.
    """

    def __init__(self, levels: int, ranks: Mapping[str, Any] | None = None) -> None:
        whole(1).check("levels", levels)
        self.levels = levels
        self.ranks = {name: np.asarray(value) for name, value in (ranks or {}).items()}

    def __len__(self) -> int:
        return min(map(len, self.ranks.values()), default=0)

    def __repr__(self) -> str:
        return f"<Calibration of {', '.join(self.ranks) or 'nothing'} by {len(self)} simulations>"

    def add(self, truth: Mapping[str, Any], chains: Any) -> Self:
        """Add the ranks of one simulation: true values by name, among the draws of chains.

        As many draws as there are levels are taken at equal distances. Equal values are put in a random order.
        """
        draws, shuffle = collect(chains, list(truth)), np.random.default_rng(len(self))
        for name, value in truth.items():
            flat = draws[name].reshape(-1, *draws[name].shape[2:])
            if len(flat) < self.levels:
                raise ValueError(f"{self.levels} levels need as many draws, and there are {len(flat)}")
            taken = flat[np.linspace(0, len(flat) - 1, self.levels).round().astype(int)]
            below, equal = (taken < value).sum(axis=0), (taken == value).sum(axis=0)
            rank = below + shuffle.integers(equal + 1)
            known = self.ranks.get(name, np.zeros((0, *np.shape(rank)), int))
            self.ranks[name] = np.concatenate([known, rank[None]])
        return self

    def histogram(self, name: str, bins: int) -> tuple[Array, Array]:
        """How many ranks are in each of so many bins, an array (bins, ...), and how many are expected in each, (bins,)."""
        edges = np.linspace(0, self.levels + 1, bins + 1).round().astype(int)
        ranks = self.ranks[name]
        counts = [((ranks >= a) & (ranks < b)).sum(axis=0) for a, b in zip(edges[:-1], edges[1:])]
        return np.array(counts), len(self) * np.diff(edges) / (self.levels + 1)

    def pvalues(self, bins: int | None = None) -> dict[str, Array]:
        """By name, how probable it is that uniform ranks are as uneven as these, by Pearson's test.

        By default there are as many bins as leave five ranks, or more, in each.
        """
        with needed_for("tests of uniformity", extra="interop"):
            from scipy.special import gammaincc
        bins = max(2, min(self.levels + 1, len(self) // 5, 20)) if bins is None else bins
        found = {}
        for name in self.ranks:
            counts, expected = self.histogram(name, bins)
            expected = expected.reshape(-1, *[1] * (counts.ndim - 1))
            square = ((counts - expected) ** 2 / expected).sum(axis=0)
            found[name] = gammaincc((bins - 1) / 2, square / 2)
        return found

    def pvalue(self, bins: int | None = None) -> float:
        """The least of :meth:`pvalues`, times their number (Bonferroni): a small one tells against the sampler."""
        every = np.concatenate([np.ravel(p) for p in self.pvalues(bins).values()])
        return float(min(1.0, every.size * every.min()))

    def shifts(self) -> dict[str, Array]:
        """By name, how many standard errors the mean rank is above that of uniform ranks: above 0 if draws are too low."""
        error = np.sqrt(((self.levels + 1) ** 2 - 1) / (12 * len(self)))
        return {name: (ranks.mean(axis=0) - self.levels / 2) / error for name, ranks in self.ranks.items()}


def calibrate(
    posterior: Any,
    sample: Callable[[Any, int], Any],
    simulations: int,
    levels: int,
    seed: int = 0,
    keep: Callable[[Vector], Mapping[str, Any]] | None = None,
    monitor: Callable[[Calibration], object] | None = None,
    state: Calibration | None = None,
) -> Calibration:
    """Draw parameters from the prior, make data, sample their posterior, and rank the truth; many times. Collective.

    Parameters
    ----------
    posterior : Posterior
        whose data do not matter; or anything with its `simulate`, `with_data` and `summary`.
    sample :
        a function of a posterior and a seed that returns chains, such as
        ``lambda p, seed: NUTS(seed=seed).sample(p, p.zeros())``. It must not know the truth.
    simulations, levels, seed : int
        how often, the number of draws that each truth is compared with, and the seed of the first simulation.
    keep :
        what is ranked, a function of latents; the posterior's `summary` by default. The chains must have it, too.
    monitor :
        called with the calibration after each simulation; ends the work if it returns True.
    state : Calibration
        one to go on with.
    """

    whole(1).check("simulations", simulations)
    found = Calibration(levels) if state is None else state
    chosen = posterior.summary if keep is None else keep
    while len(found) < simulations:
        number = seed + len(found)
        truth, data = posterior.simulate(number)
        found.add(chosen(truth), sample(posterior.with_data(data), number))
        if monitor is not None and monitor(found) is True:
            break
    return found


def plot_ranks(
    calibration: Calibration, name: str, bins: int = 10, ax: Any = None, colour: str = "#3b82c4"
) -> Any:
    """The histogram of the ranks of one name, all of its numbers together, with where 95 % of the bars should end.

    Returns the Matplotlib axes, which may be given as `ax`.
    """

    with needed_for("plots of ranks", extra="output"):
        import matplotlib.pyplot as plt
    counts, expected = calibration.histogram(name, bins)
    many = counts.reshape(bins, -1).shape[1]
    counts, expected = counts.reshape(bins, -1).sum(axis=1), expected * many
    ax = plt.gca() if ax is None else ax
    place, share = (np.arange(bins) + 0.5) / bins, expected / expected.sum()
    spread = 1.96 * np.sqrt(expected * (1 - share))
    ax.bar(place, counts, width=0.92 / bins, color=colour, alpha=0.7)
    ax.fill_between(
        [0, 1], *(expected.mean() + s * spread.mean() for s in (-1, 1)), color="#8a8a8a", alpha=0.3, lw=0
    )
    ax.set(xlim=(0, 1), xlabel="rank of the truth", ylabel="simulations")
    return ax
