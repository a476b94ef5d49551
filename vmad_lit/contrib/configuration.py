"""Configurations of a reconstruction, in TOML: what may be said, and where a file says what it must not."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

from vmad_lit.contrib.optimize import LBFGS, BoundedLBFGS, Optimizer, Rule, TrustRegionCG, is_real
from vmad_lit.core.error import did_you_mean
from vmad_lit.lib.cosmology import LIMITS, Planck15
from vmad_lit.lib.files import try_out

KeyPath = tuple[str | int, ...]


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line of each key of a TOML document, by its path; entries of arrays of tables are numbered from 0.

    A key in an inline table, or in an array, has the line on which the statement begins. Raises
    `tomllib.TOMLDecodeError` if the document is not TOML.
    """
    tomllib.loads(text)
    found: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    statement, begin = "", 1

    for number, line in enumerate(text.split("\n"), 1):
        statement += line.removesuffix("\r") + "\n"
        try:
            said = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            table = _enter(said, counts)
            found.setdefault(table, begin)
        for path in _paths(said) if not statement.lstrip().startswith("[") else ():
            found.setdefault(table + path, begin)
        statement, begin = "", number + 1
    return found


def _enter(header: Mapping[str, Any], counts: dict[KeyPath, int]) -> KeyPath:
    """The path of the table that a header begins, in which an array of tables stands for its last entry."""
    path: KeyPath = ()
    inner: Any = header
    while inner and inner != [{}]:
        [(key, inner)] = inner.items()
        path += (key,)
        if inner == [{}]:
            counts[path] = counts.get(path, -1) + 1
            for other in [p for p in counts if p[: len(path)] == path and len(p) > len(path)]:
                del counts[other]
        if path in counts:
            path += (counts[path],)
    return path


def _paths(value: Any) -> Iterator[KeyPath]:
    """The paths of all keys in a value, those of tables before what is in them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(value, dict) or isinstance(inner, (dict, list)):
            yield (key,)
        for path in _paths(inner):
            yield (key, *path)


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of a key; of one that is not there, the line of what it would be in; 1 of an empty file."""
    for length in range(len(path), 0, -1):
        inside = [line for other, line in lines.items() if other[:length] == path[:length]]
        if inside:
            return min(inside)
    return 1


class Complaint(NamedTuple):
    """What is wrong with a configuration: the line, the key, and the sentence."""

    line: int
    key: str
    sentence: str


class ConfigurationError(ValueError):
    """Everything that is wrong with a configuration, in `complaints`, a list in the order of the lines."""

    def __init__(self, name: str, complaints: Sequence[Complaint]) -> None:
        self.name, self.complaints = name, sorted(complaints)
        super().__init__(name, self.complaints)

    def __str__(self) -> str:
        return "\n".join(f"{self.name}:{line}: {key}: {told}" for line, key, told in self.complaints)


@dataclass(frozen=True)
class Key:
    """What a configuration may say under a key: what it may be, what it means, and what it is if it is not said.

    `shown` is for keys without a default: how the template writes them. A key that is `needed` must be there. One that
    is `free` may have a prior in the place of a number.
    """

    rule: Rule
    help: str
    default: Any = None
    shown: Any = None
    needed: bool = False
    free: bool = False


def number(**bounds: float) -> Rule:
    """The rule for finite numbers within bounds: `least`, `above`, `most`, `below`."""
    words = {"least": "{:g} or more", "above": "above {:g}", "most": "at most {:g}", "below": "below {:g}"}
    told = " and ".join(words[name].format(value) for name, value in bounds.items())

    def holds(v: Any) -> bool:
        if not (is_real(v, (int, float)) and math.isfinite(v)):
            return False
        low = bounds.get("least", -math.inf) <= v and v > bounds.get("above", -math.inf)
        return low and v <= bounds.get("most", math.inf) and v < bounds.get("below", math.inf)

    return Rule(f"a number {told}".strip(), holds)


def whole(least: int) -> Rule:
    """The rule for whole numbers; a float is none."""
    return Rule(f"a whole number, {least} or more", lambda v: type(v) is int and v >= least)


def choice(*words: str) -> Rule:
    """The rule for one word of some."""
    return Rule(" or ".join(map(repr, words)), lambda v: isinstance(v, str) and v in words)


def three(rule: Rule, single: bool = True) -> Rule:
    """The rule for a list of three values that follow another one; or for a single value, too."""

    def holds(v: Any) -> bool:
        return single and rule.holds(v) or isinstance(v, list) and len(v) == 3 and all(map(rule.holds, v))

    return Rule(
        f"{rule.words}, or a list of three" if single else f"a list of three, each {rule.words}", holds
    )


TEXT = Rule("a text that is not empty", lambda v: isinstance(v, str) and v.strip() != "")
WORDS = Rule("a text, which may be empty", lambda v: isinstance(v, str))
SWITCH = Rule("true or false", lambda v: isinstance(v, bool))
COLUMNS = Rule(
    "the name of a column of three numbers, or a list of the names of three columns",
    lambda v: TEXT.holds(v) or isinstance(v, list) and len(v) == 3 and all(map(TEXT.holds, v)),
)


class Configuration:
    """What a reconstruction is to do: a namespace for each section, and lists of them for those that are repeated.

    Attributes
    ----------
    name, folder : str
        what messages call the configuration, and where its relative paths begin.
    values : dict
        what was said, as `tomllib` gives it.
    lines : dict
        the lines on which it was said, by path; see `key_lines`.
    """

    mesh: SimpleNamespace
    data: SimpleNamespace
    mask: SimpleNamespace
    noise: SimpleNamespace
    model: SimpleNamespace
    bias: SimpleNamespace
    cosmology: SimpleNamespace
    solver: SimpleNamespace
    sampler: SimpleNamespace
    output: SimpleNamespace
    run: SimpleNamespace
    validation: SimpleNamespace
    epochs: list[SimpleNamespace]

    def __init__(
        self,
        values: Mapping[str, Any],
        lines: Mapping[KeyPath, int] | None = None,
        name: str = "configuration",
        folder: str = "",
        look: bool = False,
    ) -> None:
        self.values, self.lines, self.name, self.folder = dict(values), dict(lines or {}), name, folder
        complaints = list(self._take_in())
        wrong = {complaint.key.partition(".")[0] for complaint in complaints}
        for contradictions, sections in CONTRADICTIONS:
            if not wrong.intersection(sections) and (look or contradictions not in LOOKING):
                complaints += [self._complain(path, told) for path, told in contradictions(self)]
        if complaints:
            raise ConfigurationError(name, complaints)

    @classmethod
    def from_text(cls, text: str, name: str = "configuration", folder: str = "", look: bool = False) -> Self:
        """The configuration in a TOML document.

        Raises
        ------
        ConfigurationError
            with all that is wrong; with `look` also with the files that it names.
        """
        try:
            return cls(tomllib.loads(text), key_lines(text), name, folder, look)
        except tomllib.TOMLDecodeError as error:
            where = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)", str(error))
            line = int(where[1]) if where and where[1] else text.count("\n") + 1
            told = str(error).partition(" (at ")[0]
            raise ConfigurationError(name, [Complaint(line, "TOML", told[:1].lower() + told[1:])]) from None

    @classmethod
    def load(cls, path: str) -> Self:
        """The configuration in a file, with a look at the files that it names. For one rank.

        Raises
        ------
        ConfigurationError, OSError
        """
        with open(path, "rb") as file:
            text = file.read()
        folder = os.path.dirname(path)
        try:
            return cls.from_text(text.decode("utf-8-sig"), path, folder, look=True)
        except UnicodeDecodeError as error:
            line = text[: error.start].count(b"\n") + 1
            raise ConfigurationError(path, [Complaint(line, "TOML", "this is not UTF-8 text")]) from None

    # Take in what is said
    def _take_in(self) -> Iterator[Complaint]:
        """Make the namespaces, and tell of unknown and missing keys and values that break a rule."""
        for section, said in self.values.items():
            if section not in SCHEMA:
                yield self._complain((section,), f"there is no such section{did_you_mean(section, SCHEMA)}")
        for section in SCHEMA:
            said = self.values.get(section, [] if section in REPEATED else {})
            if section in REPEATED:
                entries = said if isinstance(said, list) else [said]
                taken: list[Any] = []
                for i, entry in enumerate(entries):
                    yield from self._section((section, i), entry, taken)
                setattr(self, section, taken)
            else:
                taken = []
                yield from self._section((section,), said, taken)
                setattr(self, section, taken[0])

    def _section(self, path: KeyPath, said: Any, taken: list[Any]) -> Iterator[Complaint]:
        """Take in one section, and add its namespace to a list."""
        keys = self._keys(path)
        taken.append(SimpleNamespace(**{name: key.default for name, key in keys.items()}))
        if not isinstance(said, dict):
            header = "[[{}]]" if path[0] in REPEATED else "[{}]"
            yield self._complain(path, f"this is a section, to be begun by {header.format(path[0])}")
            return

        for name, value in said.items():
            if name not in keys:
                yield self._complain((*path, name), f"there is no such key{did_you_mean(name, keys)}")
            elif keys[name].free and isinstance(value, dict):
                yield from self._prior((*path, name), value, keys[name].rule)
                setattr(taken[-1], name, value)
            elif not keys[name].rule.holds(value):
                close = close_word(value, keys[name].rule)
                told = f"expected {keys[name].rule.words}, got {as_toml(value)}{close}"
                yield self._complain((*path, name), told)
            else:
                setattr(taken[-1], name, value)
        for name, key in keys.items():
            if key.needed and name not in said and not (path[0] in OPTIONAL and path[0] not in self.values):
                yield self._complain((*path, name), f"this key is missing; expected {key.rule.words}")

    def _prior(self, path: KeyPath, said: Mapping[str, Any], rule: Rule) -> Iterator[Complaint]:
        """What is wrong with the prior of a parameter."""
        kind = said.get("prior")
        if not isinstance(kind, str) or kind not in PRIORS:
            known = choice(*PRIORS)
            told = "is missing" if kind is None else f"is {as_toml(kind)}{close_word(kind, known)}"
            yield self._complain(path, f"the key prior {told}; expected {known.words}")
            return

        for name in ("prior", *said):
            if name not in ("prior", *PRIORS[kind]):
                told = f"a {kind} prior has no {name!r}{did_you_mean(name, PRIORS[kind])}"
                yield self._complain((*path, name), told)
        for name in PRIORS[kind]:
            inner = number(above=0) if name == "sd" else number() if kind == "lognormal" else rule
            if name not in said:
                yield self._complain((*path, name), f"this key is missing; a {kind} prior needs it")
            elif not inner.holds(said[name]):
                told = f"expected {inner.words}, got {as_toml(said[name])}"
                yield self._complain((*path, name), told)
            elif (kind, name) == ("lognormal", "mean") and not rule.holds(middle := exponential(said[name])):
                told = f"the middle of the prior is {middle:.3g}, and must be {rule.words}; the mean is that of the logarithm"
                yield self._complain((*path, name), told)
        low, high = said.get("low"), said.get("high")
        if low is not None and high is not None and is_real(low) and is_real(high) and not low < high:
            yield self._complain((*path, "high"), f"expected more than low = {low}, got {high}")

    def _keys(self, path: KeyPath) -> dict[str, Key]:
        """The keys of a section; those of solvers, samplers and epochs depend on the method."""
        section = str(path[0])
        keys = SCHEMA[section]
        if section not in DEFAULT_METHOD or section == "sampler" and section not in self.values:
            return keys
        said = self.values.get("sampler" if section == "sampler" else "solver", {})
        name = str(said.get("name")) if isinstance(said, dict) else ""
        rule = SCHEMA["sampler" if section == "sampler" else "solver"]["name"].rule
        return {**keys, **options_of(name if rule.holds(name) else DEFAULT_METHOD[section])}

    def _complain(self, path: KeyPath, sentence: str) -> Complaint:
        return Complaint(line_of(self.lines, path), ".".join(map(str, path)), sentence)

    def error(self, *found: tuple[KeyPath, str]) -> ConfigurationError:
        """The error that says what has been found to be wrong with some keys."""
        return ConfigurationError(self.name, [self._complain(path, told) for path, told in found])

    def says(self, section: str, *names: str) -> bool:
        """Whether all of these keys are in the text, with no names the section itself."""
        said = self.values.get(section)
        return said is not None and all(name in said for name in names)

    # Find files
    def path(self, name: str) -> str:
        """The path of a file that a key names, which begins where the configuration lies."""
        return os.path.join(self.folder, name)

    def output_path(self, key: str) -> str | None:
        """The path of a file that is written, or None if it is not wanted."""
        name = getattr(self.output, key)
        return os.path.normpath(os.path.join(self.path(self.output.folder), name)) if name else None

    @property
    def state_paths(self) -> list[str]:
        """Where the states of epochs and chains are kept, in the order in which they are made; nowhere, if not wanted."""
        path = self.output_path("state")
        if path is None:
            return []
        root, end = os.path.splitext(path)
        epochs = len(self.epochs)
        paths = [path] if epochs < 2 else [f"{root}-{i + 1}{end}" for i in range(epochs)]
        chains = (
            0 if self.sampler.name is None else 1 if self.sampler.name == "Laplace" else self.sampler.chains
        )
        return paths + [f"{root}-chain{i + 1}{end}" for i in range(chains)]


def exponential(x: float) -> float:
    """The exponential function, which may be infinite."""
    return math.exp(x) if x < 700 else math.inf


def as_toml(value: Any) -> str:
    """A value as it is written in TOML, cut short if it is long."""
    if isinstance(value, bool):
        told = str(value).lower()
    elif isinstance(value, dict):
        told = f"a table with the keys {', '.join(value)}"
    else:
        told = repr(value)
    return told if len(told) <= 60 else told[:56] + " ..."


def close_word(value: Any, rule: Rule) -> str:
    """A hint for a word that is nearly one of those that a rule allows."""
    words = re.findall(r"'([^']*)'", rule.words)
    close = difflib.get_close_matches(str(value), words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def write_toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(write_toml, value))}]"
    if isinstance(value, dict):
        names = (name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name) for name in value)
        return f"{{ {', '.join(f'{k} = {write_toml(v)}' for k, v in zip(names, value.values()))} }}"
    return repr(value)


SOLVERS: dict[str, type[Optimizer]] = {
    "LBFGS": LBFGS,
    "BoundedLBFGS": BoundedLBFGS,
    "TrustRegionCG": TrustRegionCG,
}
SAMPLERS = "HMC", "NUTS", "MCLMC", "MAMS"
FORMATS = {".npy": "npy", ".npz": "npz", ".hdf5": "hdf5", ".h5": "hdf5", ".fits": "fits", ".fit": "fits"}
UNITS = {"Mpc/h": 1.0, "kpc/h": 1e-3, "Gpc/h": 1e3}  # in Mpc/h
UNITS_WITHOUT_H = {"Mpc": 1.0, "kpc": 1e-3, "Gpc": 1e3}  # these times h are in Mpc/h
FORMAT = choice("auto", "npy", "npz", "hdf5", "bigfile", "fits")


def file_keys(what: str, shown: str, array: str) -> dict[str, Key]:
    """The keys that say where an array is."""
    return {
        "file": Key(TEXT, f"the file with {what}; relative to this configuration", shown=shown),
        "format": Key(FORMAT, "of that file; auto: by the end of its name", "auto"),
        "array": Key(TEXT, "the name of the array, data set, block or extension in it", shown=array),
    }


COSMOLOGY = {
    "Om0": "all matter",
    "Ob0": "baryons",
    "h": "H0 / (100 km/s/Mpc)",
    "n_s": "slope of the primordial power",
    "sigma8": "linear amplitude today",
}

BIAS_KEYS = {"none": (), "eulerian": ("b1",), "lagrangian": ("b1", "b2", "bs2", "bnabla2")}
#: The keys of priors, by their names; `mean` and `sd` of a lognormal one are those of the logarithm.
PRIORS = {
    "normal": ("mean", "sd"),
    "lognormal": ("mean", "sd"),
    "uniform": ("low", "high"),
    "truncated": ("mean", "sd", "low", "high"),
}

#: What a configuration may say: the keys by their sections.
SCHEMA: dict[str, dict[str, Key]] = {}

SCHEMA["mesh"] = {
    "cells": Key(three(whole(4)), "cells along each side", shown=64, needed=True),
    "box": Key(three(number(above=0)), "sides of the box, Mpc/h", shown=256.0, needed=True),
}

SCHEMA["data"] = {
    "kind": Key(
        choice("mock", "density", "catalogue"),
        "mock: made up from [model] with a known truth; density: on the mesh; catalogue: positions",
        shown="mock",
        needed=True,
    ),
    "seed": Key(whole(0), "of a mock: of its initial conditions, and of its noise", 42),
    **file_keys("the density or the catalogue", "halos.hdf5", "density"),
    "position": Key(COLUMNS, "of a catalogue: the column or the three columns", shown="Position"),
    "weight": Key(TEXT, "of a catalogue: the column of weights; without it each counts 1", shown="Weight"),
    "units": Key(choice(*UNITS, *UNITS_WITHOUT_H), "of positions and origin", "Mpc/h"),
    "origin": Key(three(number(), False), "of a catalogue: the corner of the box", [0.0, 0.0, 0.0]),
    "contrast": Key(SWITCH, "of a density: whether the file has delta instead of 1 + delta", False),
    "smoothing": Key(number(least=0), "compare densities smoothed with a Gaussian, Mpc/h", 0.0),
}

SCHEMA["mask"] = file_keys("the part of each cell that was observed, from 0 to 1", "mask.npy", "mask")
SCHEMA["noise"] = {
    "kind": Key(
        choice("gaussian", "poisson"),
        "of the noise; poisson: whole numbers of objects in cells",
        "gaussian",
    ),
    "sigma": Key(
        number(above=0),
        "standard deviation of 1 + delta in a cell; a catalogue's is that of its counts, if none is given",
        shown=0.5,
        free=True,
    ),
    **file_keys("a map of that standard deviation on the mesh", "sigma.npy", "sigma"),
    "spectrum": Key(TEXT, "a table of the noise's power: k in h/Mpc, S in (Mpc/h)^3", shown="noise.txt"),
    "mean": Key(number(above=0), "of a poisson mock: objects in a cell of the mean density", shown=10.0),
}

SCHEMA["model"] = {
    "evolution": Key(choice("linear", "lpt", "nbody"), "from the initial conditions to the density", "nbody"),
    "steps": Key(whole(1), "of nbody: how many", 4),
    "start": Key(number(above=0, below=1), "of nbody: the scale factor at which they begin", 0.1),
    "scale_factor": Key(number(above=0, most=2), "at which the universe is observed", 1.0),
    "transfer": Key(choice("EisensteinHu", "NoWiggle"), "the shape of the linear power", "EisensteinHu"),
    "redshift_space": Key(SWITCH, "whether positions along the line of sight are redshifts", False),
    "line_of_sight": Key(three(number(), False), "its direction", [0.0, 0.0, 1.0]),
}

SCHEMA["bias"] = {
    "kind": Key(choice("none", "eulerian", "lagrangian"), "what the observed density is of", "none"),
    "b1": Key(
        number(),
        "linear bias; lagrangian: that of Lagrangian space, Eulerian less 1",
        shown=1.0,
        free=True,
    ),
    "b2": Key(number(), "of lagrangian: of the squared density", 0.0, free=True),
    "bs2": Key(number(), "of lagrangian: of the squared tidal field", 0.0, free=True),
    "bnabla2": Key(number(), "of lagrangian: of the Laplacian, (Mpc/h)^2", 0.0, free=True),
}
SCHEMA["cosmology"] = {
    name: Key(
        number(**LIMITS[name]),
        f"{words}; by default that of Planck 2015",
        getattr(Planck15, name),
        free=True,
    )
    for name, words in COSMOLOGY.items()
}

BOUNDS = Rule(
    "a table of numbers by the names of free parameters",
    lambda v: isinstance(v, dict) and v != {} and all(map(number().holds, v.values())),
)
SCHEMA["solver"] = {
    "name": Key(choice(*SOLVERS), "the method", "LBFGS"),
    "save_every": Key(whole(1), "iterations after which the state is saved", 10),
    "keep_best": Key(SWITCH, "end with the best point: by the [validation], or else by the objective", False),
    "lower": Key(BOUNDS, "of BoundedLBFGS: the least that free parameters may be", shown={"b1": 1.0}),
    "upper": Key(BOUNDS, "of BoundedLBFGS: the most", shown={"b1": 3.0}),
}
SCHEMA["epochs"] = {
    "smoothing": Key(number(least=0), "as in [data], in this epoch; by default that", shown=8.0),
}

SCHEMA["validation"] = {
    "kind": Key(
        choice("cells", "noise"),
        "what is watched and not fitted; cells: a share of them; noise: a mock once more, with other noise",
        shown="cells",
        needed=True,
    ),
    "share": Key(number(above=0, below=1), "of cells: which share of them is held out", 0.1),
    "seed": Key(whole(0), "of the choice of cells, or of the noise", 1),
    "every": Key(whole(1), "iterations from one look to the next", 1),
    "patience": Key(
        whole(1), "looks without a better one after which an epoch ends; by default none does", shown=10
    ),
}
#: Sections without which something is left out, so that what is needed in them is needed only if they are there.
OPTIONAL = "sampler", "validation"

SCHEMA["sampler"] = {
    "name": Key(
        choice(*SAMPLERS, "Laplace"),
        "draw from the posterior, too, by this method",
        shown="NUTS",
        needed=True,
    ),
    "chains": Key(whole(1), "how many, one after the other; of Laplace: one", 2),
    "seed": Key(whole(0), "of the first chain; the others have the next ones", 0),
    "start": Key(
        choice("map", "prior"), "of chains: the most probable point, or a draw from the prior", "map"
    ),
    "save_every": Key(whole(1), "iterations after which the chain is saved", 50),
}

SCHEMA["output"] = {
    "folder": Key(TEXT, "where everything goes; relative to this configuration", "reconstruction"),
    "title": Key(TEXT, "of the report", "Initial conditions"),
    "report": Key(WORDS, "the report, a web page in one file; empty: none", "report.html"),
    "fields": Key(WORDS, "the fields, an HDF5 file; empty: none", "fields.hdf5"),
    "precision": Key(choice("f4", "f8"), "of the fields", "f4"),
    "chains": Key(WORDS, "the draws of a sampler, an HDF5 file; empty: none", "chains.hdf5"),
    "state": Key(WORDS, "the state to go on from; empty: none", "state.npz"),
    "errors": Key(SWITCH, "errors of free parameters without a sampler, by Laplace's approximation", True),
}

SCHEMA["run"] = {
    "grace": Key(number(above=0), "seconds to save and to report in, after a signal to end", 20.0),
    "memory_check": Key(SWITCH, "refuse what does not fit into memory", True),
}


def method_of(name: str) -> Any:
    """The class of a solver or a sampler. Samplers need MPI, which a look at the help of a program does not."""
    if name in SOLVERS:
        return SOLVERS[name]
    from vmad_lit.contrib import sample

    return getattr(sample, name)


def options_of(name: str) -> dict[str, Key]:
    """The options of a solver or a sampler that a text can say, with its own rules."""
    if name == "Laplace":
        return {
            option: Key(Rule(f"a whole number, {least} or more; {words}", whole(least).holds), words, default)
            for option, (least, words, default) in LAPLACE.items()
        }
    method = method_of(name)
    rules = {n: rule for kind in reversed(method.__mro__) for n, rule in vars(kind).get("rules", {}).items()}
    return {
        option: Key(rules[option], rules[option].words, default)
        for option, default in method.options().items()
        if option not in ("seed", "metric", "moments", "lower", "upper")
        if default is None or isinstance(default, (bool, int, float, str))
    }


#: The options of Laplace's approximation: the least, in words, and the default.
LAPLACE = {
    "rank": (1, "how many directions of the data's curvature are kept", 50),
    "oversampling": (0, "how many more are tried", 10),
    "powers": (0, "how often they are multiplied by the curvature once more", 1),
    "draws": (1, "how many samples the report is made of", 200),
}
DEFAULT_METHOD = {"solver": "LBFGS", "epochs": "LBFGS", "sampler": "NUTS"}
METHODS = {"solver": [*SOLVERS], "sampler": [*SAMPLERS, "Laplace"]}


#: Sections that may be repeated, as [[epochs]].
REPEATED = ("epochs",)

Contradiction = tuple[KeyPath, str]


def _of_data(c: Configuration) -> Iterator[Contradiction]:
    kind = c.data.kind
    of_kinds = {
        "seed": ("mock",),
        "file": ("density", "catalogue"),
        "format": ("density", "catalogue"),
        "array": ("density",),
        "contrast": ("density",),
        "position": ("catalogue",),
        "weight": ("catalogue",),
        "units": ("catalogue",),
        "origin": ("catalogue",),
    }
    for name, kinds in of_kinds.items():
        if c.says("data", name) and kind not in kinds:
            yield ("data", name), f"this is for data of the kind {' or '.join(kinds)}, not for a {kind}"
    if kind != "mock" and not c.data.file:
        yield ("data", "file"), f"this key is missing; a {kind} is read from a file"


def _of_noise(c: Configuration) -> Iterator[Contradiction]:
    ways = [name for name in ("sigma", "file", "spectrum") if c.says("noise", name)]
    mock, poisson = c.data.kind == "mock", c.noise.kind == "poisson"
    for name in ways[1:]:
        yield ("noise", name), f"the noise is given twice, by {ways[0]} and by {name}: take one away"
    for name in ways if poisson else []:
        yield ("noise", name), "the noise of counts follows from their number: take this away"
    if not (ways or poisson) and c.data.kind != "catalogue":
        yield ("noise", "sigma"), f"this key is missing; the noise of a {c.data.kind} must be given"
    if c.says("noise", "mean") and not (mock and poisson):
        yield ("noise", "mean"), "this is for a mock with the noise 'poisson'"
    if poisson and c.data.kind == "density":
        yield ("noise", "kind"), "a density has no counts: take 'gaussian', or a catalogue"
    if poisson and c.says("data", "weight"):
        yield ("data", "weight"), "objects with weights are no whole numbers: take 'gaussian' noise"
    if poisson and mock and c.noise.mean is None:
        yield ("noise", "mean"), "this key is missing; a mock of counts needs their mean"


def _of_mask(c: Configuration) -> Iterator[Contradiction]:
    for section in "mask", "noise":
        names = [name for name in ("format", "array") if c.says(section, name)]
        if names and not c.says(section, "file"):
            yield (section, names[0]), "there is no file to which this could belong"
    if c.says("mask") and not c.says("mask", "file"):
        yield ("mask", "file"), "this key is missing; a mask is read from a file"
    if c.says("mask", "file") and c.says("noise", "spectrum"):
        yield (
            ("noise", "spectrum"),
            "noise with a spectrum is known on the whole mesh, and cannot have a mask",
        )


def _of_smoothing(c: Configuration) -> Iterator[Contradiction]:
    side = min(c.mesh.box) if isinstance(c.mesh.box, list) else c.mesh.box
    scales = {("data",): c.data.smoothing} | {
        ("epochs", i): epoch.smoothing for i, epoch in enumerate(c.epochs)
    }
    for path, scale in scales.items():
        if scale and not scale < side:
            yield (*path, "smoothing"), f"expected less than a side of the box, {side}, got {scale}"
    why = "counts are" if c.noise.kind == "poisson" else "a density with a noise spectrum is"
    if c.noise.kind == "poisson" or c.noise.spectrum:
        if c.data.smoothing:
            yield ("data", "smoothing"), f"{why} not compared smoothed"
        for i, epoch in enumerate(c.epochs):
            if epoch.smoothing:
                yield ("epochs", i, "smoothing"), f"{why} not compared smoothed"


def _of_model(c: Configuration) -> Iterator[Contradiction]:
    m = c.model
    for name in "steps", "start":
        if c.says("model", name) and m.evolution != "nbody":
            yield ("model", name), f"this is for the evolution nbody, not for {m.evolution}"
    if m.evolution == "nbody" and not m.start < m.scale_factor:
        yield ("model", "scale_factor"), f"expected more than start = {m.start}, got {m.scale_factor}"
    if c.says("model", "scale_factor") and m.evolution == "linear":
        yield ("model", "scale_factor"), "linear evolution is that to today: take lpt or nbody"
    if c.says("model", "line_of_sight") and not m.redshift_space:
        yield ("model", "line_of_sight"), "without redshift_space = true there is none"
    if not any(m.line_of_sight):
        yield ("model", "line_of_sight"), "expected a direction, got three zeros"


def _of_bias(c: Configuration) -> Iterator[Contradiction]:
    kind = c.bias.kind
    terms = BIAS_KEYS[kind]
    for name in BIAS_KEYS["lagrangian"]:
        if c.says("bias", name) and name not in terms:
            yield ("bias", name), f"a bias of kind {kind!r} has {' and '.join(terms) or 'no parameters'}"
    if kind != "none" and c.bias.b1 is None:
        yield ("bias", "b1"), f"this key is missing; a bias of kind {kind!r} needs it"
    if kind == "lagrangian" and c.model.evolution == "linear":
        yield ("bias", "kind"), "a Lagrangian bias is carried by particles: take lpt or nbody, or 'eulerian'"


def _of_sampler(c: Configuration) -> Iterator[Contradiction]:
    if not c.says("sampler"):
        return
    last = c.epochs[-1].smoothing if c.epochs else None
    if c.data.smoothing and last is None:
        yield (
            ("data", "smoothing"),
            "smoothed densities have no posterior to draw from: take 0, or epochs that end with 0",
        )
    elif last or last is None and c.data.smoothing:
        yield (
            ("epochs", len(c.epochs) - 1, "smoothing"),
            "the last epoch must have no smoothing, to draw from its posterior",
        )
    if c.sampler.name == "Laplace":
        for name in "chains", "start":
            if c.says("sampler", name):
                yield ("sampler", name), "Laplace's approximation has no chains"


def free_of(c: Configuration) -> dict[str, Any]:
    """The tables of the priors of free parameters, by name."""
    spaces = {**vars(c.cosmology), **vars(c.bias), "sigma": c.noise.sigma}
    return {name: value for name, value in spaces.items() if isinstance(value, dict)}


def bounds_of(c: Configuration) -> dict[str, dict[str, float]]:
    """The bounds of parameters by name, for the sides `lower` and `upper`; a side of which nothing is said is empty."""
    return {side: getattr(c.solver, side) or {} for side in ("lower", "upper")}


def _of_bounds(c: Configuration) -> Iterator[Contradiction]:
    free, given, bounded = free_of(c), bounds_of(c), c.solver.name == "BoundedLBFGS"
    for side in given:
        if c.says("solver", side) and not bounded:
            yield ("solver", side), f"this is for the solver BoundedLBFGS, not for {c.solver.name}"
    if bounded and not any(given.values()):
        yield ("solver", "name"), "there are no bounds: say lower or upper, or take LBFGS"
    if bounded and c.says("sampler"):
        yield (
            ("solver", "name"),
            "draws know no bounds: take a prior of the kind uniform or truncated instead",
        )
    for side, name in [(side, name) for side, bounds in given.items() for name in bounds]:
        if name not in free:
            hint = did_you_mean(name, free) if free else ": all have numbers, and none a prior"
            yield ("solver", side, name), f"there is no free parameter of this name{hint}"
        else:
            yield from _of_bound(("solver", side, name), free[name], given[side][name])
    for name in given["lower"].keys() & given["upper"].keys():
        if not given["lower"][name] < given["upper"][name]:
            told = f"expected more than lower, {given['lower'][name]}, got {given['upper'][name]}"
            yield ("solver", "upper", name), told


def _of_bound(path: KeyPath, prior: Mapping[str, Any], bound: float) -> Iterator[Contradiction]:
    """Whether the prior of a parameter allows values on both sides of a bound."""
    low = 0.0 if prior["prior"] == "lognormal" else prior.get("low", -math.inf)
    high = prior.get("high", math.inf)
    if not low < bound < high:
        yield path, f"the prior allows only values between {low} and {high}, got {bound}"


def _of_validation(c: Configuration) -> Iterator[Contradiction]:
    if not c.says("validation"):
        return
    kind = c.validation.kind
    if kind == "noise" and c.data.kind != "mock":
        yield ("validation", "kind"), "there is no second observation but of a mock: take 'cells'"
    if kind == "noise" and c.says("validation", "share"):
        yield ("validation", "share"), "this is for the kind 'cells': other noise is on all of them"
    if kind == "cells" and c.says("noise", "spectrum"):
        yield (
            ("validation", "kind"),
            "noise with a spectrum is known on the whole mesh: no cells can be held out",
        )


def _of_cosmology(c: Configuration) -> Iterator[Contradiction]:
    if isinstance(c.cosmology.Ob0, dict) or isinstance(c.cosmology.Om0, dict):
        return
    if c.cosmology.Ob0 >= c.cosmology.Om0:
        yield (
            ("cosmology", "Ob0"),
            f"baryons are a part of matter: expected less than Om0 = {c.cosmology.Om0}",
        )


def _of_formats(c: Configuration) -> Iterator[Contradiction]:
    for section in "data", "mask", "noise":
        space = getattr(c, section)
        if space.file and space.format == "auto" and file_format(space.file) is None:
            known = ", ".join(FORMATS)
            yield (section, "file"), f"what is it? Names that end with {known} tell; else say the format"


def _of_outputs(c: Configuration) -> Iterator[Contradiction]:
    places = {key: path for key in OUTPUTS if (path := c.output_path(key))}
    for key in filter(lambda key: c.says("output", key), places):
        others = [other for other in places if places[other] == places[key] and other != key]
        if others:
            yield ("output", key), f"{getattr(c.output, key)!r} is the name of {' and '.join(others)}, too"
    for key in places:
        inside = [other for other in places if _lies_in(places[other], places[key])]
        if inside:
            told = f"{getattr(c.output, key)!r} cannot be a file: it is the folder of {' and '.join(inside)}"
            yield ("output", key), told
    for key, path in places.items():
        for said, source in _sources(c).items():
            if os.path.realpath(path) == os.path.realpath(source):
                yield ("output", key), f"this would be written over {said}, {source}"


def _lies_in(path: str, folder: str) -> bool:
    """Whether a path leads through a folder."""
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return path != folder and os.path.commonpath([path, folder]) == folder


def _sources(c: Configuration) -> dict[str, str]:
    """The files that are read, by what they are called in a sentence."""
    keys = [(section, "file") for section in ("data", "mask", "noise")] + [("noise", "spectrum")]
    said = {f"{s}.{key}": getattr(getattr(c, s), key) for s, key in keys}
    return {"this configuration": c.name} | {key: c.path(name) for key, name in said.items() if name}


OUTPUTS = ("report", "fields", "chains", "state")


def file_format(name: str, said: str = "auto") -> str | None:
    """The format of a file: what is said, or what the end of its name tells, or None."""
    ends = [end for end in FORMATS if name.lower().removesuffix(".gz").endswith(end)]
    return said if said != "auto" else FORMATS[ends[0]] if ends else None


def _of_data_file(c: Configuration) -> Iterator[Contradiction]:
    yield from _look_for(c, "data", "file")


def _of_mask_file(c: Configuration) -> Iterator[Contradiction]:
    yield from _look_for(c, "mask", "file")


def _of_noise_files(c: Configuration) -> Iterator[Contradiction]:
    yield from _look_for(c, "noise", "file")
    yield from _look_for(c, "noise", "spectrum")


def _look_for(c: Configuration, section: str, key: str) -> Iterator[Contradiction]:
    name = getattr(getattr(c, section), key)
    if name and not os.path.exists(c.path(name)):
        yield (section, key), f"there is no file {c.path(name)}{_near(c.path(name))}"
    elif name and not os.access(c.path(name), os.R_OK):
        yield (section, key), f"the file {c.path(name)} cannot be read"


def _of_files_written(c: Configuration) -> Iterator[Contradiction]:
    common = os.path.abspath(c.path(c.output.folder))
    paths = {key: path for key in OUTPUTS if (path := c.output_path(key))}
    folders = {"folder": common} | {
        key: os.path.dirname(os.path.abspath(path)) for key, path in paths.items()
    }
    for key, folder in folders.items():
        nearest = folder
        while not os.path.lexists(nearest):
            nearest = os.path.dirname(nearest)
        if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK):
            if key == "folder" or folder != common:
                yield ("output", key), f"cannot make {folder}: {nearest} is no folder that can be written to"
        elif nearest == folder and key in paths:
            try:
                try_out(paths[key])
            except OSError as error:
                yield ("output", key), f"cannot write to {paths[key]}: {error.strerror}"


def _near(path: str) -> str:
    """A hint at a file of a similar name."""
    folder, name = os.path.split(path)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
    except OSError:
        return f", nor a folder {folder}"
    return f"; did you mean {close[0]!r}?" if close else ""


LOOKING = _of_data_file, _of_mask_file, _of_noise_files, _of_files_written
#: What does not go together, by the sections that must be right, one key by one, for the question to make sense.
CONTRADICTIONS: list[tuple[Callable[[Configuration], Iterator[Contradiction]], tuple[str, ...]]] = [
    (_of_data, ("data",)),
    (_of_noise, ("data", "noise")),
    (_of_mask, ("noise", "mask")),
    (_of_smoothing, ("mesh", "noise", "data", "epochs")),
    (_of_model, ("model",)),
    (_of_bias, ("model", "bias")),
    (_of_cosmology, ("cosmology",)),
    (_of_sampler, ("data", "epochs", "sampler")),
    (_of_bounds, ("solver", "cosmology", "bias", "noise")),
    (_of_validation, ("validation", "data", "noise")),
    (_of_formats, ("data", "noise", "mask")),
    (_of_outputs, ("output", "data", "mask", "noise")),
    (_of_data_file, ("data",)),
    (_of_mask_file, ("mask",)),
    (_of_noise_files, ("noise",)),
    (_of_files_written, ("output",)),
]


def template() -> str:
    """A configuration with all keys: those that may be left out are comments, with their defaults."""
    text = [
        "# A reconstruction: python -m vmad_lit.reconstruct THIS.toml",
        "# Keys that are comments may be left out; what they say here is what is meant then, or an example.",
    ]
    for section, keys in SCHEMA.items():
        begun = section in ("mesh", "data", "noise")
        header = f"[[{section}]]" if section in REPEATED else f"[{section}]"
        text += ["", header if begun else f"# {header}"]
        for name, key in [*keys.items(), *_merged_options(METHODS.get(section, []))]:
            value = key.shown if key.default is None else key.default
            if value is None or value == math.inf:
                continue
            said = f"{name} = {write_toml(value)}"
            mark = "" if key.needed and begun or (section, name) == ("noise", "sigma") else "# "
            text.append(f"{mark}{said:{34 - len(mark)}}  # {key.help}")
    return "\n".join(text) + "\n"


def _merged_options(names: Sequence[str]) -> list[tuple[str, Key]]:
    """The options of several methods; what some have in common is there once."""
    found: dict[tuple[str, Any, str], list[str]] = {}
    for method in names:
        for option, key in options_of(method).items():
            found.setdefault((option, key.default, key.rule.words), []).append(method)
    return [
        (option, Key(WORDS, f"of {', '.join(methods)}: {words}", default))
        for (option, default, words), methods in found.items()
    ]
