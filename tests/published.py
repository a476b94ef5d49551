"""What `make dist` has built, tried out: the wheel where there is nothing but NumPy, the source distribution as a checkout.

Not collected by itself; `make dist` runs it on the folder dist/.
"""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import vmad_lit

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


def the(pattern):
    """The one file of dist/ with such a name."""
    found = list(DIST.glob(pattern))
    assert len(found) == 1, f"expected one {pattern} in {DIST}, found {[file.name for file in found]}"
    return found[0]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder of the source distribution."""
    with tarfile.open(the("vmad_lit-*.tar.gz")) as archive:
        archive.extraction_filter = getattr(
            tarfile, "data_filter", None
        )  # not in the first releases of Python 3.11
        archive.extractall(tmp_path_factory.mktemp("sdist"))
        [top] = {Path(name).parts[0] for name in archive.getnames()}
    return tmp_path_factory.getbasetemp() / "sdist0" / top


class Bare:
    """A Python of its own, with the wheel and what it requires."""

    def __init__(self, folder):
        self.folder = folder
        venv.create(folder / "python", with_pip=True, symlinks=True)
        self.python = folder / "python" / "bin" / "python"
        self.env = os.environ | {"PATH": str(self.python.parent)}  # where there is no compiler, and no MPI
        self.run("-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", the("vmad_lit-*.whl"))

    def run(self, *arguments):
        """Run its Python, isolated from this checkout; returns what it printed."""
        command = [self.python, "-I", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def program(self, text):
        file = self.folder / "program.py"
        file.write_text(text)
        return self.run(file)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return Bare(tmp_path_factory.mktemp("bare"))


# -- Files --------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_the_licence_and_nothing_else():
    with zipfile.ZipFile(the("vmad_lit-*.whl")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2] for name in wheel.namelist()} - {""}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vmad_lit").rglob("*.py")}
    assert names == there | {"vmad_lit/py.typed"}
    assert info == {"licenses/LICENSE", "METADATA", "WHEEL", "top_level.txt", "RECORD"}


def test_the_provider_is_published_with_its_licence():
    with zipfile.ZipFile(the("pfft_python-*.whl")) as wheel:
        names = wheel.namelist()
    assert {name for name in names if ".dist-info/" not in name} == {
        f"pfft/{m}.py" for m in ("__init__", "plan", "partition")
    }
    assert [name for name in names if name.endswith("/licenses/LICENSE")]
    assert the("pfft_python-*.tar.gz").name.endswith("+ducc0.tar.gz")


def test_the_source_distribution_holds_what_is_under_version_control(unpacked):
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no repository of git")
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in there if ".egg-info/" in name}
    assert there - made == {name for name in listed if name and (ROOT / name).exists()}


def test_in_the_source_distribution_package_and_book_agree(unpacked):
    command = [sys.executable, "tools/tangle.py", "--check"]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (unpacked / "vmad_lit" / "lib" / "unary.py").unlink()
    assert subprocess.run(command, cwd=unpacked, capture_output=True).returncode == 1


# -- On a bare Python ---------------------------------------------------------------------------------------


def test_numpy_is_all_that_is_installed(bare):
    rows = bare.run("-m", "pip", "list", "--format=freeze").split()
    names = {row.partition("==")[0].lower().replace("_", "-") for row in rows}
    assert names - {"pip", "setuptools", "wheel"} == {"numpy", "vmad-lit"}
    assert f"vmad_lit=={vmad_lit.__version__}" in rows
    printed = bare.program("import vmad_lit; print(vmad_lit.__version__, vmad_lit.__file__)").split()
    assert printed[0] == vmad_lit.__version__
    assert Path(printed[1]).is_relative_to(bare.folder)


def test_the_ten_lines_of_the_readme(bare):
    fences = re.findall(r"^```pycon\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert fences
    examples = bare.folder / "examples.txt"
    examples.write_text("\n".join(fences))
    counted = bare.program(
        "import doctest\n"
        f"print(doctest.testfile({str(examples)!r}, module_relative=False, raise_on_error=True))"
    )
    assert re.search(r"failed=0, attempted=[1-9]", counted)


def test_a_gradient_with_respect_to_cosmological_parameters(bare):
    bare.program(
        "import numpy as np\n"
        "from vmad_lit import Builder\n"
        "from vmad_lit.lib.cosmology import LinearPower, Planck15, growth, linear_power\n"
        "from vmad_lit.testing import check\n"
        "k, names = np.geomspace(1e-3, 1.0, 32), ['Om0', 'h', 'n_s', 'sigma8', 'Ob0']\n"
        "with Builder() as m:\n"
        "    m.output(P=linear_power(*m.input(*names), k=k))\n"
        "point = {name: getattr(Planck15, name) for name in names}\n"
        "[P], gradient = m.compute_with_vjp(init=point, v=dict(_P=k))\n"
        "def loss(**changes):\n"
        "    return np.sum(k * LinearPower(Planck15.replace(**changes))(k))\n"
        "for name, slope in zip(names, gradient):\n"
        "    up, down = (loss(**{name: point[name] + step}) for step in (1e-5, -1e-5))\n"
        "    assert np.isclose(slope, (up - down) / 2e-5, rtol=1e-6), name\n"
        "check(growth, 0.3, a=np.array([0.2, 1.0]))\n"
    )


def test_an_optimiser_on_plain_vectors(bare):
    bare.program(
        "import numpy as np\n"
        "from vmad_lit import Builder\n"
        "from vmad_lit.contrib.optimize import LBFGS, Problem\n"
        "from vmad_lit.lib import linalg\n"
        "A, b = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([1.0, -1.0])\n"
        "with Builder() as m:\n"
        "    x = m.input('x')\n"
        "    m.output(y=0.5 * linalg.sum(x * (A @ x)) - linalg.sum(b * x))\n"
        "def value_and_gradient(x):\n"
        "    [y], [g] = m.compute_with_vjp(init=dict(x=x), v=dict(_y=1.0))\n"
        "    return y, g\n"
        "result = LBFGS(gtol=1e-9).minimize(Problem(value_and_gradient=value_and_gradient), np.zeros(2))\n"
        "assert result.converged\n"
        "assert np.allclose(result.x, np.linalg.solve(A, b), atol=1e-7)\n"
    )


def test_what_is_missing_is_told_with_its_extra(bare):
    told = bare.program("try:\n    import vmad_lit.lib.mpi\nexcept ImportError as error:\n    print(error)\n")
    assert "mpi4py" in told and "pip install 'vmad_lit[mpi]'" in told
