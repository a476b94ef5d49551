"""Fingerprints: what a problem is, as names and values that can be kept in a file and compared."""

from __future__ import annotations

from collections.abc import Mapping
import functools
import hashlib
import math
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy

from ..core.autooperator import AutoOperator
from ..core.operator import Operator
from ..core.stdlib.operators import Array

Print = Any  # a number, a string, None, or lists and dictionaries of them

CHUNK = 1 << 15  # numbers that are looked at at a time
FEW = 12  # numbers that are shown one by one


def weights(places: Array) -> list[Array]:
    """Three numbers between -1 and 1 for each of the places, which are whole numbers."""
    z = places.astype("u8") + numpy.uint64(0x9E3779B97F4A7C15)
    for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB):
        z = (z ^ (z >> numpy.uint64(shift))) * numpy.uint64(factor)
    z ^= z >> numpy.uint64(31)
    low = numpy.uint64((1 << 21) - 1)
    return [((z >> numpy.uint64(21 * i)) & low) * 2.0**-20 - 1 for i in range(3)]


def sums(values: Array, places: Array) -> Array:
    """The number of values, their sum, the sum of their squares, and three weighted sums."""
    values = finite(values.astype("f8", copy=False))
    weighted = [numpy.dot(w, values) for w in weights(places)]
    return numpy.array([values.size, values.sum(), numpy.dot(values, values), *weighted])


def finite(values: Array) -> Array:
    """The values, with odd numbers in the place of infinities and NaN."""
    with numpy.errstate(invalid="ignore"):
        if math.isfinite(values.sum()):
            return values
    return numpy.nan_to_num(values, nan=0.7071, posinf=1.618, neginf=-2.718)


def sums_of_array(array: Array, before: int) -> Array:
    """The sums of an array of numbers, of whose whole so many rows lie on the ranks before."""
    array = numpy.ascontiguousarray(array)
    if array.dtype.kind == "c":
        array = array.view(array.real.dtype).reshape(*array.shape, 2)
    total, start = numpy.zeros(6), before * (array[:1].size if array.ndim else 1)
    # Sum powers of the projections of rows
    if array.ndim == 2 and array.size:
        u = weights(numpy.arange(array.shape[1]))
        for i in range(0, len(array), CHUNK):
            rows = finite(array[i : i + CHUNK].astype("f8", copy=False))
            powers = [numpy.sum((rows @ w) ** k) for k, w in zip((2, 3, 4), u)]
            total += [rows.size, rows.sum(), numpy.vdot(rows, rows), *powers]
        return total
    flat = array.reshape(-1)
    for i in range(0, flat.size, CHUNK):
        part = flat[i : i + CHUNK]
        total += sums(part, numpy.arange(start + i, start + i + part.size))
    return total


def sums_of_field(field: Any) -> Array:
    """The sums of a field of pmesh, this rank's share of them."""
    total: Array = numpy.zeros(6)
    places: Any = 0
    for i, n in zip(field.i, field.Nmesh):
        places = places * int(n) + numpy.asarray(i).astype("i8")
    shape, values = field.value.shape, field.value
    for plane, where in zip(values, numpy.broadcast_to(places, shape)):
        for k, part in enumerate((plane.real, plane.imag) if numpy.iscomplexobj(values) else (plane,)):
            total += sums(part.reshape(-1), 2 * where.reshape(-1) + k)
    return total


def fingerprint(value: Any, comm: Any = None) -> Print:
    """What `value` is, the same on any number of ranks. Collective.

    Dictionaries, lists, numbers, strings, arrays, fields, meshes, functions, operators with their hyper-parameters,
    and objects with attributes of such kinds. Anything else counts by its type.
    """
    arrays: list[tuple[dict[str, Any], Any]] = []
    tree = _walk(value, arrays, 0)
    # Sum the arrays over the ranks
    mine = [_rows(array) for _, array in arrays]
    alone = comm is None or comm.size == 1
    before = [0] * len(mine) if alone else _rows_before(comm, mine)
    local = [_sums_of(array, begin) for (_, array), begin in zip(arrays, before)]
    own = [_sums_of(array, 0) if begin else s for (_, array), begin, s in zip(arrays, before, local)]
    added, first, different = _over_ranks(comm, alone, local, own)
    for (record, _), all_of_it, each, differs in zip(arrays, added, first, different):
        record["sum"] = [float(number) for number in all_of_it]
        record["each"] = None if differs else [float(number) for number in each]
    return tree


def _rows(array: Any) -> int:
    return len(array) if isinstance(array, numpy.ndarray) and array.ndim else 0


def _sums_of(array: Any, before: int) -> Array:
    with numpy.errstate(all="ignore"):
        return sums_of_array(array, before) if isinstance(array, numpy.ndarray) else sums_of_field(array)


def _rows_before(comm: Any, rows: list[int]) -> list[int]:
    """How many rows of each array there are on the ranks before; an error if ranks have met other arrays."""
    everybody = comm.allgather(rows)
    if any(len(theirs) != len(rows) for theirs in everybody):
        numbers = [len(theirs) for theirs in everybody]
        raise ValueError(
            f"the ranks have different problems: there are {numbers} arrays in them on the ranks 0, 1, ..."
        )
    return [sum(theirs[i] for theirs in everybody[: comm.rank]) for i in range(len(rows))]


def _over_ranks(comm: Any, alone: bool, local: list[Array], own: list[Array]) -> tuple[Any, Any, Any]:
    """The sums of all ranks, those of rank 0 alone, and whether any rank has others than that."""
    if alone or not local:
        return local, own, [False] * len(local)
    first = comm.bcast(own)
    other = numpy.array([not numpy.array_equal(a, b, equal_nan=True) for a, b in zip(first, own)], int)
    return comm.allreduce(numpy.array(local)), first, comm.allreduce(other) > 0


def _walk(value: Any, arrays: list[Any], depth: int) -> Print:
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (complex, bytes, type, numpy.dtype)):
        return value.__qualname__ if isinstance(value, type) else str(value)
    if isinstance(value, numpy.ndarray):
        return _put_aside(value, arrays)
    if hasattr(value, "pm") and hasattr(value, "value"):
        record = dict(field=value.value.dtype.name, mesh=[int(n) for n in value.Nmesh])
        arrays.append((record, value))
        return record
    if hasattr(value, "Nmesh") and hasattr(value, "BoxSize"):
        box = [float(length) for length in value.BoxSize]
        return dict(mesh=[int(n) for n in value.Nmesh], box=box, dtype=numpy.dtype(value.dtype).name)
    if depth > 5:
        return type(value).__qualname__
    return _walk_inside(value, arrays, depth + 1)


def _put_aside(array: Array, arrays: list[Any]) -> Print:
    if array.dtype.kind not in "biufc":
        return f"{array.dtype} {list(array.shape)} {hashlib.sha256(repr(array.tolist()).encode()).hexdigest()[:16]}"
    record: dict[str, Any] = dict(array=array.dtype.name, shape=list(array.shape[1:]))
    if array.dtype.kind != "c" and array.ndim < 2 and array.size <= FEW:
        record["values"] = array.tolist()
    arrays.append((record, array))
    return record


def _walk_inside(value: Any, arrays: list[Any], depth: int) -> Print:
    """What is in a list, a dictionary, a function, an operator or another object."""
    if isinstance(value, Mapping):
        return {str(key): _walk(item, arrays, depth) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(item, arrays, depth) for item in value]
    # Take a partial function apart
    if isinstance(value, functools.partial):
        return dict(
            function=_walk(value.func, arrays, depth),
            given=_walk([*value.args, value.keywords], arrays, depth),
        )
    # Find what is inside, and the code
    inside: dict[str, Any] = {}
    code = value
    if isinstance(value, AutoOperator):
        inside, code = dict(value.hyperargs), getattr(value.prototype, "main", value.prototype)
    elif isinstance(value, MethodType):
        inside, code = {"self": value.__self__}, value.__func__
    elif not isinstance(value, (FunctionType, Operator, ModuleType)):
        attributes = getattr(value, "__dict__", {})
        inside = {name: item for name, item in attributes.items() if name[:1] != "_"}
    name = getattr(value, "__qualname__", getattr(value, "__name__", type(value).__qualname__))
    found = dict(type=name)
    if isinstance(code, FunctionType):
        # Describe the code of a function
        found["code"] = hashlib.sha256(repr(_instructions(code.__code__)).encode()).hexdigest()[:16]
        cells = zip(code.__code__.co_freevars, code.__closure__ or ())
        with_values = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        inside = {
            **with_values,
            **{f"default{i}": v for i, v in enumerate(code.__defaults__ or ())},
            **inside,
        }
    found.update((name, _walk(item, arrays, depth)) for name, item in inside.items())
    return found


def _instructions(code: CodeType) -> Any:
    """What a function does, without where it stands."""
    constants = [_instructions(c) if isinstance(c, CodeType) else _in_order(c) for c in code.co_consts[:]]
    return code.co_code.hex(), code.co_names, code.co_varnames, constants


def _in_order(constant: Any) -> str:
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def differences(old: Print, new: Print, name: str = "") -> dict[str, tuple[str, str]]:
    """What differs between two fingerprints: by the name, with the parts of it joined by dots, in words, before and now."""
    if _is_record(old) and _is_record(new):
        return {} if _same_numbers(old, new) else {name: _told_apart(old, new)}
    # Compare dictionaries key by key
    if isinstance(old, dict) and isinstance(new, dict) and not _is_record(old) and not _is_record(new):
        found: dict[str, tuple[str, str]] = {}
        for key in dict.fromkeys((*old, *new)):
            inner = f"{name}.{key}" if name else key
            missing = [side for side in (old, new) if key not in side]
            if missing:
                found[inner] = (_told(old.get(key, NOTHING)), _told(new.get(key, NOTHING)))
            else:
                found.update(differences(old[key], new[key], inner))
        return found
    # Compare lists item by item
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 0:
        if any(isinstance(item, (dict, list)) for item in (*old, *new)):
            return {
                k: v
                for i, (a, b) in enumerate(zip(old, new))
                for k, v in differences(a, b, f"{name}[{i}]").items()
            }
    return {} if _same(old, new) else {name: (_told(old), _told(new))}


NOTHING = type("NothingType", (), {"__repr__": lambda self: "nothing"})()


def _is_record(value: Print) -> bool:
    return isinstance(value, dict) and "sum" in value and "each" in value


def _same(old: Print, new: Print) -> bool:
    """Whether two plain values are the same, numbers to within rounding."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-12) or old != old and new != new
    return type(old) is type(new) and bool(old == new)


#: How far sums may be apart, relative to the length of the array, in double and in single precision.
ROUNDING = {"float32": 1e-4, "complex64": 1e-4, "float16": 1e-2}


def _same_numbers(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two arrays are the same, to within rounding."""
    kinds = [{key: side.get(key) for key in ("array", "field", "mesh", "shape")} for side in (old, new)]
    if kinds[0] != kinds[1]:
        return False
    tolerance = ROUNDING.get(old.get("array") or old.get("field") or "", 1e-10)
    return any(
        old[key] is not None and new[key] is not None and _near(old[key], new[key], tolerance)
        for key in ("sum", "each")
    )


def _near(old: list[float], new: list[float], tolerance: float) -> bool:
    count, square = old[0], max(abs(old[2]), abs(new[2]))
    length = math.sqrt(square) if square >= 0 else math.nan
    scales = [
        0,
        math.sqrt(count) * length,
        square,
        *(max(length, abs(a), abs(b)) for a, b in zip(old[3:], new[3:])),
    ]
    return all(
        a == b or a != a and b != b or abs(a - b) <= tolerance * scale
        for a, b, scale in zip(old, new, scales)
    )


def _told(value: Print) -> str:
    """A value of a fingerprint in a few words."""
    if not _is_record(value):
        if isinstance(value, dict) and "type" in value:
            return str(value["type"])
        text = repr(value)
        return text if len(text) < 80 else f"{text[:77]}..."
    if "values" in value:
        return str(value["values"])
    count, total, square = (value["each"] or value["sum"])[:3]
    count = max(count, 1)
    kind = value.get("array") or f"field of {value['field']}"
    shape = "x".join(map(str, value.get("mesh") or [int(count)]))
    return f"{kind} of {shape} numbers, mean {total / count:.6g}, rms {math.sqrt(abs(square) / count):.6g}"


def _told_apart(old: Print, new: Print) -> tuple[str, str]:
    texts = _told(old), _told(new)
    if texts[0] != texts[1]:
        return texts
    return f"{texts[0]}, weighted sum {old['sum'][3]!r}", f"{texts[1]}, weighted sum {new['sum'][3]!r}"
