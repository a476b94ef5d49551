"""Configurations, data files, and the program from a configuration to a report, on any number of ranks."""

import contextlib
import html.parser
import io
import os
import re
import signal
import time
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pmesh")

from mpi4py import MPI  # noqa: E402

from helpers import examples  # noqa: E402
from vmad_lit import reconstruct  # noqa: E402
from vmad_lit.contrib import chains, configuration, datafiles, report, survey  # noqa: E402
from vmad_lit.contrib.configuration import SCHEMA, Configuration, ConfigurationError, Rule  # noqa: E402
from vmad_lit.contrib.configuration import key_lines, options_of, template, write_toml  # noqa: E402
from vmad_lit.contrib.optimize import autosave  # noqa: E402
from vmad_lit.contrib.results import configuration_text  # noqa: E402
from vmad_lit.lib.fastpm import ParticleMesh  # noqa: E402
from vmad_lit.lib.mpi import on_root  # noqa: E402
from vmad_lit.lib.signals import current_interrupt  # noqa: E402

COMM = MPI.COMM_WORLD

GOOD = """\
[mesh]
cells = 8
box = 32.0

[data]
kind = "mock"
seed = 7

[noise]
sigma = 0.4

[model]
evolution = "lpt"

[bias]
kind = "eulerian"
b1 = 1.5

[cosmology]
Om0 = 0.3

[solver]
name = "LBFGS"
maxiter = 6

[output]
folder = "out"
title = "A test"

[run]
grace = 60.0
"""


SILENT = GOOD.replace('title = "A test"', 'report = ""\nfields = ""').replace('"lpt"', '"linear"')

# -- Lines --------------------------------------------------------------------------------------------------------

WORDS = st.text("abcdefgh_", min_size=1, max_size=6)
KEYS = WORDS | st.text("ab =.[]#'é", min_size=1, max_size=5)
NUMBERS = (
    st.integers(-9, 9)
    | st.booleans()
    | st.sampled_from(["x", "a = 1", "[t]", "# no", "line\nline = 2\n[u]\n"])
)
VALUES = st.recursive(
    NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
SPACE = st.sampled_from(["", "\n", "# [no] = 1\n", "  \n\n"])


def quoted(key):
    return (
        key if re.fullmatch("[A-Za-z0-9_-]+", key) else "'" + key + "'" if "'" not in key else '"' + key + '"'
    )


def said(draw, value):
    """A value in TOML, on one line or on several."""
    if isinstance(value, str) and "\n" in value:
        return f'"""\n{value}"""' if draw(st.booleans()) else "'''" + value + "'''"
    if isinstance(value, list):
        gap = draw(st.sampled_from(["", "\n  ", " # ]\n"]))
        return f"[{gap}{f',{gap}'.join(said(draw, inner) for inner in value)}{gap}]"
    if isinstance(value, dict):
        one_line = [f"{quoted(k)} = {write_toml(v)}" for k, v in value.items() if "\n" not in str(v)]
        return "{" + ", ".join(one_line) + "}"
    return write_toml(value)


@st.composite
def documents(draw):
    """A document, and the lines of its keys."""
    lines, expected = "", {}

    def put(text, *paths):
        nonlocal lines
        lines += draw(SPACE)
        for path in paths:
            expected.setdefault(path, lines.count("\n") + 1)
        lines += text + draw(st.sampled_from(["\n", "  # [c]\n"]))

    def table(path, known):
        for key in draw(st.lists(KEYS.filter(lambda k: k not in known), max_size=3, unique=True)):
            known.add(key)
            if draw(st.integers(0, 3)) == 0:
                inner = draw(WORDS)
                put(f"{quoted(key)}.{inner} = 1", (*path, key), (*path, key, inner))
            else:
                text = said(draw, draw(VALUES))
                found = tomllib.loads(f"x = {text}")
                put(
                    f"{quoted(key)} = {text}",
                    *[(*path, key, *rest[1:]) for rest in configuration._paths(found)],
                )

    table((), names := set())
    for name in draw(st.lists(WORDS, max_size=3, unique=True)):
        if name in names:
            continue
        if draw(st.booleans()):
            for i in range(draw(st.integers(1, 3))):
                put(f"[[{name}]]", (name, i))
                table((name, i), inside := set())
                if draw(st.booleans()) and "sub" not in inside:
                    put(f"[{name}.sub]", (name, i, "sub"))
                    table((name, i, "sub"), set())
        else:
            put(f"[ {name} ]", (name,))
            table((name,), set())
    return lines, expected


@given(documents())
@settings(max_examples=examples(40))
def test_every_key_has_its_line(document):
    text, expected = document
    assert key_lines(text) == expected, text
    assert key_lines(text.replace("\n", "\r\n")) == expected


# -- Wrong configurations -----------------------------------------------------------------------------------------


def complaints(text, **options):
    """What is wrong, by key: the line and the sentence."""
    with pytest.raises(ConfigurationError) as caught:
        Configuration.from_text(text, **options)
    return {key: (line, told) for line, key, told in caught.value.complaints}


def lines_of(text):
    """The keys of a configuration of ours, with their lines."""
    found, section = {}, ""
    for number, line in enumerate(text.split("\n"), 1):
        if line[:1] == "[":
            section = line.strip("[]")
        elif "=" in line:
            found[section, line.split(" =")[0]] = number
    return found


def changed(text, number, line):
    rows = text.split("\n")
    return "\n".join([*rows[: number - 1], line, *rows[number:]])


GOOD_KEYS = sorted(lines_of(GOOD).items())


@given(st.sampled_from(GOOD_KEYS), st.integers(0, 20), st.sampled_from("xyz"))
@settings(max_examples=examples(30))
def test_a_key_that_is_misspelt_is_told_with_its_line_and_what_was_meant(key, place, letter):
    (section, name), number = key
    wrong = name[: place % len(name)] + letter + name[place % len(name) :]
    value = GOOD.split("\n")[number - 1].partition(" = ")[2]
    found = complaints(changed(GOOD, number, f"{wrong} = {value}"))
    line, told = found[f"{section}.{wrong}"]
    assert line == number and "no such key" in told
    assert f"did you mean {name!r}" in told or len(name) < 3


@given(
    st.sampled_from(GOOD_KEYS),
    st.sampled_from(["-1e9", "nan", "'?'", "[]", "{}", "true", "1979-05-27", "{a = 1}"]),
)
@settings(max_examples=examples(40))
def test_a_value_that_is_wrong_is_told_with_its_line(key, value):
    (section, name), number = key
    rule = ({**SCHEMA[section], **options_of("LBFGS")} if section == "solver" else SCHEMA[section])[name]
    taken = tomllib.loads(f"x = {value}")["x"]
    if rule.rule.holds(taken):
        return
    line, told = complaints(changed(GOOD, number, f"{name} = {value}"))[f"{section}.{name}"]
    assert line == number and ("expected" in told or "the key prior is missing" in told), told


@given(st.lists(st.sampled_from(GOOD_KEYS), min_size=2, max_size=5, unique=True))
@settings(max_examples=examples(20))
def test_everything_that_is_wrong_is_told_at_once(keys):
    text = GOOD
    for (_, name), number in keys:
        text = changed(text, number, f"{name} = [[]]")
    found = complaints(text)
    for (section, name), number in keys:
        assert found[f"{section}.{name}"][0] == number


CASES = {
    "[data]\nkind = 'density'": {
        "data.file": "is missing",
        "noise.sigma": "must be given",
        "mesh.cells": "missing",
    },
    "[data]\nkind = 'mock'\nfile = 'x.npy'": {"data.file": "for data of the kind density or catalogue"},
    "[data]\nkind = 'catalogue'\nfile = 'x.txt'": {"data.file": "say the format"},
    "[noise]\nsigma = 1.0\nspectrum = 's'": {"noise.spectrum": "given twice"},
    "[noise]\nkind = 'poisson'\nsigma = 1": {"noise.sigma": "take this away"},
    "[mask]\narray = 'm'": {"mask.array": "no file", "mask.file": "missing"},
    "[model]\nevolution = 'lpt'\nsteps = 3": {"model.steps": "nbody, not for lpt"},
    "[model]\nstart = 0.9\nscale_factor = 0.5": {"model.scale_factor": "more than start"},
    "[model]\nline_of_sight = [0, 0, 1]": {"model.line_of_sight": "redshift_space"},
    "[bias]\nkind = 'eulerian'\nb2 = 1": {"bias.b1": "missing", "bias.b2": "'eulerian' has b1"},
    "[bias]\nkind = 'eulerian'\nb1 = {prior = 'normale', mean = 1, sd = 1}": {
        "bias.b1": "did you mean 'normal'"
    },
    "[bias]\nb1 = {prior = 'normal', mean = 1, dev = 1}": {"bias.b1.dev": "'sd'", "bias.b1.sd": "missing"},
    "[bias]\nb1 = {prior = 'uniform', low = 1, high = 1}": {"bias.b1.high": "more than low"},
    "[cosmology]\nOb0 = 0.4": {"cosmology.Ob0": "less than Om0"},
    "[sampler]\nwarmup = 3": {"sampler.name": "missing"},
    "[sampler]\nname = 'Laplace'\nwarmup = 3": {"sampler.warmup": "no such key"},
    "[sampler]\nname = 'NUTS'\n[[epochs]]\nsmoothing = 3": {"epochs.0.smoothing": "last epoch"},
    "[output]\nreport = 'a'\nfields = 'a'": {"output.fields": "name of report, too"},
    "[output]\nreport = 'a'\nfields = './a'\nstate = 'a'": {
        "output.report": "name of fields and state, too",
        "output.fields": "name of report and state, too",
        "output.state": "name of report and fields, too",
    },
    "[output]\nfields = '.'\nstate = 'a'\nreport = 'a/b'": {
        "output.fields": "'.' cannot be a file: it is the folder of report and chains and state",
        "output.state": "'a' cannot be a file: it is the folder of report",
    },
    "[solver]\nupper = {b1 = 2}": {"solver.upper": "for the solver BoundedLBFGS"},
    "[solver]\nname = 'BoundedLBFGS'": {"solver.name": "there are no bounds"},
    "cosmology.h = {prior = 'normal', mean = 0.7, sd = 0.1}\n[solver]\nname = 'BoundedLBFGS'\nlower.h = 0.6\n"
    "[sampler]\nname = 'HMC'": {"solver.name": "draws know no bounds"},
    "[solver]\nname = 'BoundedLBFGS'\nlower = {b1 = 1}": {
        "solver.lower.b1": "all have numbers, and none a prior"
    },
    "[solver]\nname = 'BoundedLBFGS'\nlower = {Om0 = 'x'}": {"solver.lower": "expected a table of numbers"},
    "cosmology.Om0 = {prior = 'uniform', low = 0.1, high = 0.5}\n"
    "[solver]\nname = 'BoundedLBFGS'\nlower = {Omo = 1, Om0 = 0.4}\nupper = {Om0 = 0.3}": {
        "solver.lower.Omo": "did you mean 'Om0'",
        "solver.upper.Om0": "expected more than lower, 0.4, got 0.3",
    },
    "cosmology.h = {prior = 'lognormal', mean = 0, sd = 1}\n"
    "[solver]\nname = 'BoundedLBFGS'\nlower = {h = 0}": {
        "solver.lower.h": "the prior allows only values between 0.0 and inf",
    },
    "[validation]\nshare = 0.1": {"validation.kind": "missing"},
    "[validation]\nkind = 'cell'\nshare = 1": {
        "validation.kind": "did you mean 'cells'",
        "validation.share": "below 1",
    },
    "[validation]\nkind = 'noise'\nshare = 0.2": {"validation.share": "kind 'cells'"},
    "[data]\nkind = 'density'\nfile = 'x.npy'\n[noise]\nspectrum = 's'\n"
    "[mesh]\ncells = 8\nbox = 32\n[validation]\nkind = 'noise'": {"validation.kind": "take 'cells'"},
    "[noise]\nspectrum = 's'\n[validation]\nkind = 'cells'": {"validation.kind": "no cells can be held out"},
    "[data]\nkind = 'density'\nfile = 'out/a.npy'\n[mesh]\ncells = 8\nbox = 32\n[noise]\nspectrum = 'out/../b'\n"
    "[output]\nfolder = 'out'\nfields = 'a.npy'\nstate = '../b'\nreport = '../configuration'": {
        "output.fields": "written over data.file",
        "output.state": "written over noise.spectrum",
        "output.report": "written over this configuration",
    },
    "cosmology.sigma8 = {prior = 'lognormal', mean = 800.0, sd = 1}": {
        "cosmology.sigma8.mean": "the middle of the prior is inf, and must be a number above 0 and at most 10",
    },
    "[data]\nkind = 'mock'\nsmoothing = 32\n[[epochs]]\nsmoothing = 40.0": {
        "data.smoothing": "less than a side of the box, 32, got 32",
        "epochs.0.smoothing": "got 40.0",
    },
    "[[output]]\nreport = 'a'": {"output": "this is a section"},
    "[[epochs]]\n[[epochs]]\nmaxit = 3": {"epochs.1.maxit": "'maxiter'"},
    "[mesh]\ncells = 8\nbox = 32\n[mesh]": {"TOML": "mesh"},
    "[mesh\n": {"TOML": "expected"},
}


@pytest.mark.parametrize("text", CASES)
def test_what_contradicts_itself(text):
    rest = {"[mesh]": "cells = 8\nbox = 32", "[data]": "kind = 'mock'", "[noise]": "sigma = 1"}
    whole = "\n".join([text, *(f"{header}\n{keys}" for header, keys in rest.items() if header not in text)])
    found = complaints(text if text.startswith("[data]\nkind = 'd") or "[mesh" in text else whole)
    for key, words in CASES[text].items():
        assert words in found[key][1], found
        known = [
            i for i, line in enumerate(text.split("\n"), 1) if line.split(" =")[0] == key.rpartition(".")[2]
        ]
        assert not known or found[key][0] in known, found


@pytest.mark.serial
def test_files_are_looked_for(tmp_path):
    (tmp_path / "halos.npy").write_bytes(b"")
    (tmp_path / "file").write_text("")
    text = GOOD.replace('kind = "mock"\nseed = 7', 'kind = "density"\nfile = "halo.npy"').replace(
        '"out"', '"file/x"'
    )
    found = complaints(text, folder=str(tmp_path), look=True)
    assert "did you mean 'halos.npy'" in found["data.file"][1] and "no folder" in found["output.folder"][1]
    own = GOOD.replace('title = "A test"', 'fields = "../file/x/it"')
    own = complaints(own, folder=str(tmp_path), look=True)
    assert set(own) == {"output.fields"} and "is no folder that can be" in own["output.fields"][1]
    assert sorted(os.listdir(tmp_path)) == ["file", "halos.npy"]
    os.makedirs(tmp_path / "out" / "report.html")
    assert "cannot write" in complaints(GOOD, folder=str(tmp_path), look=True)["output.report"][1]


def test_the_template_has_every_key_and_is_right():
    text = template()
    Configuration.from_text(text)
    for section, keys in SCHEMA.items():
        for name in keys:
            assert re.search(rf"^(# )?{name} = ", text[text.index(f"[{section}]") :], re.M), (section, name)
    for line in text.split("\n"):  # each that is a comment is right, too
        if match := re.match(r"# (\w+) = (.*?)\s+# of? ?(.*)", line):
            tomllib.loads(f"{match[1]} = {match[2]}")


def test_a_configuration_is_written_as_it_was_taken():
    c = Configuration.from_text(GOOD + "[[epochs]]\nsmoothing = 4.0\n[[epochs]]\n[sampler]\nname = 'HMC'\n")
    again = Configuration.from_text(configuration_text(c))
    for section in SCHEMA:
        assert getattr(again, section) == getattr(c, section), section


# -- Data files ---------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(1)
RHO = RNG.gamma(2.0, size=(8, 6, 10))
X = RNG.uniform(0, 1, size=(301, 3)) * [32.0, 24.0, 40.0]
W = RNG.uniform(0.5, 2.0, size=301)


def write_all(folder):
    """The same density and catalogue in all formats; returns the sections that name them."""
    place = lambda name: os.path.join(folder, name)  # noqa: E731
    np.save(place("rho.npy"), RHO.astype("f4"))
    np.savez_compressed(place("rho.npz"), other=W, rho=RHO)
    np.savez(place("x.npz"), Position=X, Weight=W)
    table = np.zeros(
        len(X), dtype=[("Position", ">f8", 3), ("x", "f8"), ("y", "f8"), ("z", "f8"), ("Weight", "f4")]
    )
    table["Position"], table["Weight"] = X, W
    table["x"], table["y"], table["z"] = X.T
    np.save(place("x.npy"), table)
    sections = {
        "npy": (dict(file="rho.npy"), dict(file="x.npy", position="Position", weight="Weight")),
        "npz": (dict(file="rho.npz", array="rho"), dict(file="x.npz", position="Position", weight="Weight")),
    }
    import h5py

    with h5py.File(place("all.h5"), "w") as file:
        file["mesh/rho"] = RHO
        file["halos/x"], file["halos/y"], file["halos/z"], file["halos/w"] = *(X.T * 1e3), W
    columns = dict(position=["halos/x", "halos/y", "halos/z"], weight="halos/w", units="kpc/h")
    sections["hdf5"] = dict(file="all.h5", array="mesh/rho"), dict(file="all.h5", **columns)
    with contextlib.suppress(ImportError):
        import bigfile

        with bigfile.File(place("big"), create=True) as file:
            with file.create("rho", dtype="f8", size=RHO.size, Nfile=2) as block:
                block.write(0, RHO.ravel())
                block.attrs["ndarray.shape"] = RHO.shape
            with file.create("1/Position", dtype=("f8", 3), size=len(X), Nfile=1) as block:
                block.write(0, X + 5.0)
            with file.create("1/Weight", dtype="f8", size=len(W), Nfile=1) as block:
                block.write(0, W)
        columns = dict(position="1/Position", weight="1/Weight", origin=[5.0, 5.0, 5.0])
        sections["bigfile"] = (
            dict(file="big", format="bigfile", array="rho"),
            dict(file="big", format="bigfile", **columns),
        )
    with contextlib.suppress(ImportError):
        from astropy.io import fits

        units = [fits.PrimaryHDU(), fits.ImageHDU(RHO, name="RHO"), fits.BinTableHDU(table, name="HALOS")]
        fits.HDUList(units).writeto(place("all.fits"))
        columns = dict(position=["x", "y", "HALOS/z"], weight="Weight")
        sections["fits"] = dict(file="all.fits", array="RHO"), dict(file="all.fits", **columns)
    return sections


def configured(folder, **sections):
    values = dict(
        mesh=dict(cells=[8, 6, 10], box=[32.0, 24.0, 40.0]),
        noise=dict(sigma=0.5),
        model=dict(evolution="lpt"),
    )
    return Configuration({**values, **sections}, folder=folder)


def surveyed(c):
    box = c.mesh.box if isinstance(c.mesh.box, list) else [c.mesh.box] * 3
    cells = c.mesh.cells if isinstance(c.mesh.cells, list) else [c.mesh.cells] * 3
    pm = ParticleMesh(Nmesh=cells, BoxSize=box, comm=COMM, dtype="f8", np=[COMM.size, 1])
    return survey.Survey(c, pm)


def everywhere(field):
    whole = np.zeros(tuple(map(int, field.Nmesh)))
    whole[field.slices] = field.value
    return COMM.allreduce(whole)


@pytest.mark.collective
def test_all_formats_are_read_alike_by_all_ranks(folder):
    sections = on_root(COMM, lambda: write_all(folder))
    assert {"npy", "npz", "hdf5"} <= set(sections)
    painted = ParticleMesh(
        Nmesh=[8, 6, 10], BoxSize=[32.0, 24.0, 40.0], comm=MPI.COMM_SELF, dtype="f8"
    ).paint(X, mass=W)
    for kind, (density, catalogue) in sections.items():
        d = surveyed(configured(folder, data=dict(kind="density", **density))).d
        np.testing.assert_allclose(everywhere(d), RHO / RHO.mean(), rtol=1e-6, err_msg=kind)
        found = surveyed(configured(folder, data=dict(kind="catalogue", **catalogue), noise={}))
        np.testing.assert_allclose(
            everywhere(found.d), painted.value / painted.value.mean(), atol=1e-5, err_msg=kind
        )
        assert abs(found.noise / (480 / (W.sum() ** 2 / (W**2).sum())) ** 0.5 - 1) < 1e-6


@pytest.mark.collective
@pytest.mark.parametrize("unit", [1e200, 1e-200])
def test_a_density_in_units_whose_squares_overflow(folder, unit):
    on_root(COMM, lambda: np.save(os.path.join(folder, "units.npy"), unit * RHO))
    d = surveyed(configured(folder, data=dict(kind="density", file="units.npy"))).d
    np.testing.assert_allclose(everywhere(d), RHO / RHO.mean(), rtol=1e-12)


@pytest.mark.collective
def test_a_column_that_several_tables_have_is_not_guessed(folder):
    fits = pytest.importorskip("astropy.io.fits")
    path = os.path.join(folder, "two.fits")

    def write():
        table = (
            lambda first: fits.BinTableHDU.from_columns(  # noqa: E731
                [fits.Column(name, "D", array=X[first:, i]) for i, name in enumerate("xyz")]
            )
        )
        tables = [table(0), table(100), table(200), table(300)]
        for unit, name in zip(tables, ("RANDOMS", "HALOS", "TWICE", "TWICE")):
            unit.name = name
        tables[1].columns["z"].name = "only/here"
        fits.HDUList([fits.PrimaryHDU(), *tables]).writeto(path)

    on_root(COMM, write)
    with pytest.raises(
        datafiles.BadData, match="'x' in 4 tables, say in which: RANDOMS/x, HALOS/x"
    ) as caught:
        datafiles.read_columns(path, "auto", ["x", "RANDOMS/y", "RANDOMS/z"], None, COMM)
    assert caught.value.key == "data.position" and "3/x, 4/x" in str(caught.value)
    with pytest.raises(datafiles.BadData, match="'y' in 4 tables") as caught:
        datafiles.read_columns(path, "auto", ["HALOS/x", "HALOS/y", "only/here"], "y", COMM)
    assert caught.value.key == "data.weight"
    for names, first in (["HALOS/x", "HALOS/y", "only/here"], 100), (["4/x", "4/y", "4/z"], 300):
        x, _, begin = datafiles.read_columns(path, "auto", names, None, COMM)
        np.testing.assert_array_equal(x, X[first:][begin : begin + len(x)])


BAD = {
    "shape": (
        dict(kind="density", file="x.npz", array="Weight"),
        "data.array",
        "expected the shape (8, 6, 10)",
    ),
    "name": (dict(kind="density", file="rho.npz", array="rhp"), "data.array", "did you mean 'rho'"),
    "which": (dict(kind="density", file="rho.npz"), "data.array", "several arrays"),
    "columns": (
        dict(kind="catalogue", file="x.npz", position=["Weight", "Weight", "x"]),
        "data.position",
        "no 'x'",
    ),
    "format": (dict(kind="density", file="rho.npy", format="hdf5"), "data.file", "cannot be read as hdf5"),
    "units": (
        dict(kind="catalogue", file="x.npz", position="Position", units="Gpc/h"),
        "data.position",
        "outside the box",
    ),
    "weight": (
        dict(kind="catalogue", file="w.npz", position="Position", weight="W"),
        "data.weight",
        "the first at index 3",
    ),
    "nan": (
        dict(kind="density", file="nan.npy"),
        "data.array",
        "1 values are not finite, the first at index (7, 5, 9)",
    ),
    "contrast": (dict(kind="density", file="delta.npy"), "data.contrast", "contrast = true"),
    "sign": (
        dict(kind="density", file="part.npy"),
        "data.contrast",
        "cells are below 0 by more than the noise explains",
    ),
    "both": (dict(kind="density", file="rho.npy", contrast=True), "data.contrast", "no value is below 0"),
    "empty": (dict(kind="catalogue", file="none.npy"), "data.file", "is empty"),
}


@pytest.mark.collective
def test_what_is_wrong_with_data_is_said_on_all_ranks(folder):
    def write():
        write_all(folder)
        place = lambda name: os.path.join(folder, name)  # noqa: E731
        np.savez(place("w.npz"), Position=X, W=np.where(np.arange(301) == 3, -1.0, 1.0))
        np.save(place("nan.npy"), np.where(np.arange(480).reshape(8, 6, 10) == 479, np.nan, 1.0))
        np.save(place("delta.npy"), RHO - RHO.mean())
        np.save(place("part.npy"), RHO / RHO.mean() - 0.9)  # as of a part of a box, which is dense
        np.save(place("none.npy"), np.zeros((0, 3)))

    on_root(COMM, write)
    for data, key, words in BAD.values():
        with pytest.raises(datafiles.BadData, match=re.escape(words)) as caught:
            surveyed(
                configured(folder, data=data, noise={} if data["kind"] == "catalogue" else dict(sigma=0.1))
            )
        assert caught.value.key == key


@pytest.mark.collective
def test_a_contrast_is_told_from_a_density_by_its_sign(folder):
    """What noise makes negative is let through, and what the model itself does, and what is said to be a density."""
    rng = np.random.default_rng(5)
    noisy = 7.0 * (RHO / RHO.mean() + rng.normal(scale=0.5, size=RHO.shape))
    linear = 1.0 + rng.normal(scale=1.5, size=RHO.shape)
    contrast = RHO / RHO.mean() - 0.8

    def write():
        for name, values in dict(noisy=noisy, linear=linear, contrast=contrast).items():
            np.save(os.path.join(folder, name), values)
        np.savetxt(os.path.join(folder, "noise.txt"), [[1e-3, 0.25 * 64], [10.0, 0.25 * 64]])  # 0.5 in a cell
        np.savetxt(os.path.join(folder, "less.txt"), [[1e-3, 0.01 * 64], [10.0, 0.01 * 64]])

    def read(name, noise, **more):
        model = more.pop("model", dict(evolution="lpt"))
        data = dict(kind="density", file=f"{name}.npy", **more)
        return surveyed(configured(folder, data=data, noise=noise, model=model)).d

    on_root(COMM, write)
    free = dict(prior="lognormal", mean=float(np.log(0.5)), sd=0.1)
    assert noisy.min() < 0 and linear.min() < -2
    for noise in dict(sigma=0.5), dict(sigma=free), dict(spectrum="noise.txt"):
        np.testing.assert_allclose(everywhere(read("noisy", noise)), noisy / noisy.mean())
    read("linear", dict(sigma=0.01), model=dict(evolution="linear"))
    few = dict(prior="lognormal", mean=-4.0, sd=0.1)
    for name, noise in (
        ("noisy", dict(sigma=0.01)),
        ("noisy", dict(sigma=few)),
        ("contrast", dict(sigma=0.1)),
        ("contrast", dict(spectrum="less.txt")),
        ("linear", dict(sigma=0.01)),
    ):
        with pytest.raises(datafiles.BadData, match="say contrast = true.* contrast = false") as caught:
            read(name, noise)
        assert caught.value.key == "data.contrast"
        read(name, noise, contrast=False)
    assert np.isclose(everywhere(read("contrast", dict(sigma=0.1), contrast=True)).mean(), 1.0)


@pytest.mark.collective
def test_what_is_behind_the_mask_counts_for_nothing(folder):
    """Objects, numbers that are none, and the errors there."""
    seen = np.ones((8, 6, 10))
    seen[4:], seen[3] = 0.0, 0.5
    inside = X[np.minimum(np.round(X[:, 0] / 4.0).astype(int) % 8, 7) < 4]
    outside = X[np.round(X[:, 0] / 4.0).astype(int) % 8 >= 4]
    assert 100 < len(inside) < 200 and len(inside) + len(outside) == len(X)

    def write():
        place = lambda name: os.path.join(folder, name)  # noqa: E731
        np.save(place("seen.npy"), seen)
        np.savez(place("all.npz"), x=X, w=np.where(np.arange(len(X)) % 2, 3.0, 1.0))
        np.save(place("inside.npy"), inside)
        np.save(place("outside.npy"), outside)
        np.save(place("rho.npy"), np.where(seen > 0, RHO, np.nan).astype("f4"))
        np.save(place("sigma.npy"), np.where(seen > 0, 0.5, 0.0))

    on_root(COMM, write)
    cells, mask = seen.sum(), dict(mask=dict(file="seen.npy"), noise={})
    read = lambda data, **more: surveyed(configured(folder, **{**mask, **more}, data=data))  # noqa: E731
    some, only = (
        read(dict(kind="catalogue", file="all.npz", position="x")),
        read(dict(kind="catalogue", file="inside.npy")),
    )
    assert np.isclose(some.noise, (cells / len(inside)) ** 0.5) and np.isclose(only.noise, some.noise)
    weighted = read(dict(kind="catalogue", file="all.npz", position="x", weight="w"))
    w = np.where(np.arange(len(X)) % 2, 3.0, 1.0)[np.round(X[:, 0] / 4.0).astype(int) % 8 < 4]
    assert np.isclose(weighted.noise, (cells * (w**2).sum() / w.sum() ** 2) ** 0.5)
    for noise in {}, dict(kind="poisson"):
        with pytest.raises(datafiles.BadData, match="no object is where the mask is above 0") as caught:
            read(dict(kind="catalogue", file="outside.npy"), noise=noise)
        assert caught.value.key == "data.file"
    found = read(dict(kind="density", file="rho.npy"), noise=dict(file="sigma.npy"))
    expected = np.where(seen > 0, RHO, 0) / np.average(RHO, weights=seen)
    np.testing.assert_allclose(everywhere(found.d), expected, rtol=1e-6)
    assert found.posterior().pairs()[0][1].count == (seen > 0).sum()
    with pytest.raises(datafiles.BadData, match="240 values are not finite.*a mask"):
        surveyed(configured(folder, data=dict(kind="density", file="rho.npy")))


@pytest.mark.collective
def test_masks_maps_counts_and_spectra(folder):
    """At the truth the data are as far from the prediction as the noise says, in cells that were observed."""

    def write():
        mask = np.where(np.arange(16)[:, None, None] < 12, 1.0, 0.0) * np.ones((16, 16, 16))
        mask[:6] = 0.25
        np.save(os.path.join(folder, "mask.npy"), mask)
        np.savetxt(os.path.join(folder, "noise.txt"), [[1e-3, 1000.0], [1.0, 10.0]])

    on_root(COMM, write)
    common = dict(mesh=dict(cells=16, box=64.0), data=dict(kind="mock"), model=dict(evolution="linear"))
    mask = dict(file="mask.npy")
    for noise, seen in [
        (dict(sigma=0.5), None),
        (dict(sigma=0.5), mask),
        (dict(sigma=dict(prior="lognormal", mean=0.0, sd=1.0)), mask),
        (dict(spectrum="noise.txt"), None),
        (dict(kind="poisson", mean=20.0), mask),
    ]:
        found = surveyed(
            Configuration(dict(common, noise=noise, **({"mask": seen} if seen else {})), folder=folder)
        )
        posterior = found.posterior()
        [(_, likelihood)] = posterior.pairs()
        assert likelihood.count == (16 * 16 * 12 if seen else 16**3)
        if noise.get("kind") != "poisson":
            at_truth = 2 * (
                posterior.objective(found.truth) - 0.5 * posterior.vs.dot(found.truth, found.truth)
            )
            assert abs(at_truth / likelihood.count - 1) < 5 * (2 / likelihood.count) ** 0.5, noise
        else:
            counts = everywhere(found.counts)
            assert (counts % 1 == 0).all() and counts[12:].sum() == 0
            assert abs(counts[6:12].mean() / counts[:6].mean() / 4 - 1) < 0.3
        z = posterior.draw(3)
        assert posterior.vs.norm(posterior.gradient(z)) < np.inf


# -- The report ---------------------------------------------------------------------------------------------------


def brightness(colour):
    """The relative luminance of a colour, as the Web Content Accessibility Guidelines define it."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
    ]


def test_the_ink_of_pictures_reads_on_bright_and_on_dark_paper():
    papers = re.findall(r"--paper: (#\w{6})", report.STYLE)
    assert len(papers) == 2
    for ink in (*report.COLOURS, *chains.COLOURS, report.GREY, chains.GREY):
        for paper in (*papers, "#ffffff", "#000000"):
            high, low = sorted(map(brightness, (ink, paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (ink, paper)
    assert len(set(report.COLOURS)) == 5


# -- The program --------------------------------------------------------------------------------------------------


def run(folder, text, *options):
    """The program on all ranks; returns the status, and what rank 0 has said."""
    path = os.path.join(folder, "c.toml")

    def write():
        with open(path, "w") as file:
            file.write(text)

    on_root(COMM, write)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = reconstruct.main([path, "--quiet", *options])
    return status, COMM.bcast(out.getvalue()), COMM.bcast(err.getvalue())


class Page(html.parser.HTMLParser):
    """What is in a page: the tags that are open, the pictures, the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.said, self.links, self.names = [], [], "", [], set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names.add(attrs.get("id"))
        if tag == "img":
            self.pictures.append(attrs)
        if tag == "a":
            self.links.append(attrs["href"])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


@pytest.mark.collective
def test_from_a_configuration_to_a_report(folder):
    status, out, err = run(folder, GOOD)
    assert status == 0 and "the report is" in out and not err and "warning" not in out

    def look():
        import h5py

        with open(os.path.join(folder, "out", "report.html")) as file:
            text = file.read()
        page = Page(text)
        assert not page.open and len(page.pictures) == 8
        assert all(p["src"].startswith("data:image/") and len(p["alt"]) > 20 for p in page.pictures)
        assert not re.search(r"https?://|<script|@import", re.sub(r"data:image/[^\"]*", "", text))
        assert all(link[0] == "#" and link[1:] in page.names for link in page.links)
        for words in (
            "chi-square of the data",
            "A test",
            "Om0 = 0.3",
            "prefers-color-scheme",
            "width=device-width",
        ):
            assert words in text
        with h5py.File(os.path.join(folder, "out", "fields.hdf5")) as file:
            assert set(file["fields"]) == {
                "data",
                "density",
                "clean",
                "white_noise",
                "linear",
                "true_white_noise",
                "true_linear",
            }
            assert all(f.attrs["description"] and f.shape == (8, 8, 8) for f in file["fields"].values())
            assert Configuration.from_text(file.attrs["configuration"]).bias.b1 == 1.5
            assert abs(file["fields/clean"][...].mean() - 1) < 1e-5
        assert not [name for name in os.listdir(os.path.join(folder, "out")) if name.endswith(".part")]

    on_root(COMM, look)
    again = run(folder, GOOD)
    assert again[0] == 2 and re.search(r"c\.toml:\d+: output\.state: .* --resume", again[2]), again
    status, out, _ = run(folder, GOOD, "--resume")
    assert status == 0 and "going on from iteration 6" in out


@pytest.mark.collective
def test_nothing_runs_if_anything_is_wrong(folder):
    bad = GOOD.replace("cells", "cels").replace("0.4", "'much'").replace("maxiter", "maxitre")
    status, out, err = run(folder, bad)
    assert status == 2 and out == "" and COMM.allreduce(status) == 2 * COMM.size
    told = [
        re.fullmatch(r".*c\.toml:(\d+): ([\w.]+): (.+)", line).groups() for line in err.strip().split("\n")
    ]
    assert [key for _, key, _ in told] == ["mesh.cells", "mesh.cels", "noise.sigma", "solver.maxitre"]
    assert os.listdir(folder) == ["c.toml"]
    status, out, err = run(folder, GOOD.replace("cells = 8", "cells = 100000"))
    assert status == 2 and "c.toml:2: mesh.cells" in err and "memory_check" in err
    status, _, err = run(
        folder, GOOD.replace('"mock"\nseed = 7', '"density"\nfile = "c.toml"\nformat = "npy"')
    )
    assert status == 2 and re.search(r"c\.toml:7: data\.file: .* cannot be read as npy", err), err
    assert os.listdir(folder) == ["c.toml"]


@pytest.mark.collective
def test_odd_ways_to_say_what_is_right(folder):
    """A single epoch as a table, an empty list of them, a byte order mark, outputs in folders of their own."""
    short = SILENT.replace("maxiter = 6", "maxiter = 1")
    for text in short + "[epochs]\nsmoothing = 4.0\n", "\ufeffepochs = []\n" + short:
        status, out, err = run(folder, text, "--overwrite")
        assert status == 0 and not err
    status, out, err = run(folder, short.replace('fields = ""', 'fields = "a/b/fields.h5"'), "--overwrite")
    assert status == 0 and on_root(
        COMM, lambda: os.path.exists(os.path.join(folder, "out", "a", "b", "fields.h5"))
    )
    status, out, err = run(folder, short.replace("sigma = 0.4", "sigma = 1e-300"), "--overwrite")
    assert status == 2 and re.search(r"c\.toml:9: noise: .* is the noise far too small", err), err


@pytest.mark.serial
def test_data_sets_without_a_shape(tmp_path):
    import h5py

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["empty"], file["text"] = h5py.Empty("f4"), "text"
    with datafiles.open_data(str(tmp_path / "x.h5")) as file:
        for name, words in ("empty", "expected the shape (8, 8, 8), got ()"), ("text", "real numbers"):
            with pytest.raises(datafiles.BadData, match=re.escape(words)):
                datafiles.look_at(file, "data.array", name, (8, 8, 8))


@pytest.mark.collective
def test_a_plan_writes_nothing(folder):
    status, out, err = run(folder, GOOD, "--dry-run")
    assert status == 0 and not err and os.listdir(folder) == ["c.toml"]
    for words in "plan of", "gradient", "GB / rank", "the initial conditions", "pay":
        assert words in out, out


def killed(monkeypatch, nit):
    """From now on a run gets SIGTERM in the iteration after `nit`, on its last rank."""

    def monitor_of(path, every):
        save = autosave(path, every)

        def monitor(state):
            if state.nit == nit and COMM.rank == COMM.size - 1:
                signal.raise_signal(signal.SIGTERM)  # to this thread, at once
                while not current_interrupt().signum:  # until the one that watches has heard of it
                    time.sleep(0.001)
            save(state)

        return monitor

    monkeypatch.setattr(reconstruct, "autosave", monitor_of)


@pytest.mark.collective
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(folder, monkeypatch):
    tail = "[[epochs]]\nsmoothing = 8.0\nmaxiter = 4\n[[epochs]]\n"
    text = SILENT.replace("b1 = 1.5", 'b1 = { prior = "normal", mean = 1.5, sd = 0.2 }') + tail
    status, whole, _ = run(folder, text.replace('"out"', '"whole"'))
    assert status == 0 and "epoch 2 of 2" in whole
    with monkeypatch.context() as patch:
        killed(patch, 2)
        status, _, err = run(folder, text)
        assert status == 143 and not err
    with monkeypatch.context() as patch:
        killed(patch, 5)
        status, out, _ = run(folder, text, "--resume")
        assert status == 143 and "going on from iteration 3" in out
    status, out, _ = run(folder, text, "--resume")
    assert status == 0 and "going on from iteration 6" in out and "epoch 1" not in out

    def table(text):
        return [
            line.split()[:5]
            for line in text[text.index("epoch 2") :].split("\n")
            if line.strip()[:1].isdigit()
        ]

    assert table(out) == table(whole) and len(table(whole)) == 7
    status, _, err = run(folder, text.replace("0.4", "0.5"), "--resume")
    assert status == 2 and "the state cannot be used" in err and "--accept-changes" in err
    status, _, err = run(folder, text.replace("0.4", "0.5"), "--resume", "--accept-changes")
    assert status == 0
    status, out, _ = run(folder, text, "--overwrite")
    assert status == 0 and "going on" not in out and table(out) == table(whole)


FREE = SILENT.replace("b1 = 1.5", 'b1 = { prior = "normal", mean = 1.5, sd = 0.3 }')
JUDGED = "[validation]\nkind = 'cells'\nshare = 0.25\npatience = 3\n"


def reconstructed(folder, values, **how):
    """A reconstruction from inside, with what it has said."""
    said = []
    found = reconstruct.Reconstruction(
        Configuration(values, folder=folder), COMM, lambda *words: said.append(" ".join(map(str, words)))
    )
    found.prepare()
    found.solve(**how)
    return found, "\n".join(said)


def values_of(text):
    return tomllib.loads(text)


@pytest.mark.collective
def test_parameters_stay_within_their_bounds(folder):
    free = values_of(FREE.replace("maxiter = 6", "maxiter = 30"))
    alone, _ = reconstructed(folder, free)
    b1 = alone.problem.values(alone.x)["b1"]
    top = float(b1) - 0.05
    values = {
        **free,
        "solver": dict(name="BoundedLBFGS", maxiter=30, upper=dict(b1=top), lower=dict(b1=top - 1)),
    }
    found, _ = reconstructed(folder, values)
    assert abs(found.problem.values(found.x)["b1"] - top) < 1e-12 and found.errors == {"b1": None}
    values["solver"]["upper"]["b1"] = float(b1) + 1.0
    values["solver"]["lower"]["b1"] = float(b1) - 1.0
    found, _ = reconstructed(folder, values)
    assert abs(found.problem.values(found.x)["b1"] - b1) < 0.2 and found.errors["b1"].least > 0
    values["solver"]["lower"]["b1"] = (
        float(b1) + 0.5
    )  # without the middle of the prior, where a search begins
    with pytest.raises(ConfigurationError, match="outside of the bounds; --overwrite"):
        reconstructed(folder, values, resume=True, accept=True)
    found, _ = reconstructed(folder, values)
    assert abs(found.problem.values(found.x)["b1"] - b1 - 0.5) < 1e-12


@pytest.mark.collective
def test_cells_that_are_held_out_are_watched_and_not_fitted(folder):
    values = values_of(SILENT + JUDGED)
    values["solver"]["keep_best"] = True
    values["solver"]["maxiter"] = 40
    found, said = reconstructed(folder, values)
    held, whole = everywhere(found.survey._like(found.survey.held)), 8**3
    assert 0.15 * whole < held.sum() < 0.35 * whole
    fitted, judge = found.survey.likelihood(), found.survey.likelihood(judge=True)
    assert fitted.count == whole - held.sum() and judge.count == held.sum()
    looked = found.state.history["validation"]
    best = int(np.argmin(looked))
    assert found.state.best.nit == best and f"that of iteration {best}" in said
    if found.state.status == "validation":
        assert len(looked) == best + 4
    # What they say is not known to the fit
    before = found.problem.gradient(found.x)["modes"]
    d = found.survey.d
    found.survey.d = found.survey._like(np.where(found.survey.held, 1e3, d.value))
    again = found.survey.posterior(0.0).gradient(found.x)["modes"]
    np.testing.assert_array_equal(before.value, again.value)
    # and what the judge says is half their chi-square
    found.survey.d = d
    rest = (found.problem.predict(found.x)["density"].value - d.value)[found.survey.held] / 0.4
    mine = COMM.allreduce(0.5 * float((rest**2).sum()))
    assert np.isclose(found.survey.validation().objective(found.x), mine)
    assert np.isclose(looked[best], mine)
    with pytest.raises(ConfigurationError, match="validation.share: a share of 1e-05 of 512 cells"):
        reconstructed(folder, {**values, "validation": dict(kind="cells", share=1e-5)})


@pytest.mark.collective
def test_a_mock_is_judged_with_other_noise(folder):
    text = SILENT + "[validation]\nkind = 'noise'\nevery = 2\nseed = 3\n"
    found, _ = reconstructed(folder, values_of(text))
    first = everywhere(found.survey.d) - everywhere(found.survey.clean)
    second = everywhere(found.survey.second) - everywhere(found.survey.clean)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.2 and 0.3 < second.std() < 0.5
    assert np.isfinite(found.state.history["validation"]).tolist() == [i % 2 == 0 for i in range(7)]
    counts = text.replace("sigma = 0.4", 'kind = "poisson"\nmean = 5.0')
    found, _ = reconstructed(folder, values_of(counts))
    assert (everywhere(found.survey.second) % 1 == 0).all() and found.state.history["validation"][0] < np.inf


@pytest.mark.collective
def test_bounds_and_a_validation_are_planned_reported_and_resumed(folder, monkeypatch):
    text = GOOD.replace('"lpt"', '"linear"').replace(
        "b1 = 1.5", 'b1 = { prior = "normal", mean = 1.5, sd = 0.3 }'
    )
    text = (
        text.replace('name = "LBFGS"', 'name = "BoundedLBFGS"\nkeep_best = true\nlower = { b1 = 0.5 }')
        + JUDGED
    )
    status, out, err = run(folder, text, "--dry-run")
    assert status == 0 and not err
    assert "cells, at most 6 runs of the model" in out and re.search("errors +about 150 gradients", out), out
    made, likelihood = [], survey.Survey.likelihood
    with monkeypatch.context() as patch:
        patch.setattr(
            survey.Survey, "likelihood", lambda *a, **k: made.append(k.get("judge")) or likelihood(*a, **k)
        )
        status, out, err = run(folder, text.replace('"out"', '"whole"'))
    assert status == 0 and not err and "errors of b1: " in out
    *_, warning = out.rstrip().split("\n")
    assert re.match('warning: Mind what is said of b1: .* name = "HMC" or .* in .sampler.[.]$', warning)
    assert made.count(True) == 1, "the model that judges is made once, for the solver and the report"
    with monkeypatch.context() as patch:
        killed(patch, 3)
        assert run(folder, text)[0] == 143
    status, out, err = run(folder, text, "--resume")
    assert status == 0 and "going on from iteration 4" in out
    status, _, err = run(folder, text.replace("share = 0.25", "share = 0.3"), "--resume")
    assert status == 2 and "problem.validation.share: 0.25 before, 0.3 now" in err, err

    def compare():
        import h5py

        files = [h5py.File(os.path.join(folder, which, "fields.hdf5")) for which in ("whole", "out")]
        for name in files[0]["fields"]:
            np.testing.assert_array_equal(*(file["fields"][name][...] for file in files))
        assert files[0].attrs["error of b1"] == files[1].attrs["error of b1"] > 0
        with open(os.path.join(folder, "out", "report.html")) as file:
            said = Page(file.read()).said
        for words in "not fitted", "chi-square for each of them", "best point", "to go, in errors", "Laplace":
            assert words in said, words
        assert warning.removeprefix("warning: ") in said
        assert "lower = { b1 = 0.5 }" in said and "share = 0.25" in said

    on_root(COMM, compare)


@pytest.mark.serial
def test_errors_are_those_of_the_inverse_of_the_whole_curvature(folder):
    """Against a matrix of all unknowns, inverted."""
    text = FREE.replace("cells = 8", "cells = 4").replace("maxiter = 6", "maxiter = 15")
    text = text.replace("Om0 = 0.3", 'sigma8 = { prior = "lognormal", mean = -0.2, sd = 0.1 }')
    found, _ = reconstructed(folder, values_of(text))
    problem, vs, x = found.problem, found.problem.vs, found.x
    zero = vs.zeros_like(x)
    names = sorted(name for name in problem.names if name != "modes")
    units = [{**zero, name: 1.0} for name in names]
    for i in np.ndindex(4, 4, 4):
        mode = zero["modes"] * 1.0
        mode[i] = 1.0
        units.append({**zero, "modes": mode})
    H = np.array(
        [[vs.dot(a, Hb) for a in units] for Hb in (problem.hessian_vector_product(x, b) for b in units)]
    )
    C, step = np.linalg.inv(H), -np.linalg.solve(H, [vs.dot(a, problem.gradient(x)) for a in units])
    assert names == ["b1", "sigma8"] and sorted(found.errors) == names
    for i, name in enumerate(names):
        least, most, shift = found.errors[name]
        there, here = (float(problem.values({**x, name: x[name] + d})[name]) for d in (1e-4, -1e-4))
        true = C[i, i] ** 0.5 * (there - here) / 2e-4
        assert 0.94 * true < least <= true * (1 + 1e-6) and true * (1 - 1e-6) <= most < 1.06 * true
        assert abs(shift * most / true - step[i] / C[i, i] ** 0.5) < 0.1
    off, _ = reconstructed(
        folder, {**values_of(text), "output": {**values_of(text)["output"], "errors": False}}
    )
    assert off.errors == {}
    smooth, _ = reconstructed(folder, {**values_of(text), "epochs": [dict(smoothing=8.0)]})
    assert smooth.errors == {}


SAMPLED = {
    '"lpt"': '"linear"',
    "b1 = 1.5": 'b1 = { prior = "uniform", low = 0.5, high = 3.0 }',
    "maxiter = 6": "maxiter = 2",
}


def sampled(text, **options):
    for old, new in SAMPLED.items():
        text = text.replace(old, new)
    return (
        text + "[sampler]\n" + "".join(f"{name} = {write_toml(value)}\n" for name, value in options.items())
    )


@pytest.mark.collective
def test_a_chain_that_is_killed_goes_on_as_if_it_had_not_been(folder, monkeypatch):
    text = sampled(SILENT, name="MCLMC", draws=3, warmup=2, thin=2, chains=2, save_every=3)
    status, out, err = run(folder, text.replace('"out"', '"whole"'))
    assert status == 0 and not err and "the draws are in" in out
    with monkeypatch.context() as patch:
        killed(patch, 5)
        status, out, err = run(folder, text)
        assert status == 143 and "stopped by SIGTERM" in out
    status, out, _ = run(folder, text, "--resume")
    assert status == 0 and "going on from iteration 6 in" in out

    def compare():
        one, two = (chains.read(os.path.join(folder, which, "chains.hdf5")) for which in ("whole", "out"))
        for a, b in zip(one, two, strict=True):
            for draws in "b1", "modes_power":
                np.testing.assert_array_equal(a.draws[draws], b.draws[draws])

    on_root(COMM, compare)


@pytest.mark.collective
def test_a_chain_of_one_draw_has_a_mean_and_no_deviation(folder):
    text = sampled(SILENT, name="MCLMC", draws=1, warmup=0, chains=1).replace('fields = ""', "")
    status, out, err = run(folder, text)
    assert status == 0 and not err and "the draws are in" in out

    def look():
        import h5py

        with h5py.File(os.path.join(folder, "out", "fields.hdf5")) as file:
            assert "mean_white_noise" in file["fields"] and "sd_white_noise" not in file["fields"]

    on_root(COMM, look)


@pytest.mark.collective
def test_the_report_of_a_sampler(folder):
    pytest.importorskip("arviz")
    both = dict(name="MCLMC", draws=4, warmup=2), dict(name="Laplace", rank=3, draws=8)
    for options in both if COMM.size == 1 else both[1:]:
        status, out, err = run(folder, sampled(GOOD, **options), "--overwrite")
        assert status == 0 and not err and "the draws are in" in out
        joint = options["name"] == "Laplace"  # its draws are around the most probable point
        assert ("warning: Mind what is said of b1: where all unknowns together" in out) is joint
        assert ("warning: Mind what is said of b1: the draws of MCLMC" in out) is not joint

        def look():
            import h5py

            with open(os.path.join(folder, "out", "report.html")) as file:
                page = Page(file.read())
            assert (
                "b1" in page.said and "credible regions" in page.said and "mean of the posterior" in page.said
            )
            assert ("R-hat" in page.said) is (options["name"] == "MCLMC")
            assert ("where all unknowns together are most probable" in page.said) is joint
            assert ("Draw again with a hundredth" in page.said) is not joint
            with h5py.File(os.path.join(folder, "out", "fields.hdf5")) as file:
                assert 0 < file["fields/sd_white_noise"][...].mean() <= 1.5

        on_root(COMM, look)


@pytest.mark.serial
def test_the_command_line(capsys):
    assert reconstruct.main(["--template"]) == 0
    assert capsys.readouterr().out == template()
    for wrong in [], ["a.toml", "--template"], ["a.toml", "--resume", "--overwrite"]:
        with pytest.raises(SystemExit) as ended:
            reconstruct.main(wrong)
        assert ended.value.code == 2
    assert reconstruct.main(["nowhere/at/all.toml"]) == 2
    assert "all.toml:1: file: cannot be read" in capsys.readouterr().err


def test_rules_say_what_they_hold():
    assert isinstance(configuration.number(above=0, most=2), Rule)
    for rule, good, bad in [
        (configuration.number(above=0, most=2), [1, 2, 0.5], [0, 3, True, "1", float("nan"), float("inf")]),
        (configuration.whole(4), [4], [3, 4.0, True]),
        (configuration.three(configuration.whole(4)), [4, [4, 5, 6]], [[4, 5], [4, 5, 3], []]),
    ]:
        assert all(map(rule.holds, good)) and not any(map(rule.holds, bad)), rule.words
