"""The package as it is installed: what it requires, what it says of what is missing, and that its papers agree."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import vmad_lit
from vmad_lit.core.error import MissingExtra, needed_for

pytestmark = pytest.mark.serial  # files, and programs of one process

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
SOURCES = sorted((ROOT / "vmad_lit").rglob("*.py"))

# Where the name of a module is not that of what one installs; and packages that come with another one.
DISTRIBUTION = {"pfft": "pmesh", "llvmlite": "numba"}
# Packages that no extra brings: mypy imports its plugin itself, and CAMB is one of several sources of a table.
ELSEWHERE = {"mypy", "camb"}
# What must work with NumPy alone, beside the engine.
BARE = "vmad_lit tiny testing demo lib.unary lib.binary lib.linalg lib.cosmology lib.memory contrib.vectorspace contrib.optimize".split()


def names(requirements):
    """The names of distributions, without versions and extras."""
    return {re.match(r"[\w.-]+", item)[0].lower() for item in requirements}


def brought_by(extra):
    """The distributions that come with an extra, through other extras too."""
    found = set()
    for item in EXTRAS[extra]:
        if item.startswith("vmad_lit["):
            for other in item[len("vmad_lit[") : -1].split(","):
                found |= brought_by(other)
        else:
            found |= names([item])
    return found


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# -- With NumPy alone ---------------------------------------------------------------------------------------

BLOCK = """
import sys

class Nothing:
    "Finds nothing beside the standard library, NumPy and our package."
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"numpy", "vmad_lit"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())

def tell(label, function):
    "Print how a call ends: 'ok', or the kind and the text of the error."
    try:
        function()
    except ImportError as error:
        print(f"{label}\\t{type(error).__name__}\\t{error}")
    else:
        print(f"{label}\\tok\\t")
"""


def with_numpy_alone(program, *arguments):
    """Run a program where nothing but NumPy is installed; what it told, by label."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", BLOCK + program, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [row.split("\t") for row in done.stdout.splitlines()]
    return {label: (kind, text) for label, kind, text in rows}


@pytest.fixture(scope="module")
def imports():
    """How the import of each module ends."""
    program = (
        "import importlib\nfor name in sys.argv[1:]:\n    tell(name, lambda: importlib.import_module(name))\n"
    )
    modules = [module_name(path) for path in SOURCES if path.name != "mypy_plugin.py"]
    return with_numpy_alone(program, *modules)


def test_the_engine_the_arrays_optimisers_and_cosmology_need_numpy_alone(imports):
    needed = {"vmad_lit" if name == "vmad_lit" else f"vmad_lit.{name}" for name in BARE}
    needed |= {name for name in imports if name.startswith("vmad_lit.core")}
    assert {name: imports[name] for name in needed if imports[name][0] != "ok"} == {}


def test_other_modules_tell_what_to_install(imports):
    others = {name: told for name, told in imports.items() if told[0] != "ok"}
    assert "vmad_lit.lib.mpi" in others
    for name, (kind, text) in others.items():
        assert kind == "MissingExtra", f"{name}: {kind}: {text}"
        assert re.search(r"pip install 'vmad_lit\[(\w+)\]'", text)[1] in EXTRAS, text


MISSING = """
import numpy as np
from vmad_lit import Builder, autooperator
from vmad_lit.contrib.optimize import LBFGS, Problem, scipy_minimize
from vmad_lit.core.checkpoint import checkpoint
from vmad_lit.core.profile import Profile, progress
from vmad_lit.lib.cosmology import LinearPower, Planck15, growth
from vmad_lit.testing import check, check_rank_invariance

problem = Problem(objective=lambda x: (x * x).sum(), gradient=lambda x: 2 * x)

@autooperator("x -> y")
def step(x):
    return x * x

with Builder() as m:
    m.output(y=step(m.input("x")))

def profiled():
    with Profile() as p:
        m.compute("y", dict(x=1.0))
    p.plot()

k = np.array([0.1, 0.2, 0.3, 0.4])
tell("optimiser", lambda: LBFGS().minimize(problem, np.ones(3)))
tell("growth", lambda: check(growth, 0.3, a=0.5))
tell("power", lambda: LinearPower(Planck15)(k))
tell("bar", lambda: LBFGS().minimize(problem, np.ones(3), progress=True))
tell("monitor", progress)
tell("picture", profiled)
tell("scipy", lambda: scipy_minimize(problem, np.ones(3)))
tell("table", lambda: LinearPower.from_table(Planck15, k, k))
tell("chain", lambda: check(checkpoint(step, n=4), 1.0))
tell("ranks", lambda: check_rank_invariance(lambda comm: 1.0))
"""


def test_what_is_missing_is_named_where_it_is_needed():
    told = with_numpy_alone(MISSING)
    fine = {label for label, (kind, _) in told.items() if kind == "ok"}
    assert fine == {"optimiser", "growth", "power"}
    found = {}
    for label in told.keys() - fine:
        kind, text = told[label]
        assert kind == "MissingExtra", text
        found[label] = re.fullmatch(
            r"(\w+) is needed for .+ and is not installed: pip install 'vmad_lit\[(\w+)\]'", text
        ).groups()
    assert found == {
        "bar": ("tqdm", "output"),
        "monitor": ("tqdm", "output"),
        "picture": ("matplotlib", "output"),
        "scipy": ("scipy", "interop"),
        "table": ("scipy", "interop"),
        "chain": ("checkpoint_schedules", "checkpoint"),
        "ranks": ("mpi4py", "mpi"),
    }


def test_the_demonstration_tells_what_it_needs():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    program = BLOCK + "from vmad_lit.demo import main\nsys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "matplotlib" in done.stderr and "vmad_lit[output]" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_what_is_missing_is_reported_as_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vmad_lit_broken.py").write_text("raise OSError('libmpi.so: cannot open')\n")
    (tmp_path / "vmad_lit_older.py").write_text("from numpy import no_such_function\n")
    with pytest.raises(OSError, match="cannot open"), needed_for("a test", extra="mpi"):
        import vmad_lit_broken  # noqa: F401
    with pytest.raises(ImportError, match="no_such_function") as caught, needed_for("a test", extra="mpi"):
        import vmad_lit_older  # noqa: F401
    assert type(caught.value) is ImportError
    with (
        pytest.raises(ModuleNotFoundError) as caught,
        needed_for("a test", extra="mpi"),
    ):  # a fault of our own
        import vmad_lit.no_such_module  # noqa: F401
    assert type(caught.value) is ModuleNotFoundError
    with pytest.raises(MissingExtra, match="for the inner one.*fast") as caught:
        with needed_for("the outer one", extra="mesh"), needed_for("the inner one", extra="fast"):
            import vmad_lit_missing.deep  # noqa: F401
    assert caught.value.name == "vmad_lit_missing"
    with (
        pytest.raises(MissingExtra, match=r"pfft-python.*README\.md, Installing"),
        needed_for("a mesh", extra="mesh"),
    ):
        import vmad_lit_missing  # noqa: F401
    assert "\n## Installing\n" in (ROOT / "README.md").read_text()


# -- Requirements -------------------------------------------------------------------------------------------


def foreign_imports(tree):
    """Imports of packages that are not ours, as (package, line, the extra that its context names or None)."""

    def walk(node, extra):
        if isinstance(node, ast.With):
            for call in (item.context_expr for item in node.items):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "needed_for":
                    extra = next(keyword.value.value for keyword in call.keywords if keyword.arg == "extra")
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [node.module]
        else:
            found = []
        for package in (name.partition(".")[0] for name in found):
            if package not in sys.stdlib_module_names | {"numpy", "vmad_lit"}:
                yield package, node.lineno, extra
        for child in ast.iter_child_nodes(node):
            yield from walk(child, extra)

    yield from walk(tree, None)


def test_every_package_that_is_imported_comes_with_the_extra_that_is_named():
    seen = set()
    for path in SOURCES:
        for package, line, extra in foreign_imports(ast.parse(path.read_text())):
            if package not in ELSEWHERE:
                place = f"{path.relative_to(ROOT)}:{line}: import of {package}"
                assert extra is not None, f"{place} in no `with needed_for(...)`"
                assert extra in EXTRAS, f"{place}: there is no extra {extra!r}"
                assert DISTRIBUTION.get(package, package) in brought_by(extra), (
                    f"{place} does not come with {extra!r}"
                )
                seen.add(DISTRIBUTION.get(package, package))
    required = brought_by("all")
    assert required - seen == {"ducc0"}, (
        "packages of extras that nobody imports; ducc0 is imported by the provider"
    )


def test_numpy_is_all_that_is_required():
    assert names(PROJECT["project"]["dependencies"]) == {"numpy"}


def test_all_is_all():
    for_use = ["mpi", "mesh", "fast", "checkpoint", "output", "data", "chains", "interop"]
    assert brought_by("all") == set().union(*map(brought_by, for_use))
    assert set(EXTRAS) - set(for_use) == {"all", "torch", "book", "test", "bench", "bench-large", "lint"}


def test_versions_of_what_is_installed_are_pinned():
    pinned = names(
        row for row in (ROOT / "constraints.txt").read_text().splitlines() if row and row[0] != "#"
    )
    wanted = set().union(*(brought_by(extra) for extra in EXTRAS if not extra.startswith("bench"))) | {
        "numpy"
    }
    normal = {name.replace("_", "-") for name in pinned}
    assert {name.replace("_", "-") for name in wanted} <= normal


def test_extras_that_are_named_exist():
    for name in "README.md", "requirements.txt", "Makefile", "CONTRIBUTING.md", "CHANGELOG.md":
        for group in re.findall(r"pip install[^\n`]*?\[([\w,-]+)\]", (ROOT / name).read_text()):
            assert set(group.split(",")) <= set(EXTRAS), f"{name}: [{group}]"
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert rows == ["mpi", "mesh", "fast", "checkpoint", "output", "interop", "all", "torch"]


# -- One version, one licence -------------------------------------------------------------------------------


def version_of(folder):
    """The version that setuptools gives a project, which it reads without importing anything."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    module, _, attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    tree = ast.parse((folder / module / "__init__.py").read_text())
    [value] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == attribute
    ]
    return ast.literal_eval(value)


def test_the_version_stands_in_one_place():
    assert version_of(ROOT) == vmad_lit.__version__
    for name in "pyproject.toml", "conf.py", "CITATION.cff", "Makefile", "requirements.txt":
        assert f'"{vmad_lit.__version__}"' not in (ROOT / name).read_text(), name
    pfft = version_of(ROOT / "providers" / "pfft-python")
    assert re.fullmatch(r"[\d.]+\+ducc0", pfft), "the local part tells it from the original"


def test_one_licence():
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("BSD 2-Clause License\n\nCopyright (c) 2026, the vmad_lit authors\n")
    assert (ROOT / "providers" / "pfft-python" / "LICENSE").read_text() == licence
    for folder in ROOT, ROOT / "providers" / "pfft-python":
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert (project["license"], project["license-files"]) == ("BSD-2-Clause", ["LICENSE"])
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "BSD-2-Clause"


# -- Papers -------------------------------------------------------------------------------------------------


def test_the_citation_knows_the_papers_of_the_readme():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["authors"] == [{"name": "the vmad_lit authors"}]
    assert {"message", "title"} <= set(cited)
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text().partition("## Citing")[2])
    bibliography = (ROOT / "book" / "references.bib").read_text()
    for paper in cited["references"]:
        assert paper["doi"] in bibliography, paper["title"]
        first = paper["authors"][0]["family-names"]
        assert re.search(rf"{first}[^()]*\({paper['year']}\)", readme), paper["title"]
    assert len(cited["references"]) == len(re.findall(r"\((?:19|20)\d\d\)", readme))


def test_what_continuous_integration_and_hooks_run_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        run = [step["run"].split() for job in jobs for step in job["steps"] if "run" in step]
        assert {word for command, word in run if command == "make"} >= {"test", "check", "dist"}
        assert {word for _, word in run} <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[:2] for hook in hooks] == [
        ["python", "tools/tangle.py"],
        ["ruff", "check"],
        ["ruff", "format"],
    ]


def test_files_that_contributors_are_sent_to_exist():
    for name in "README.md", "CONTRIBUTING.md":
        text = (ROOT / name).read_text()
        paths = re.findall(r"[\s`(]((?:book|tools|tests|vmad_lit|providers)/[\w./-]*\w|[A-Z]{5,}\.\w+)", text)
        assert paths
        for path in paths:
            assert (ROOT / path).exists(), f"{name}: {path}"
