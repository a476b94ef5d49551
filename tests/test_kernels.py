"""Kernels of the book's pages are forks of one process, and behave as kernels of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("jupyter_client")

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import importlib.metadata, os, signal, sys, time
import nbformat
from jupyter_client.provisioning import KernelProvisionerFactory
from nbclient import NotebookClient
from tools.kernels import nursery

factory = KernelProvisionerFactory.instance()
entry = importlib.metadata.EntryPoint("nursling", "tools.kernels:Nursling", factory.GROUP_NAME)
factory.provisioners[entry.name], factory.default_provisioner_name = entry, entry.name

def run(*cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute()
    return [[output.get("text", output.output_type) for output in cell.outputs] for cell in notebook.cells]

first = run("import os, sys; x = 1; print(os.getppid(), 'numba' in sys.modules)",
            "import matplotlib.pyplot as plt; plt.plot([1]);",
            "print(x, plt.get_backend())", "1 / 0")
second = run("print('x' in globals(), 'matplotlib.pyplot' in __import__('sys').modules)")
parent = nursery(os.getpid()).process.pid
assert first == [[f"{parent} True\\n"], ["display_data"], ["1 module://matplotlib_inline.backend_inline\\n"], ["error"]], first
assert second == [["False False\\n"]], second
print(parent, flush=True)
time.sleep(60)
"""


def test_kernels_are_forks_and_end_with_the_builder():
    pytest.importorskip("numba")
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    line = program.stdout.readline()
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert line.strip().isdigit()
    for _ in range(100):
        try:
            os.kill(int(line), 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{line.strip()}/stat").read_text().split(")")[1].split()[0] == "Z":
            return  # dead, and waits for an init that reaps
        time.sleep(0.1)
    pytest.fail("the nursery has outlived the program that started it")
