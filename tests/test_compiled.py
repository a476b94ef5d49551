"""Loops that are compiled once: what is found again, what is not, and what is never read."""

import errno
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest

compiled = pytest.importorskip("vmad_lit.lib.compiled")

LOOPS = """
import numpy
from vmad_lit.lib.compiled import compiled
from {units} import SCALE
import {units} as units

@compiled
def helper(x, one=1.0):
    return x * x * 1.0 + one

def make(power):
    @compiled
    def loop(x):
        aside = numpy.empty(len(x))
        for i in range(len(x)):
            aside[i] = SCALE * helper(x[i]) ** power + units.OFFSET + units.TABLE[i]
        return aside.sum()
    return loop
"""
UNITS = "import numpy\nSCALE, OFFSET, UNUSED, TABLE = 2.0, 3.0, 4.0, numpy.arange(3.0)\n"
X = np.array([0.5, 2.0, 3.0])


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder for the loops of each test, and a process that has not complained yet."""
    monkeypatch.setenv("VMAD_LIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "_warned", False)
    return tmp_path / "cache"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Import the modules of a new copy of the source, as a new process would."""
    number = itertools.count()

    def load(loops=LOOPS, units=UNITS, age=0):
        folder = tmp_path / f"copy{next(number)}"
        folder.mkdir()
        for name, text in (("tiny_units", units), ("tiny_loops", loops.replace("{units}", "tiny_units"))):
            path = folder / f"{name}.py"
            path.write_text(text)
            os.utime(path, (time.time() - age,) * 2)
            module = types.ModuleType(name)
            module.__file__ = str(path)
            monkeypatch.setitem(sys.modules, name, module)
            exec(compile(text, str(path), "exec"), module.__dict__)
        return sys.modules["tiny_loops"]

    return load


def count(*loops):
    """How many cases of loops were found, and how many compiled."""
    return tuple(
        sum(sum(getattr(loop.stats, what).values()) for loop in loops)
        for what in ("cache_hits", "cache_misses")
    )


def kept(place):
    return sorted(path for path in place.glob("*/*") if path.suffix == ".loop")


def test_another_copy_finds_what_one_has_compiled(load, place):
    first, second = (
        load(),
        load(
            "# a comment\n\n" + LOOPS.replace("        aside =", "        # here\n\n        aside ="), age=1e8
        ),
    )
    loops = [module.make(2) for module in (first, second)]
    expected = loops[0].py_func(X)
    assert loops[0](X) == pytest.approx(expected, rel=1e-14) and count(loops[0]) == (0, 1)
    assert loops[1](X) == loops[0](X) and count(loops[1]) == (1, 0)
    assert len(kept(place)) == 2  # the loop and its helper
    assert count(second.helper) == (0, 0)  # it is in the loop
    assert second.helper(3.0) == 10 and count(second.helper) == (1, 0)
    assert second.helper(3) == 10 and count(second.helper) == (1, 1)  # other types are another case


@pytest.mark.parametrize(
    "old, new",
    [
        (") ** power +", ") ** power -"),
        ("x * x * 1.0", "x * x * 2.0"),
        ("one=1.0", "one=2.0"),
        ("SCALE * helper", "SCALE + helper"),
        ("numpy.empty", "numpy.zeros"),
        ("@compiled\ndef helper", "SCALE = 7.0\n@compiled\ndef helper"),
    ],
    ids=str,
)
def test_another_loop_is_compiled(load, old, new):
    first = load().make(2)
    first(X)
    changed = load(LOOPS.replace(old, new)).make(2)
    assert LOOPS.count(old) == 1
    assert changed(X) == pytest.approx(changed.py_func(X)) and count(changed) == (0, 1)
    again = load().make(2)
    assert again(X) == first(X) and count(again) == (1, 0)  # the visit to another branch is over


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("2.0, 3.0", "5.0, 3.0", False),
        ("2.0, 3.0", "2.0, 5.0", False),
        ("arange(3.0)", "ones(3)", False),
        ("arange(3.0)", "arange(3)", False),
        ("4.0", "5.0", True),
    ],
    ids=str,
)
def test_constants_of_other_modules_are_part_of_a_loop(load, old, new, same):
    load().make(2)(X)
    changed = load(units=UNITS.replace(old, new)).make(2)
    assert changed(X) == pytest.approx(changed.py_func(X))
    assert count(changed) == ((1, 0) if same else (0, 1))


def test_variables_of_the_function_outside_are_part_of_a_loop(load):
    for module in load(), load():
        loops = [module.make(power) for power in (2, 3, 2.0)]
        assert [loop(X) for loop in loops] == pytest.approx([loop.py_func(X) for loop in loops])
    assert count(*loops) == (3, 0)


def test_options_and_settings_are_part_of_a_loop(load, monkeypatch):
    loop = load().helper
    types_of_arguments = (compiled.numba.float64,)
    path = loop._cache.path(types_of_arguments)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "7")
    assert loop._cache.path(types_of_arguments) == path
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    assert loop._cache.path(types_of_arguments) != path
    monkeypatch.delenv("NUMBA_BOUNDSCHECK")
    monkeypatch.setitem(compiled.OPTIONS, "fastmath", {"contract", "nnan"})
    assert load().helper._cache.path(types_of_arguments) != path
    monkeypatch.setattr(compiled.numba, "__version__", "0.1")
    assert os.path.dirname(loop._cache.path(types_of_arguments)) != os.path.dirname(path)


def test_ingredients_are_the_same_in_every_process():
    """They hold no address and no order of a set, of whatever a loop refers to."""
    code = (
        "import math, numpy, types\nfrom vmad_lit.lib.compiled import compiled, ingredients, numba\n"
        "table, kind, names = numpy.arange(5), numpy.dtype('f8'), ('a', 'b', 'c')\n"
        "@compiled\ndef f(n):\n    return f(n - 1) + math.floor(table[0]) if n > 0 else numba.uint64(len(names))\n"
        "@compiled\ndef g(x):\n    return numpy.empty(f(2), kind), numpy.sum(x), {1, 2, 3}, 1j, None, [y for y in names], types.f\n"
        "types.f = f\n"
        "print(compiled and ingredients([f, g, set(names), dict(zip(names, names))]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and "0x" not in outputs[0] and len(outputs[0]) > 1000


def test_loops_of_one_name_are_told_apart(load, monkeypatch):
    """Numba numbers what it compiles, in each process anew; here two loops have the same name and number."""
    identity = pytest.importorskip("numba.core.bytecode").FunctionIdentity
    text = LOOPS + "\n@compiled\ndef both(x):\n    return two(x), three(x)\n"
    expected = [load().make(power).py_func(X) for power in (2, 3)]
    load().helper(1.0)
    for power in 2, 3:
        monkeypatch.setattr(identity, "_unique_ids", itertools.count(10**6))
        load().make(power)(X)
    module = load(text)
    module.two, module.three = module.make(2), module.make(3)
    assert module.both(X) == pytest.approx(expected)
    assert count(module.two, module.three) == (2, 0)


def test_constants_in_calls_are_values_like_any_other(load):
    part = compiled.compiled(lambda x, n: x**n)
    loop = compiled.compiled(lambda x: part(x, 1) + part(x, 2) + part(x, 3))
    assert loop(2.0) == 14 and len(part.overloads) == 1


@pytest.mark.parametrize("kind", ["compiled", "inlined"])
def test_parts_are_written_into_the_loop(kind):
    """A long function is called, unless it is to become a part of the loop."""
    lines = [f"    x = x * {n}.5 / (x + {n}) if x > {n} else x + x / {n + 1}" for n in range(24)]
    scope = {"__name__": __name__}
    exec("\n".join(["def part(x):", *lines, "    return x"]), scope)
    part = getattr(compiled, kind)(scope["part"])
    loop = compiled.compiled(lambda x: part(x) + part(2 * x) + part(3 * x))
    assert loop(0.5) == pytest.approx(sum(part.py_func(n * 0.5) for n in (1, 2, 3)))
    lines = [line.split() for line in loop.inspect_asm()[loop.signatures[0]].splitlines()]
    calls = [
        line
        for line in lines
        if line and line[0].startswith(("call", "mov", "bl", "adr")) and "part_" in " ".join(line)
    ]
    assert bool(calls) is (kind == "compiled")


def test_loops_of_two_modules_are_two(load):
    """Numba imports the module of a function when it loads what was kept."""
    first, second = (compiled.compiled(lambda x: x) for _ in range(2))
    second.py_func.__module__ = "elsewhere"
    assert compiled.ingredients(first) != compiled.ingredients(second)


def test_a_signature_compiles_at_once(load):
    real = compiled.numba.float64
    for found in (0, 1), (1, 0):
        loop = compiled.compiled(lambda x: 3 * x, real)
        assert count(loop) == found
        assert loop(2.0) == 6.0
        with pytest.raises(TypeError):
            loop(1j)


# -- Where there is no folder -------------------------------------------------------------------------------


def without_home(monkeypatch, home):
    for name in "VMAD_LIT_CACHE_DIR", "XDG_CACHE_HOME":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    monkeypatch.setattr(sys, "platform", "linux")


NOWHERE = {
    "not a folder": lambda place, patch: patch.setenv(
        "VMAD_LIT_CACHE_DIR", os.path.join(os.devnull, "cache")
    ),
    "no home": lambda place, patch: without_home(patch, "~"),
    "a home that is not there": lambda place, patch: without_home(patch, os.path.join(os.devnull, "home")),
    "the disk is full": lambda place, patch: patch.setattr(compiled, "replacing", full),
    "others can write": lambda place, patch: find(place).chmod(0o770),
    "others can write above": lambda place, patch: (find(place), place.chmod(0o777)),
    "others own it": lambda place, patch: (
        find(place) and patch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    ),
}


def full(*where, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def find(place):
    folder = compiled.find_folder(compiled.compiled(lambda x: x).targetctx.codegen().magic_tuple()[1])
    assert os.path.dirname(folder) == str(place)
    return type(place)(folder)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners of files")
@pytest.mark.parametrize("name", NOWHERE)
def test_without_a_folder_it_is_compiled_after_one_warning(name, load, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    NOWHERE[name](place, monkeypatch)
    with pytest.warns(RuntimeWarning, match="VMAD_LIT_CACHE_DIR") as told:
        for i in range(2):
            loop = load().helper
            assert (loop(3.0), loop(3)) == (10.0, 10.0) and count(loop) == (0, 2)
    assert len(told) == 1
    assert not kept(place) and not os.path.exists("~")


def test_a_read_only_installation_without_a_home(tmp_path):
    """The particle mesh is imported without a word, and runs after one."""
    code = (
        "import warnings\nwarnings.simplefilter('error')\nfrom vmad_lit.lib import fastpm, window\n"
        "warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    assert window._fold(5, 3) == 2 and window._fold(5, 3.0) == 2\n"
        "print([str(w.message) for w in told])"
    )
    nowhere = os.path.join(os.devnull, "home")
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VMAD_LIT_CACHE_DIR", "XDG_CACHE_HOME")
    }
    env |= dict(HOME=nowhere, LOCALAPPDATA=nowhere, PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    told = eval(done.stdout)
    assert len(told) == 1 and "VMAD_LIT_CACHE_DIR" in told[0]
    assert not os.listdir(tmp_path)


def test_where_the_folder_is(monkeypatch, tmp_path):
    without_home(monkeypatch, str(tmp_path))
    for platform, folder in ("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "Local"):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
        assert compiled.find_folder("cpu").startswith(
            os.path.join(str(tmp_path), folder, "vmad_lit", "numba-")
        )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiled.find_folder("cpu").startswith(str(tmp_path / "xdg" / "vmad_lit"))
    monkeypatch.setenv("VMAD_LIT_CACHE_DIR", str(tmp_path / "own"))
    folder = compiled.find_folder("cpu")
    assert folder.startswith(str(tmp_path / "own")) and os.stat(folder).st_mode & 0o777 == 0o700


# -- What is not read ---------------------------------------------------------------------------------------


class Bomb:
    """A pickle is a program."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.exploded = True",)


def write(path, data, mode=0o600):
    path.write_bytes(compiled.hashlib.sha256(data).digest() + data)
    path.chmod(mode)


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "not what was written": lambda path: path.write_bytes(path.read_bytes()[:32] + pickle.dumps(Bomb())),
    "another thing": lambda path: write(path, pickle.dumps("a letter")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "by others": lambda path: write(path, pickle.dumps(Bomb()), 0o660),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_compiled_again(name, load, place, monkeypatch):
    import builtins

    monkeypatch.setattr(builtins, "exploded", False, raising=False)
    load().helper(3.0)
    [path] = kept(place)
    BROKEN[name](path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loop = load().helper
        assert loop(3.0) == 10 and count(loop) == (0, 1)
    assert not builtins.exploded
    loop = load().helper
    assert loop(3.0) == 10
    if name == "a folder":  # it stays in the way
        assert count(loop) == (0, 1) and len(told) == 1 and list(place.glob("*/*")) == [path]
    else:
        assert count(loop) == (1, 0) and not told


def test_files_are_private(load, place):
    load().helper(3.0)
    assert [path.stat().st_mode & 0o077 for path in (*kept(place), *place.iterdir())] == [0, 0]
    assert [path.name for path in place.glob("*/*")] == [kept(place)[0].name]  # no lock, nothing beside


@pytest.mark.parametrize("missing", [False, True])
def test_numba_gets_ready_only_for_code_that_needs_it(load, monkeypatch, missing):
    load().make(2)(X)
    loop, calls = load().make(2), []
    context = type(loop.targetctx)
    refresh = context.refresh
    monkeypatch.setattr(context, "refresh", lambda self: (calls.append(1), refresh(self)))
    if missing:
        monkeypatch.setattr(
            compiled, "address_of_symbol", lambda name: None if name == "NRT_MemInfo_alloc_aligned" else 1
        )
    assert loop(X) == pytest.approx(loop.py_func(X)) and count(loop) == (1, 0)
    assert bool(calls) is missing


def test_what_nobody_uses_goes(load, place):
    day = 86400
    load().helper(3.0)
    [helper] = kept(place)
    other = place / "numba-0.1-python2.7-z80"
    other.mkdir()
    for name, age in ("old.loop", 100), ("old.lock", 100), ("young.loop", 80):
        (other / name).write_text("")
        os.utime(other / name, (time.time() - age * day,) * 2)
    (place / "notes.txt").write_text("of somebody else")
    os.utime(place / "notes.txt", (0, 0))
    os.utime(helper, (time.time() - 89 * day,) * 2)
    load().helper(3.0)  # is used, but nothing is compiled
    assert time.time() - helper.stat().st_mtime < day and len(list(other.iterdir())) == 3
    load().helper(3)
    assert [path.name for path in other.iterdir()] == ["young.loop"]
    assert len(kept(place)) == 3 and (place / "notes.txt").exists()


# -- Several at a time ----------------------------------------------------------------------------------------


@pytest.mark.collective
def test_ranks_share_the_work(tmp_path, monkeypatch):
    """Of all the ranks of a job that want a loop at the same time, one compiles it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    monkeypatch.setenv("VMAD_LIT_CACHE_DIR", comm.bcast(str(tmp_path)))
    loop = compiled.compiled(lambda x, y: 3 * x + 5 * y)
    comm.Barrier()
    assert loop(1.0, 2.0) == 13
    assert comm.allreduce(np.array(count(loop))).tolist() == [comm.size - 1, 1]


def test_one_process_at_a_time_compiles(place):
    """The others wait for it, and do not compile what it has compiled; who comes later does not even load the compiler."""
    code = (
        "import sys, numpy\nfrom vmad_lit.lib.compiled import compiled\n"
        "f = compiled(lambda x: numpy.full(2, x**3 + x)[1])\nassert f(2.0) == f(2) == 10\n"
        "print(sum(f.stats.cache_misses.values()), 'numba.np.linalg' in sys.modules)"
    )

    def start():
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    outputs = [process.communicate()[0].split() for process in [start() for _ in range(3)]]
    assert sum(int(compiled) for compiled, _ in outputs) == 2 == len(kept(place))
    assert start().communicate()[0].split() == ["0", "False"]


def test_threads_share_the_work(load):
    """One thread wants the loop, another its helper, and nobody waits for ever."""
    for attempt in range(3):
        module = load(LOOPS.replace("* 1.0", f"* {attempt}.0"))
        results, wanted = [], [module.make(2), module.helper, module.make(2)]
        jobs = [(loop, (X,) if i != 1 else (3.0,)) for i, loop in enumerate(wanted)] * 2
        threads = [threading.Thread(target=lambda f=f, a=a: results.append((f, a, f(*a)))) for f, a in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 6 and all(value == pytest.approx(f.py_func(*a)) for f, a, value in results)
        assert count(*wanted) == (1, 2)


def test_a_lock_is_waited_for_but_not_for_ever(tmp_path, monkeypatch):
    path, order = str(tmp_path / "case.loop"), []
    monkeypatch.setattr(compiled, "PATIENCE", 0.1)
    with compiled._in_turn(path):
        with compiled._in_turn(path):  # waits for a tenth of a second
            order.append("second")
        assert os.path.exists(path + ".lock")
    assert not os.path.exists(path + ".lock")
    monkeypatch.setattr(compiled, "PATIENCE", 1e6)
    with compiled._in_turn(path):
        timer = threading.Timer(0.1, lambda: open(path, "w").close())
        timer.start()
        with compiled._in_turn(path):  # until the first has left a result
            order.append("third")
        timer.join()
    with compiled._in_turn(os.path.join(os.devnull, "case.loop")):
        order.append("nowhere")
    assert order == ["second", "third", "nowhere"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_the_lock_of_a_killed_process_is_gone(tmp_path, monkeypatch):
    path = str(tmp_path / "case.loop")
    code = f"import fcntl, time; f = open({path + '.lock'!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
    monkeypatch.setattr(compiled, "PATIENCE", 1e6)
    with compiled._in_turn(path):
        assert os.path.exists(path + ".lock")
    assert not os.path.exists(path + ".lock")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs signals")
def test_the_lock_of_a_stopped_process_is_waited_for_as_long_as_patience_lasts(tmp_path, monkeypatch):
    """Who works gives signs of life, and is waited for beyond that; who is stopped gives none."""
    path, patience = str(tmp_path / "case.loop"), 1.5
    code = f"import sys, time; from vmad_lit.lib.compiled import _in_turn\nwith _in_turn({path!r}): print('held', flush=True); time.sleep(1000)"
    monkeypatch.setattr(compiled, "PATIENCE", patience)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            threading.Timer(2 * patience, other.send_signal, [signal.SIGSTOP]).start()
            start = time.monotonic()
            with compiled._in_turn(path):
                waited = time.monotonic() - start
        finally:
            other.kill()
    assert 2 * patience < waited < 4 * patience


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners of files")
def test_folders_that_others_could_rename_are_not_trusted(tmp_path, monkeypatch):
    outer, folder = tmp_path / "outer", tmp_path / "outer" / "inner" / "folder"
    folder.mkdir(parents=True)
    for mode, found in (0o755, None), (0o777, outer), (0o1777, None), (0o775, outer), (0o757, outer):
        outer.chmod(mode)
        monkeypatch.setattr(compiled, "_are_alone_in", lambda group: False)
        assert compiled._within_reach_of_others(str(folder)) == (found and str(found)), oct(mode)
    monkeypatch.setattr(compiled, "_are_alone_in", lambda group: True)
    outer.chmod(0o775)
    assert compiled._within_reach_of_others(str(folder)) is None
    if os.getuid() == 0:
        outer.chmod(0o755)
        os.chown(outer, 12345, 0)
        assert compiled._within_reach_of_others(str(folder)) == str(outer)
    # a link on the way is followed first, and what it leads to is looked at
    outer.chmod(0o777)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("VMAD_LIT_CACHE_DIR", str(tmp_path / "link"))
    monkeypatch.setattr(compiled, "_warned", True)
    assert compiled.find_folder("cpu") is None


def test_an_error_of_the_compiler_leaves_no_lock(load, place):
    loop = compiled.compiled(lambda x: x.nothing)
    for _ in range(2):
        with pytest.raises(compiled.numba.core.errors.TypingError, match="nothing"):
            loop(1.0)
    assert not kept(place)
    loop = load().helper
    assert loop(3.0) == 10
