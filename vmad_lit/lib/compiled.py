"""Loops that numba compiles, kept on disk under a digest of what they are made of.

What one process has compiled all others find, of this user and on this kind of machine: the next run, the other
ranks, another copy of the source. Where there is no folder to write to, each process compiles for itself, and
says so once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
import glob
import hashlib
import os
import pickle
import stat
import sys
import threading
import time
from types import CodeType, FunctionType, ModuleType
from typing import Any
import warnings

import numpy

from vmad_lit.core.error import needed_for
from vmad_lit.lib.files import replacing

with needed_for("compiled loops", extra="fast"):
    import numba
    from llvmlite.binding import address_of_symbol
    from numba.core.compiler import CompileResult
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.dispatcher import Dispatcher
    from numba.core.extending import _Intrinsic as Intrinsic
    from numba.core.runtime.nrt import rtsys
    from numba.core.serialize import dumps

#: What numba is asked for.
OPTIONS: dict[str, Any] = dict(nogil=True, error_model="numpy", fastmath={"contract"}, no_cfunc_wrapper=True)


def ingredients(value: Any, names: Sequence[str] = (), seen: tuple[Any, ...] = ()) -> Any:
    """What of a value becomes machine code, as a string or nested tuples of strings, the same in every process.

    Of compiled functions that is all they are made of; of a module what is asked of it under one of `names`.
    Other functions numba replaces with its own: their names are enough. `seen`: those we are in the midst of.
    """
    if isinstance(value, Dispatcher):
        return _ingredients_of_function(value.py_func, seen), ingredients(value.targetoptions)
    if isinstance(value, Intrinsic):
        return _ingredients_of_function(value._defn, seen), _ingredients_of_module(value._defn.__module__)
    # Describe a module, or what holds other values
    if isinstance(value, ModuleType):
        asked = [name for name in names if hasattr(value, name) and value not in seen]
        return value.__name__, *(ingredients(getattr(value, name), names, (*seen, value)) for name in asked)
    if isinstance(value, (tuple, list)):
        return tuple(ingredients(item, names, seen) for item in value)
    if isinstance(value, (set, frozenset, dict)):
        items = value.items() if isinstance(value, dict) else value
        return tuple(sorted(repr(ingredients(item)) for item in items))
    # Describe a value that is not made of others
    kind = type(value).__name__
    if value is None or isinstance(value, (int, float, complex, str, bytes, numpy.dtype, numba.types.Type)):
        return f"{kind} {value!r}"
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    if name is not None:
        return f"{kind} {value.__module__}.{name}"
    return f"{kind} {hashlib.sha256(dumps(value)).hexdigest()}"


def _ingredients_of_function(function: Any, seen: tuple[Any, ...]) -> Any:
    if function in seen:
        return function.__name__
    codes = list(_codes(function.__code__))
    names = sorted({name for code in codes for name in code.co_names})
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    scope = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    bodies = [
        (code.co_code.hex(), code.co_exceptiontable.hex(), code.co_varnames, code.co_names, code.co_freevars)
        for code in codes
    ]
    constants = [[c for c in code.co_consts if not isinstance(c, CodeType)] for code in codes]
    referred = constants, function.__defaults__, cells, scope
    return function.__module__, repr(bodies), ingredients(referred, names, (*seen, function))


@lru_cache(maxsize=None)
def _ingredients_of_module(name: str) -> Any:
    """The code of all functions of a module: what a function that makes instructions calls may be any of them."""
    values = [getattr(value, "_defn", value) for value in vars(sys.modules[name]).values()]
    own = [value for value in values if isinstance(value, FunctionType) and value.__module__ == name]
    codes = [code for function in own for code in _codes(function.__code__)]
    return repr([(code.co_code.hex(), code.co_names) for code in codes]), ingredients(
        [[c for c in code.co_consts if not isinstance(c, CodeType)] for code in codes]
    )


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of the functions within."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _user_cache() -> str:
    """The folder where this user's programs keep what can be made again."""
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise OSError("there is no home directory")
    usual = {
        "win32": os.environ.get("LOCALAPPDATA", home),
        "darwin": os.path.join(home, "Library", "Caches"),
    }
    return os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, os.path.join(home, ".cache"))


def find_folder(processor: str | None) -> str | None:
    """The folder for loops that are compiled for a processor; None if there is none to write to and to trust.

    It is in ``$VMAD_LIT_CACHE_DIR``, else in ``$XDG_CACHE_HOME/vmad_lit`` or where the system has such things.
    """
    version = f"numba-{numba.__version__}-python{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        place = os.environ.get("VMAD_LIT_CACHE_DIR") or os.path.join(_user_cache(), "vmad_lit")
        folder = os.path.join(os.path.realpath(place), f"{version}-{processor or 'generic'}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        exposed = None if _is_private(os.lstat(folder)) else folder
        exposed = exposed or _within_reach_of_others(folder)
        if exposed is None:
            return folder
        _warn(f"others can write to {exposed}")
    except OSError as error:
        _warn(error)
    return None


def _is_private(status: os.stat_result) -> bool:
    """Whether a file or a folder is ours, and nobody else may write to it."""
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def _within_reach_of_others(folder: str) -> str | None:
    """The folder above a real path, if there is one, in which others could rename what leads to it."""
    trusted = {os.getuid(), 0, os.stat(os.path.abspath(os.sep)).st_uid} if hasattr(os, "getuid") else set()
    while trusted and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        status = os.lstat(folder)
        shared = status.st_mode & 0o022
        if shared == 0o020 and _are_alone_in(status.st_gid):
            shared = 0
        if status.st_uid not in trusted or (shared and not status.st_mode & stat.S_ISVTX):
            return folder
    return None


def _are_alone_in(group: int) -> bool:
    """Whether a group is the one that a system has made for the user alone, of the same name."""
    import grp
    import pwd

    try:
        us, them = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return us.pw_gid == group and them.gr_name == us.pw_name and set(them.gr_mem) <= {us.pw_name}


_warned = False


def _warn(reason: object) -> None:
    """Tell, once in a process, that loops are not kept."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"compiled loops cannot be kept, so that every process has to compile them anew: {reason}. "
            f"Set VMAD_LIT_CACHE_DIR to a folder that you alone can write to.",
            RuntimeWarning,
            stacklevel=2,
        )


class Cache:
    """The cases of a compiled function, on disk: numba asks here before it compiles one, and brings it after."""

    def __init__(self, loop: Any) -> None:
        self.loop, self.name = loop, loop.py_func.__name__

    def path(self, signature: Any) -> str | None:
        """The file of the case with these types of arguments; None if there is no folder for it."""
        machine = self.loop.targetctx.codegen().magic_tuple()
        folder = find_folder(machine[1])
        if folder is None:
            return None
        settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
        settings = [item for item in settings if not item[0].endswith(("_NUM_THREADS", "_CACHE_DIR"))]
        versions = numba.__version__, sys.version_info[:2]
        made_of = ingredients(self.loop), str(signature), machine, settings, versions
        return os.path.join(folder, f"{self.name}-{_digest(made_of)}.loop")

    def load_overload(self, signature: Any, context: Any) -> Any:
        """What numba made of the function for these types; None if it is not here."""
        path = self.path(signature)
        if path is None or not os.path.exists(path):
            return None
        try:
            with open(path, "rb") as file:
                trusted, digest, data = _is_private(os.fstat(file.fileno())), file.read(32), file.read()
            if not trusted or hashlib.sha256(data).digest() != digest:
                return None
            symbols, result = pickle.loads(data)
            # Provide what the machine code refers to
            rtsys.initialize(context)
            if not all(address_of_symbol(name) for name in symbols):
                context.refresh()
            _mark_as_used(path)
            return CompileResult._rebuild(context, *result)
        except Exception:  # a file of any other kind: it is made anew
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what numba made of the function for these types."""
        path = self.path(signature)
        if path is None or result.library.has_dynamic_globals:
            return
        data = dumps((_undefined_symbols(result.library), result._reduce()))
        try:
            with replacing(path, mode=0o600) as file:
                file.write(hashlib.sha256(data).digest() + data)
        except OSError as error:
            _warn(error)
        _remove_unused(os.path.dirname(os.path.dirname(path)))

    @property
    def cache_path(self) -> str | None:
        """The folder, for numba's statistics."""
        return find_folder(self.loop.targetctx.codegen().magic_tuple()[1])

    def enable(self) -> None:
        """Nothing: a loop is always kept."""

    disable = flush = enable


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def _undefined_symbols(library: Any) -> list[str]:
    """The names that the machine code refers to and does not define, without those that are operations of LLVM."""
    module = library._final_module
    declared = [
        symbol.name for symbol in (*module.functions, *module.global_variables) if symbol.is_declaration
    ]
    return [name for name in declared if not name.startswith("llvm.")]


#: Seconds after which a loop goes that has not been used.
LIFETIME = 90 * 86400


def _mark_as_used(path: str) -> None:
    with suppress(OSError):
        if time.time() - os.stat(path).st_mtime > 86400:
            os.utime(path)


def _remove_unused(place: str) -> None:
    """Remove what has not been used for long from the folders of all versions and processors."""
    for path in glob.glob(os.path.join(glob.escape(place), "numba-*", "*")):
        with suppress(OSError):
            if time.time() - os.stat(path).st_mtime > LIFETIME:
                os.unlink(path)


#: Seconds to wait for another process that holds the lock of a loop, without a sign of life from it.
PATIENCE = 4.0


@contextmanager
def _in_turn(path: str) -> Iterator[None]:
    """Wait until no other process compiles the loop of a file, or it is there; then it is our turn."""
    try:
        import fcntl

        file = open(path + ".lock", "a")
    except (ImportError, OSError):
        yield
        return
    with file:
        # Wait for the lock
        held, seen, since = False, 0, time.monotonic()
        while not held and not os.path.exists(path) and time.monotonic() - since < PATIENCE:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                time.sleep(0.05)
                sign = os.fstat(file.fileno()).st_mtime_ns
                if sign != seen:
                    seen, since = sign, time.monotonic()
            except OSError:
                break
        if not held:
            yield
            return
        with _signs_of_life(file.name):
            yield
        with suppress(OSError):
            os.unlink(file.name)


@contextmanager
def _signs_of_life(path: str) -> Iterator[None]:
    """Touch a file twice a second, from another thread, until the block ends."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(0.5):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def compiled(function: Callable[..., Any], *signature: Any, **options: Any) -> Any:
    """A function compiled by numba, each case once for all processes: when it is called, or now, for a signature.

    Numba takes the global variables that a function uses for constants. With types of arguments as
    `signature` the function serves these alone, and is compiled at once. `options`: others for numba.
    """
    loop = numba.njit(**OPTIONS, **options)(function)
    compile_case, name = loop.compile, function.__qualname__
    loop._cache = cache = Cache(loop)

    def compile_in_turn(types: Iterable[Any]) -> Any:
        # Compile a case in turn
        types = tuple(numba.types.unliteral(kind) for kind in types)
        if types in loop.overloads:
            return compile_case(types)
        with global_compiler_lock:
            function.__qualname__ = f"{name}_{_digest(ingredients(loop))}"
            path = cache.path(types)
            with nullcontext() if path is None or os.path.exists(path) else _in_turn(path):
                return compile_case(types)

    loop.compile = compile_in_turn
    if signature:
        loop.compile(signature)
        loop.disable_compile()
    return loop


def inlined(function: Callable[..., Any]) -> Any:
    """A compiled function that becomes a part of each loop that calls it."""
    return compiled(function, forceinline=True)


def inner(function: Callable[..., Any]) -> Any:
    """A compiled function of pointers that only loops call; they share it."""
    return compiled(function, no_cpython_wrapper=True)
