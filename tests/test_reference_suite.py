"""The tests of the reference system, `vmad` 0.0.2, with our name in their imports: programs written for it run here.

Nothing of them is kept in this repository: they come from the package index, and where there is none, or in continuous
integration, they are left out.
"""

import hashlib
import os
import re
import subprocess
import sys
import tarfile

import pytest

from helpers import needs_mpirun
from tools.mpirun import ROOT, environment, launcher

pytest.importorskip("pmesh")

ARCHIVE = "vmad-0.0.2.tar.gz"
DIGEST = "c943b6623c00ce9d4e7fee8052e013153bbc8436f3dafaf27b3ecacc5736c424"
TESTS = 234
#: The reference takes its cosmology from a package that is hard to install; ours has the same names.
STAND_IN = "from vmad_lit.lib.cosmology import *\n"

pytestmark = [
    pytest.mark.skipif(
        bool(os.environ.get("CI")), reason="continuous integration runs what is in the repository"
    ),
    pytest.mark.timeout(280),
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source distribution, from the package index."""
    folder = tmp_path_factory.mktemp("index")
    options = ["--no-deps", "--no-binary", ":all:", "--retries", "1", "--timeout", "15", "--dest", folder]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", *options, "vmad==0.0.2"],
        capture_output=True,
        text=True,
    )
    if not (folder / ARCHIVE).exists():
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"the package index does not give us {ARCHIVE}: {reason}")
    found = hashlib.sha256((folder / ARCHIVE).read_bytes()).hexdigest()
    assert found == DIGEST, f"{ARCHIVE} is not the one that these tests are about"
    return folder / ARCHIVE


@pytest.fixture
def suite(archive, tmp_path):
    """A folder with the tests, and with what they import."""
    with tarfile.open(archive) as files:
        for member in files:
            place = re.fullmatch(r"vmad-0\.0\.2/vmad/((?:\w+/)*)tests/(\w+\.py)", member.name)
            if place:
                folder = tmp_path / ("of_" + place[1].strip("/"))
                folder.mkdir(exist_ok=True)
                text = files.extractfile(member).read().decode()
                (folder / place[2]).write_text(re.sub(r"\bvmad\b", "vmad_lit", text))
    (tmp_path / "nbodykit").mkdir()
    (tmp_path / "nbodykit" / "__init__.py").touch()
    (tmp_path / "nbodykit" / "cosmology.py").write_text(STAND_IN)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    return tmp_path


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpirun)])
def test_the_tests_of_the_reference_pass(suite, ranks):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    if ranks > 1:
        command = [launcher(), "-n", str(ranks), *command]
    env = environment() | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=suite, env=env, capture_output=True, text=True, timeout=240)
    passed = re.findall(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed == [str(TESTS)] * ranks, done.stdout[-6000:] + done.stderr[-2000:]
