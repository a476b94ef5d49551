"""What is done with chains: files that other programs read, ArviZ's diagnostics, tables and pictures.

Every function takes a :class:`~vmad_lit.contrib.sample.Chain`, a :class:`Record`, a dictionary of arrays (draws, ...)
by name, or a list of them, of which each is one chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vmad_lit import __version__
from vmad_lit.contrib.optimize import whole
from vmad_lit.contrib.sample import Chain
from vmad_lit.core.error import did_you_mean, needed_for
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.lib.files import Path, replacing
from vmad_lit.lib.shards import on_first

Chains = Any  # a chain, a record, a dictionary of arrays, or a list of them

FORMAT = "vmad_lit chains, 1"
#: What is told of a chain besides its draws.
ABOUT = "sampler", "seed", "warmup", "thin", "nit", "gradients", "step", "seconds", "status", "message"
COLOURS = "#3b82c4", "#d0701f", "#3f9b6b", "#a05bb5"
GREY = "#8a8a8a"
GROUPS = "draws", "stats", "warmup_stats"


class Record:
    """What a chain has drawn, without what it takes to go on.

    Attributes
    ----------
    draws, stats, warmup_stats : dict
        arrays (draws, ...) by name, as a :class:`~vmad_lit.contrib.sample.Chain` has them.
    sampler, seed, warmup, thin, nit, gradients, step, seconds, status, message :
        what the chain tells of itself.
    """

    def __init__(
        self,
        draws: Mapping[str, Any],
        stats: Mapping[str, Any] | None = None,
        warmup_stats: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> None:
        self.draws = {name: np.asarray(value) for name, value in draws.items()}
        self.stats = {name: np.asarray(value) for name, value in (stats or {}).items()}
        self.warmup_stats = {name: np.asarray(value) for name, value in (warmup_stats or {}).items()}

        told: dict[str, Any] = dict(sampler="", seed=0, warmup=0, thin=1, nit=len(self), gradients=0)
        told.update(step=0.0, seconds=0.0, status="", message="")
        for name, value in about.items():
            if name not in told:
                raise TypeError(f"a record tells nothing of {name!r}{did_you_mean(name, ABOUT)}")
            told[name] = value
        vars(self).update(told)

    def __len__(self) -> int:
        return min((len(column) for column in self.draws.values()), default=0)

    def __repr__(self) -> str:
        return f"<Record of {len(self)} draws of {', '.join(self.draws)}>"


def each(chains: Chains) -> list[Any]:
    """One or several chains as a list of them; a dictionary of arrays becomes a record."""
    several = list(chains) if isinstance(chains, (list, tuple)) else [chains]
    found = [Record(chain) if isinstance(chain, Mapping) else chain for chain in several]
    for chain in found:
        if not isinstance(chain, (Chain, Record)):
            raise TypeError(f"expected a chain, a record, or arrays by name, not {type(chain).__name__}")
    if not found:
        raise ValueError("expected a chain, or a list of them, not an empty list")
    return found


def collect(chains: Chains, names: str | Iterable[str] | None = None) -> dict[str, Array]:
    """The draws of all chains, arrays (chains, draws, ...) by name, of as many draws as the shortest chain has."""
    several = each(chains)
    known = list(several[0].draws)
    if any(list(chain.draws) != known for chain in several):
        raise ValueError(f"the chains have different draws: {[list(chain.draws) for chain in several]}")
    wanted = known if names is None else [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"the chains have no draws of {name!r}{did_you_mean(name, known)}")
    number = min(len(chain) for chain in several)
    return {name: np.stack([chain.draws[name][:number] for chain in several]) for name in wanted}


def columns(chains: Chains, names: str | Iterable[str] | None = None) -> dict[str, Array]:
    """The draws number by number, arrays (chains, draws) by names such as ``P[3]``."""
    found = {}
    for name, array in collect(chains, names).items():
        for index in np.ndindex(array.shape[2:]):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            found[label] = array[(slice(None), slice(None), *index)]
    return found


# Files
def write(path: Path, chains: Chains) -> None:
    """Write chains to an HDF5 file: a group for each, with groups of its draws and of its numbers. Collective.

    The file is written beside and renamed, so that a reader finds a complete one at any time.
    """
    several = each(chains)
    comm = next((chain.vs.comm for chain in several if isinstance(chain, Chain)), None)
    on_first(comm, lambda: _write(path, several))


def _write(path: Path, several: Sequence[Any]) -> None:
    with needed_for("files of chains", extra="output"):
        import h5py
    with replacing(path) as beside, h5py.File(beside, "w") as file:
        file.attrs.update(format=FORMAT, version=__version__)
        for i, chain in enumerate(several):
            group = file.create_group(f"chain{i}")
            group.attrs.update({name: getattr(chain, name) for name in ABOUT})
            for kind in GROUPS:
                arrays = group.create_group(kind, track_order=True)
                for name, array in getattr(chain, kind).items():
                    arrays[name] = array


def read(path: Path) -> list[Record]:
    """The chains in a file that :func:`write` has written."""
    with needed_for("files of chains", extra="output"):
        import h5py
    with h5py.File(path) as file:
        if file.attrs.get("format") != FORMAT:
            raise ValueError(f"{path} holds no chains: its format is {file.attrs.get('format')!r}")
        records = []
        for i in range(len(file)):
            group = file[f"chain{i}"]
            parts = {kind: {name: value[()] for name, value in group[kind].items()} for kind in GROUPS}
            about = {
                name: getattr(group.attrs[name], "item", lambda v=group.attrs[name]: v)() for name in ABOUT
            }
            records.append(Record(**parts, **about))
    return records


def autowrite(path: Path, every: int = 100) -> Callable[[Chain], None]:
    """A monitor that writes the draws so far to an HDF5 file, at every `every`-th iteration and at the end.

    The chains of several seeds stand side by side in it.
    """
    whole(1).check("every", every)
    chains: dict[int, Chain] = {}

    def monitor(chain: Chain) -> None:
        chains[chain.seed] = chain
        if chain.nit % every == 0 or chain.status == "signal":
            write(path, list(chains.values()))

    return monitor


# ArviZ
#: ArviZ's names for what samplers tell of an iteration.
NAMES = dict(
    accept="acceptance_rate", divergent="diverging", depth="tree_depth", gradients="n_steps", step="step_size"
)


def to_arviz(chains: Chains, names: str | Iterable[str] | None = None, **options: Any) -> Any:
    """The chains as ArviZ's `InferenceData`, with the groups ``posterior`` and ``sample_stats``.

    Further options, such as ``coords`` and ``dims``, are those of ``arviz.from_dict``.
    """
    return _to_arviz(each(chains), collect(chains, names), options)


def _to_arviz(several: Sequence[Any], draws: Mapping[str, Array], options: Mapping[str, Any]) -> Any:
    with needed_for("ArviZ's InferenceData", extra="chains"):
        import arviz
    number = min(len(chain) for chain in several)
    stats = [chain.stats for chain in several]
    common = [name for name in stats[0] if all(name in found for found in stats)]
    table = {}
    for name in common:
        rows = [found[name][chain.thin - 1 :: chain.thin][:number] for found, chain in zip(stats, several)]
        if all(len(row) == number for row in rows):
            table[NAMES.get(name, name)] = np.stack(rows)
    about = dict(inference_library="vmad_lit", inference_library_version=__version__)
    return arviz.from_dict(posterior=draws, sample_stats=table or None, posterior_attrs=about, **options)


def summarise(chains: Chains, names: str | Iterable[str] | None = None, **options: Any) -> Any:
    """A table of all that was drawn, number by number: a pandas `DataFrame` by ``arviz.summary``.

    Its columns are the mean, the standard deviation and the credible interval; the Monte Carlo errors of the first two;
    the effective sample sizes of bulk and tails and R-hat, rank-normalised (Vehtari et al. 2021, arXiv:1903.08008);
    and, if the chains know it, the evaluations of the gradient for each effective sample. Further options are those of
    ``arviz.summary``.
    """
    with needed_for("tables of chains", extra="chains"):
        import arviz
    table = arviz.summary(to_arviz(chains, names), **options)
    gradients = sum(int(np.sum(chain.stats.get("gradients", 0))) for chain in each(chains))
    if gradients and "ess_bulk" in table:
        table["gradients_per_ess"] = gradients / table["ess_bulk"]
    return table


def diagnose(chains: Chains, names: str | Iterable[str] | None = None) -> dict[str, dict[str, Array]]:
    """R-hat and effective sample sizes by ArviZ, by name: ``r_hat``, ``ess_bulk`` and ``ess_tail``, arrays of the shape of a draw."""
    with needed_for("diagnostics of chains", extra="chains"):
        import arviz
    data = to_arviz(chains, names).posterior
    found = dict(r_hat=arviz.rhat(data), ess_bulk=arviz.ess(data), ess_tail=arviz.ess(data, method="tail"))
    return {
        str(name): {kind: np.asarray(values[name]) for kind, values in found.items()}
        for name in data.data_vars
    }


# Pictures
def plot_trace(
    chains: Chains,
    names: str | Iterable[str] | None = None,
    truth: Mapping[str, float] | None = None,
    **options: Any,
) -> Any:
    """What was drawn, draw after draw, and beside it the density of each chain, by ``arviz.plot_trace``.

    `truth` has numbers to be marked, by name; further options are those of that function. Returns an array of axes
    (numbers, 2).
    """

    with needed_for("plots of chains", extra="chains"):
        import arviz
        import matplotlib.pyplot as plt
    found = columns(chains, names)
    data = _to_arviz(each(chains), found, {})
    axes = options.pop("axes", None)
    if axes is None:
        size = 7.2, 1.4 * len(found) + 0.4
        _, axes = plt.subplots(len(found), 2, figsize=size, layout="constrained", squeeze=False)
    marks: list[Any] = [(name, {}, [value]) for name, value in (truth or {}).items() if name in found]
    style: dict[str, Any] = dict(lines=marks or None, compact=False, axes=axes)
    return arviz.plot_trace(data, **{**style, **options})


def plot_corner(
    chains: Chains | Mapping[str, Chains],
    names: str | Iterable[str] | None = None,
    truth: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    colours: Sequence[str] = COLOURS,
    levels: Sequence[float] = (0.68, 0.95),
    **options: Any,
) -> Any:
    """The densities of all pairs of numbers, as contours, and of each number, as a histogram, by ``corner.corner``.

    Parameters
    ----------
    chains :
        chains, or a dictionary of several by title, which are drawn on top of each other.
    names, truth, labels :
        what is shown, with numbers to be marked and labels in the place of names.
    colours, levels :
        a colour for each title; the shares of the draws that lie within the contours.

    Returns
    -------
    the Matplotlib figure; further options are those of ``corner.corner``
    """

    with needed_for("corner plots", extra="chains"):
        import corner
    titled = chains if isinstance(chains, Mapping) and not _is_draws(chains) else {"": chains}
    figure: Any = options.pop("fig", None)
    handles: list[Any] = []
    for (title, several), colour in zip(titled.items(), colours, strict=False):
        found = columns(several, names)
        data = np.stack([array.ravel() for array in found.values()], axis=1)
        told = [(labels or {}).get(name, name) for name in found]
        marks = [(truth or {}).get(name) for name in found]

        style = dict(color=colour, levels=levels, labels=told, truths=marks, truth_color=GREY, smooth=1.0)
        style.update(plot_datapoints=False, plot_density=False, no_fill_contours=True, bins=24)
        style.update(hist_kwargs=dict(density=True, color=colour))
        figure = corner.corner(data, fig=figure, **{**style, **options})
        handles += figure.axes[0].plot([], [], color=colour, label=title)
    # Name the colours
    if len(handles) > 1:
        figure.legend(handles=handles, loc="upper right", frameon=False)
    return figure


def _is_draws(value: Any) -> bool:
    """Whether a dictionary is one of draws by name, and not of chains by title."""
    return all(isinstance(item, np.ndarray) for item in value.values())


def credible(draws: Array, share: float) -> tuple[Array, Array]:
    """Between which numbers the central `share` of draws (..., n) lies, for each of n."""
    flat = np.reshape(draws, (-1, np.shape(draws)[-1]))
    low, high = np.quantile(flat, [(1 - share) / 2, (1 + share) / 2], axis=0)
    return low, high


def plot_bands(
    k: Any,
    chains: Chains,
    name: str = "P",
    truth: Any = None,
    relative: bool = False,
    shares: Sequence[float] = (0.95, 0.68),
    colour: str = COLOURS[0],
    label: str = "posterior",
    ax: Any = None,
) -> Any:
    """Band powers with their credible regions against wavenumbers `k`, and the truth if it is known.

    With `relative` all is divided by the truth. Returns the Matplotlib axes, which may be given as `ax`.
    """

    with needed_for("plots of chains", extra="output"):
        import matplotlib.pyplot as plt
    draws = collect(chains, name)[name]
    if np.shape(k) != draws.shape[2:]:
        raise ValueError(
            f"{name!r} has the shape {draws.shape[2:]} in each draw, which k must have, not {np.shape(k)}"
        )
    if relative and truth is None:
        raise ValueError("relative needs the truth to divide by")

    unit = np.asarray(truth, float) if relative else 1.0
    ax = plt.gca() if ax is None else ax
    for i, share in enumerate(shares):
        low, high = credible(draws / unit, share)
        ax.fill_between(k, low, high, color=colour, alpha=0.25 + 0.2 * i, lw=0, label=f"{label}, {share:.0%}")
    ax.plot(k, np.median(draws.reshape(-1, len(k)), axis=0) / unit, color=colour, lw=1)
    if truth is not None:
        ax.plot(k, np.asarray(truth) / unit, color=GREY, ls="--", lw=1.2, label="truth")
    if not relative:
        ax.set_yscale("log")
    return ax
