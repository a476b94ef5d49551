"""Tables of trials, and files of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import table

from . import OUTCOMES
from .trials import ERRS, KINDS

#: Where the results are that the book shows.
FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"

Row = dict[str, Any]


def count(done: list[Row]) -> list[Row]:
    """For each kind and number of ranks, how many trials had which outcome."""
    cases = Counter((trial["kind"], trial["ranks"], trial["outcome"]) for trial in done)
    order = [*KINDS, ERRS]
    found = sorted({case[:2] for case in cases}, key=lambda case: (order.index(case[0]), case[1]))
    rows = []
    for kind, ranks in found:
        numbers = {outcome: cases[kind, ranks, outcome] for outcome in OUTCOMES}
        rows.append(dict(kind=kind, ranks=ranks, trials=sum(numbers.values()), **numbers))
    return rows


def save(path: Path, run: dict[str, Any]) -> None:
    """Put a run into a file of results, in the place of an earlier one with the same MPI library."""
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [other for other in known if other["mpi"] != run["mpi"]] + [run]
    path.with_suffix(".part").write_text(json.dumps(dict(runs=runs), indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def load(name: str) -> list[dict[str, Any]]:
    """The runs, one with each MPI library, of a file of the book."""
    runs: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text())["runs"]
    return runs


def show(rows: list[Row], ranks: bool = True) -> None:
    """Print a table of trials, with a line for each number of `ranks` or without."""
    numbers = ("trials", *OUTCOMES)
    lines: dict[tuple[Any, ...], Counter[str]] = {}
    for row in rows:
        key = (row["kind"], row["ranks"]) if ranks else (row["kind"],)
        lines.setdefault(key, Counter()).update({name: row[name] for name in numbers})
    lines[("all", "") if ranks else ("all",)] = sum(lines.values(), Counter())
    header = ["what happens", "ranks"] if ranks else ["what happens"]
    table([*header, *numbers], [[*key, *(line[name] for name in numbers)] for key, line in lines.items()])
