"""Run a piece of code on several ranks: a function, and the cell magic ``%%mpirun`` of the chapters.

In a chapter, once::

    %load_ext tools.mpirun

and then, in a cell of its own::

    %%mpirun -n 2
    from mpi4py import MPI
    print(MPI.COMM_WORLD.allreduce(1))

The body is a program of its own: it sees none of the page's variables.  What the ranks print is shown rank by rank,
each line with the number of its rank; with ``--root`` only what rank 0 prints, plain.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.cells import Place, compiled, place_of

ROOT = Path(__file__).resolve().parent.parent

#: What the launchers tell their processes; a launcher inside must not inherit it.
LAUNCHER_VARIABLES = re.compile(r"(PMI|PMIX|HYDRA|HYDI|OMPI_COMM|OMPI_UNIVERSE|PRTE|MPI_LOCAL)")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="%%mpirun", add_help=False, allow_abbrev=False)
    parser.add_argument("-n", type=int, default=2, help="the number of ranks")
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which the ranks are ended")
    parser.add_argument("--root", action="store_true", help="show only what rank 0 prints")
    return parser


def launcher() -> str:
    """The mpirun beside this Python if there is one, else the first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if found is None:
        raise FileNotFoundError("no mpirun beside this Python nor on PATH; `pip install mpich` brings one")
    return found


def environment() -> dict[str, str]:
    """Our environment without what a surrounding mpirun left in it, and with one thread for each rank."""
    clean = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.match(name)}
    clean["OMP_NUM_THREADS"] = "1"
    clean["MPLBACKEND"] = "Agg"
    clean["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    clean["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), clean.get("PYTHONPATH")]))
    return clean


def run_cell(cell: str, chapter: str, line: str) -> None:
    """What each rank does: run the file ``cell``, print into a file of its own, and end the job on an exception.

    The code is named after its place, a line of a chapter.
    """
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    os.dup2(os.open(f"{cell}.{rank}", os.O_WRONLY | os.O_CREAT), 1)
    try:
        source = Path(cell).read_text(encoding="utf-8")
        exec(compiled(source, Place(chapter, int(line))), {"__name__": "__main__"})
    except Exception:
        import traceback

        sys.stdout.flush()
        sys.stderr.write(f"rank {rank}: {traceback.format_exc()}")
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)


def mpirun(
    source: str, arguments: str | list[str] = "", check: bool = True, place: Place | None = None
) -> subprocess.CompletedProcess:
    """Run ``source`` under mpirun; ``place`` says where its first line stands in a chapter.

    An exception on one rank ends all of them; ranks that hang are ended after the time-out (status 124).  With
    ``check``, a status other than 0 is a ``RuntimeError`` that tells what was printed.
    """
    given = options().parse_args(shlex.split(arguments) if isinstance(arguments, str) else arguments)
    with tempfile.TemporaryDirectory() as folder:
        cell = Path(folder, "cell")
        cell.write_text(source, encoding="utf-8")
        command = [
            launcher(),
            "-n",
            str(given.n),
            sys.executable,
            "-c",
            "import sys, tools.mpirun; tools.mpirun.run_cell(*sys.argv[1:])",
            str(cell),
            *map(str, place or Place("cell", 1)),
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=folder,
            start_new_session=True,
        )
        try:
            printed, errors = process.communicate(timeout=given.timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                printed, errors = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed, errors = process.communicate()
            status, errors = 124, errors + f"\nended after {given.timeout:g} s\n"
        for rank in range(1 if given.root else given.n):
            path = Path(f"{cell}.{rank}")
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            printed += text if given.root else "".join(f"[{rank}] {row}\n" for row in text.splitlines())
    if check and status:
        raise RuntimeError(f"mpirun -n {given.n} ended with status {status}\n{printed}{errors}")
    return subprocess.CompletedProcess(command, status, printed, errors)


def load_ipython_extension(shell) -> None:
    def show(line: str, cell: str) -> None:
        here = place_of(shell)
        if here is not None:  # the body begins below the line of the magic
            here = Place(here.chapter, here.line + 1 + len(cell) - len(cell.lstrip("\n")))
        print(mpirun(cell, line, place=here).stdout, end="")

    shell.register_magic_function(show, magic_kind="cell", magic_name="mpirun")
