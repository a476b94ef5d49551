"""python -m tools.soak --help"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import GOOD
from .results import count, save, show
from .trials import ERRS, ERRS_RANKS, ERRS_SHARE, KINDS, Trial, Whole, can_mount, erring


@dataclass
class Planned:
    """A trial that is to be made: `name` is that of its seed, from which all its dice come."""

    kind: str
    ranks: int
    name: str
    call: Callable[[Trial], str]


def plan(trials: int, seed: str, ranks: tuple[int, ...]) -> list[Planned]:
    """Trials of all kinds, in a random order; those in which a rank errs go through all programs in turn."""
    from .program import PROGRAMS

    dice, planned = random.Random(seed), []
    kinds = {kind: entry for kind, entry in KINDS.items() if kind != "full disk" or can_mount()}
    total = ERRS_SHARE + sum(share for _, _, share in kinds.values())
    for kind, (call, known, share) in kinds.items():
        sizes = [n for n in known if n in ranks]
        for i in range(round(trials * share / total) if sizes else 0):
            planned.append(Planned(kind, sizes[i % len(sizes)], f"{seed}/{kind}/{i}", call))
    sizes = [n for n in ERRS_RANKS if n in ranks]
    programs = [(name, n) for n in sizes for name in dice.sample(sorted(PROGRAMS), len(PROGRAMS))]
    for i in range(trials - len(planned) if programs else 0):
        name, n = programs[i % len(programs)]
        planned.append(Planned(ERRS, n, f"{seed}/{name}/{i}", erring(name)))
    dice.shuffle(planned)
    return planned


def perform(
    planned: Planned, folder: Path, limit: float, whole: Whole, say: Callable[[str], None]
) -> dict[str, Any]:
    """Make one trial; tells about it if it ended badly."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
        trial = Trial(planned.kind, planned.ranks, planned.name, Path(name), limit, whole)
        outcome = planned.call(trial)
    if outcome not in GOOD:
        say(
            "\n".join([f"\n== {outcome}: {planned.kind}, {planned.name}, {planned.ranks} ranks", *trial.said])
        )
    return dict(
        kind=planned.kind,
        ranks=planned.ranks,
        name=planned.name,
        outcome=outcome,
        disturbed=trial.disturbed,
        seconds=round(time.monotonic() - begun, 1),
    )


def library() -> str:
    """Name and version of the MPI library."""
    from mpi4py import MPI

    text = MPI.Get_library_version()
    words = text.replace(",", " ").replace(":", " ").split()
    version = next(word.lstrip("v") for word in words if word.lstrip("v")[:1].isdigit())
    return f"{MPI.get_vendor()[0]} {version}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak", description=sys.modules[__package__].__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--trials", type=int, default=300, help="how many (default 300)")
    add("--seed", default=str(time.time_ns() % 1_000_000), help="of all dice (default: another each time)")
    add("--only", help="those of these trials in whose names this is found, a regular expression")
    add("--ranks", type=int, nargs="+", default=[1, 2, 3], help="numbers of ranks (default 1 2 3)")
    add("--limit", type=float, default=40, help="seconds of a processor after which a job hangs (default 40)")
    add("--jobs", type=int, default=os.cpu_count(), help="trials at a time (default: as many as cores)")
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="begin no trial after so many (default: all are made)",
    )
    add("--results", type=Path, help="write the table to this file, beside those of other MPI libraries")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    planned = plan(args.trials, args.seed, tuple(args.ranks))
    if args.only:
        planned = [trial for trial in planned if re.search(args.only, trial.name)]
    print(f"{len(planned)} trials of seed {args.seed}, with {library()}", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        whole = Whole(folder, args.limit * 3)
        with ThreadPoolExecutor(args.jobs) as pool:
            say = lambda text: print(text, flush=True)  # noqa: E731

            def begin(trial: Planned) -> dict[str, Any] | None:
                over = time.monotonic() - begun > 60 * args.minutes
                return None if over else perform(trial, folder, args.limit, whole, say)

            done = []
            for result in pool.map(begin, planned):
                done += [result] if result else []
                if result and len(done) % 50 == 0:
                    say(f"{len(done)} trials after {time.monotonic() - begun:.0f} s")
    rows = count(done)
    print()
    show(rows)
    bad = [trial for trial in done if trial["outcome"] not in GOOD]
    for trial in bad:
        print(f"{trial['outcome']}: --seed {args.seed} --trials {args.trials} --only {trial['name']!r}")
    if args.results:
        save(
            args.results,
            dict(
                mpi=library(),
                python=platform.python_version(),
                seed=args.seed,
                seconds=round(time.monotonic() - begun),
                disturbed=sum(trial["disturbed"] for trial in done),
                rows=rows,
                bad=bad,
            ),
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
