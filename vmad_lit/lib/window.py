"""Compiled window functions: particles to meshes and back, with all first and second derivatives.

A mesh is the part of a periodic mesh that this process holds, as pmesh lays it out: ``transform``
(a :class:`pmesh.window.Affine`, or anything with ``scale``, ``translate`` and ``period``) maps a
position to the mesh by ``pos * scale + translate``, indices are folded with ``period`` (0 for an
axis that is not periodic), and what then falls outside the array is left out.

What is computed for particles has the dtype of their positions, float32 or float64, and what is added to a mesh
is rounded to that of the mesh. Positions may be displacements from a ``lattice``: then the sum of both is
taken in float64, in the loop, so that a large box takes no digits from small displacements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from math import floor
from typing import Any, Protocol

import numpy
from numpy.typing import ArrayLike

from vmad_lit.core.error import needed_for
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.lib import memory
from vmad_lit.lib.cells import gather_loop, is_straight, scatter_loop
from vmad_lit.lib.compiled import compiled, inlined
from vmad_lit.lib.memory import as_flat, flatten, overlap
from vmad_lit.lib.threads import get_threads, run_on_threads, set_threads, share_out
from vmad_lit.lib.window_loops import BOX, DType, DTypes, array_of, fold_cell, offsets, spline
from vmad_lit.lib.window_loops import general_gather_loop, general_scatter_loop

with needed_for("compiled loops", extra="fast"):
    from numba import float64, int64, uint64, uintp

Mesh = Any  # an array, or a field that has one as its `value`
WindowLike = Any  # the name of a window, or pmesh's object
Box = tuple[tuple[Any, ...], ...]  # see `_box`
View = tuple[Array, Shape]  # flat memory, and strides in elements


class Transform(Protocol):
    """From positions to cells: `pos * scale + translate`, folded with `period`."""

    scale: Any
    translate: Any
    period: Any


#: Number of cells that each window covers along an axis.
SUPPORT = {"nnb": 1, "cic": 2, "tsc": 3, "pcs": 4}

#: The period of an axis that is not periodic: an index that no cell has.
NEVER = 1 << 62

#: Meshes that go through a loop together.
TOGETHER = 4

#: Particles in a block of the census.
BLOCK = 1024


@lru_cache(maxsize=None)
def _census_loop(position: DType, lattice: DType) -> Any:
    """The compiled loop that finds for blocks of particles the owners whose planes they may touch."""

    # The loop that takes the census
    def census(
        support, scale, translate, origin, period, owners, start, end, mask, block, pos, step, lattice
    ):
        npart, displaced = len(pos) // step, len(lattice) > 0
        nplane = len(owners)
        everyone = uint64(0)
        for bit in owners:
            everyone |= bit
        for b in range(start, end):
            # Find the range of the block along the slow axis
            low, high, odd = numpy.inf, -numpy.inf, 0.0
            for p in range(b * block, min(npart, (b + 1) * block)):
                x = float64(pos[uintp(p * step)])
                if displaced:
                    x += lattice[uintp(p * step)]
                x *= scale
                low = min(low, x)
                high = max(high, x)
                odd += x - x
            # Mark the owners of the planes between
            bits = everyone
            if 0 <= high - low + odd < nplane - support - 2:
                bits = uint64(0)
                first = floor(low + translate) - support + origin
                last = floor(high + translate) + support + origin
                for i in range(first, last + 1):
                    plane = fold_cell(i, period)
                    if plane < nplane:
                        bits |= owners[uintp(plane)]
            mask[b] = bits

    axis = float64, float64, int64, int64
    places = uint64[::1], int64, int64, uint64[::1], int64
    return compiled(census, int64, *axis, *places, array_of(position), int64, array_of(lattice))


def owners_of_blocks(cells: int, box: Box, pos: Array, step: int, lattice: Array) -> tuple[list[int], Array]:
    """Edges of the planes owned by each thread, and for each block of particles the owners it touches."""
    nplane = box[0][0]
    nblock = -(-(len(pos) // step) // BLOCK)
    edges = share_out(nplane, cells + 2)
    if len(edges) == 2 or nblock < 2 * (len(edges) - 1):
        return [0, nplane], numpy.ones(nblock, dtype="u8")
    # Take the census of the blocks
    mask = numpy.zeros(nblock, dtype="u8")
    bits = numpy.uint64(1) << numpy.arange(len(edges) - 1, dtype="u8")
    owners = numpy.repeat(bits, numpy.diff(edges))
    cuts = share_out(nblock, 1)
    axis = tuple(values[0] for values in box[2:])
    census, tail = _census_loop(pos.dtype, lattice.dtype), (mask, BLOCK, pos, step, lattice)
    run_on_threads(
        census, [(cells, *axis, owners, cuts[t], cuts[t + 1], *tail) for t in range(len(cuts) - 1)]
    )
    return edges, mask


def check_positions(pos: ArrayLike, ndim: int) -> Array:
    """`pos` as a C-ordered native float32 or float64 array of shape (N, ndim) or wider.

    Integers become float64. Raises ValueError for a wrong shape, TypeError for what is not a real number.
    """
    if isinstance(pos, numpy.ma.MaskedArray):
        raise TypeError("positions must be an array without a mask: the mask would be forgotten")
    pos = numpy.asarray(pos)
    if pos.ndim != 2 or pos.shape[1] < ndim:
        raise ValueError(
            f"positions must have the shape (N, {ndim}), one row for each particle, "
            f"but their shape is {pos.shape}"
        )
    return numpy.require(pos, _real_dtype(pos, "positions"), ["C", "A"])


def _real_dtype(array: Array, what: str) -> DType:
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "fiub":
        raise TypeError(f"{what} must be real numbers, but their type is {array.dtype}")
    return numpy.dtype("f4" if kind == "f" and size <= 4 else "f8")


def _dtype_of(pos: ArrayLike, *values: Any) -> DType:
    """The type of what is computed for particles: that of their positions, or a wider one of given arrays."""
    kinds = {_real_dtype(numpy.asarray(value), "a value") for value in values if numpy.ndim(value)}
    return max(kinds | {_real_dtype(numpy.asarray(pos), "positions")}, key=lambda dtype: dtype.itemsize)


def check_lattice(lattice: ArrayLike | None, pos: Array) -> Array | None:
    """What is added to each position, as `check_positions` returns it; None if there is nothing to add."""
    if lattice is None:
        return None
    if numpy.shape(lattice) != pos.shape:
        raise ValueError(
            f"the lattice must have a row for each particle, as the positions {pos.shape}, "
            f"but its shape is {numpy.shape(lattice)}"
        )
    return check_positions(lattice, pos.shape[1])


def _flat_lattice(lattice: Any, pos: Array) -> Array:
    """A lattice for loops: flat memory, or none."""
    return numpy.empty(0, pos.dtype) if lattice is None else flatten(lattice)


def _per_particle(
    value: ArrayLike, npart: int, what: str, dtype: DType, width: int | None = None
) -> tuple[Array, int]:
    """A value for each particle (or one for all) as flat memory of numbers of a type, and its step (0 for one)."""
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError(f"{what} must be an array without a mask: the mask would be forgotten")
    value = numpy.asarray(value)
    _real_dtype(value, what)
    if value.ndim == 0:
        return numpy.full(width or 1, value, dtype), 0
    shape = (npart,) if width is None else (npart, width)
    if value.shape != shape:
        raise ValueError(
            f"{what} must be one number or have the shape {shape}, but the shape is {value.shape}"
        )
    return flatten(numpy.require(value, dtype, ["C", "A"])), width or 1


def support(window: WindowLike) -> int | None:
    """The support of a window that is served here, by name or as pmesh's object, else None."""
    if isinstance(window, str):
        return SUPPORT.get(window.lower())
    kind = str(getattr(window, "kind", ""))
    if kind.startswith("tuned") and kind[5:] in SUPPORT:
        cells = SUPPORT[kind[5:]]
        if getattr(window, "support", cells) in (cells, -1):
            return cells
    return None


def _find_support(window: WindowLike) -> int:
    found = support(window)
    if found is None:
        raise ValueError(
            f"window must be one of {', '.join(SUPPORT)}, not {window!r}; other windows are painted by pmesh"
        )
    return found


def _box(mesh: Array, transform: Transform | None) -> Box:
    """Shape, stride, scale, translation (below one), origin and period of a mesh, each for three axes."""
    shape, ndim = mesh.shape, mesh.ndim
    if not 1 <= ndim <= 3:
        raise ValueError(f"meshes have 1, 2 or 3 dimensions, not {ndim}")
    if transform is None:
        scale, translate, period = (1.0,) * ndim, (0.0,) * ndim, shape
    else:
        scale, translate, period = transform.scale, transform.translate, transform.period
    # Refuse a geometry that makes no sense
    if (
        not len(scale) == len(translate) == len(period) == ndim
        or not numpy.isfinite([*scale, *translate]).all()
    ):
        raise ValueError(
            f"the transform must have {ndim} finite scales and translations, and as many periods"
        )
    if not all(n == 0 or n >= 1 and int(n) == n for n in period):
        raise ValueError(
            f"periods must be whole numbers of cells, or 0 for an axis without, not {list(period)}"
        )
    # Split whole cells off the translation
    origin = [floor(t) for t in translate]
    more = 3 - ndim
    return (
        tuple(map(int, shape)) + (1,) * more,
        tuple(stride // mesh.itemsize for stride in mesh.strides) + (0,) * more,
        tuple(map(float, scale)) + (1.0,) * more,
        tuple(float(t - i) for t, i in zip(translate, origin)) + (0.0,) * more,
        tuple(map(int, origin)) + (0,) * more,
        tuple(int(n) or NEVER for n in period) + (1,) * more,
    )


def _asked(box: Box) -> int:
    """Along how many axes, the first ones, cells of the periodic mesh may be elsewhere: none, one, or all."""
    shape, period = box[0], box[-1]
    return 0 if shape == period else 1 if shape[1:] == period[1:] else 3


def _mesh(mesh: Mesh) -> Array:
    """The values of an array or field, the real part of complex ones."""
    value = getattr(mesh, "value", mesh)
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError("a mesh must be an array without a mask: the mask would be forgotten")
    value = numpy.asarray(value)
    if value.dtype.kind not in "fciub":
        raise TypeError(f"a mesh must be of numbers, not of {value.dtype}")
    return value.real if value.dtype.kind == "c" else value


def _targets(meshes: Any) -> list[Array]:
    """The values of meshes that are added to, in place; an error if their memory cannot be written to."""
    for mesh in meshes:
        value = getattr(mesh, "value", mesh)
        if not isinstance(value, numpy.ndarray) or value.dtype.kind not in "fc":
            found = f"an array of {value.dtype}" if isinstance(value, numpy.ndarray) else type(mesh).__name__
            raise TypeError(
                f"a mesh to paint must be an array of floating point numbers, or a field, not {found}"
            )
        if not value.flags.writeable:
            raise ValueError("a mesh to paint is read-only; paint a copy of it")
    return _meshes(meshes)


def _meshes(meshes: Sequence[Mesh]) -> list[Array]:
    values = [_mesh(mesh) for mesh in meshes]
    if not values:
        raise ValueError("at least one mesh is needed")
    if any(value.shape != values[0].shape for value in values):
        raise ValueError(f"the meshes must have one shape, not {[value.shape for value in values]}")
    return values


def _views(meshes: Sequence[Array]) -> list[View] | None:
    """Meshes as flat memory with strides, if all lie in memory in the same way; or None."""
    views = [as_flat(mesh) for mesh in meshes]
    alike = all(v and v[1] == views[0][1] and v[0].dtype == views[0][0].dtype for v in views)
    return views if alike else None


def _readable(meshes: Sequence[Array]) -> tuple[Array, list[View]]:
    """The first of meshes that lie in memory alike, and the views of all: those given, or else copies."""
    views = _views(meshes)
    if views is None:
        meshes = [numpy.require(mesh, "f8", ["C", "A"]) for mesh in meshes]
        views = [as_flat(mesh) for mesh in meshes]
    return meshes[0], views


def _groups(views: Sequence[View]) -> Iterator[tuple[int, int, list[Array]]]:
    """Where each group of meshes begins, how many they are, and their flat arrays, always four."""
    for first in range(0, len(views), TOGETHER):
        flats = [flat for flat, _ in views[first : first + TOGETHER]]
        yield first, len(flats), flats + flats[:1] * (TOGETHER - len(flats))


def _check_sizes(npart: int, **arrays: tuple[Array | None, int, int]) -> None:
    """Raise ValueError unless flat arrays are as long as a loop over particles takes for granted.

    For each its step, 0 for the same numbers for all particles, and how many numbers the loop takes of a row.
    """
    for name, (array, step, count) in arrays.items():
        if array is not None and (step not in (0, count) or array.size != (npart * step if step else count)):
            raise ValueError(
                f"{name} must have {count} numbers for each of {npart} particles, not {array.size} in all"
            )


def _apart(array: Any, *written: Array) -> Any:
    """An array that is read, as memory apart from what is written."""
    return array.copy() if isinstance(array, numpy.ndarray) and overlap(array, *written) else array


def _scatter(
    meshes: Sequence[Array],
    pos: Array,
    mass: Array,
    mass_step: int,
    window: WindowLike,
    transform: Transform | None,
    speed: Array | None = None,
    rate: float = 1.0,
    spreading: bool = False,
    lattice: ArrayLike | None = None,
) -> None:
    """Add to each of `meshes` the window of each particle times its column of `mass`, and its change along
    `rate` times `speed`; or (`spreading`) the column times the change of the window along `speed`."""
    cells = _find_support(window)
    ndim = meshes[0].ndim
    pos = check_positions(pos, ndim)
    pos, lattice, mass, speed = (_apart(a, *meshes) for a in (pos, check_lattice(lattice, pos), mass, speed))
    _check_sizes(len(pos), masses=(mass, mass_step, len(meshes)), velocities=(speed, ndim, ndim))
    box = _box(meshes[0], transform)
    if not len(pos) or not meshes[0].size:
        return
    views = _views(meshes)
    if views is None:
        # Paint aside what cannot be painted in place
        for c, mesh in enumerate(meshes):
            if mesh.dtype.kind != "f":
                raise TypeError(f"a mesh to paint must be of floating point numbers, not {mesh.dtype}")
            aside = numpy.zeros(mesh.shape, dtype="f8")
            column = numpy.ascontiguousarray(mass[c::mass_step]) if mass_step else mass[c : c + 1]
            where = window, transform, speed, rate, spreading, lattice
            _scatter([aside], pos, column, min(mass_step, 1), *where)
            mesh += aside
        return
    # Flatten what belongs to particles, and find the owners of planes
    step, moving = pos.shape[1], speed is not None
    pos, lattice = flatten(pos), _flat_lattice(lattice, pos)
    edges, mask = owners_of_blocks(cells, box, pos, step, lattice)
    speed, threads = mass[:0] if speed is None else speed, range(len(edges) - 1)
    if not spreading and is_straight(views, box, cells, ndim, step) and (not moving or len(meshes) == 1):
        # Scatter with the straight loop
        scatter = scatter_loop((views[0][0].dtype, pos.dtype, lattice.dtype, mass.dtype), len(views), moving)
        args = mask, BLOCK, pos, lattice, mass, mass_step, speed, float(rate)
        run_on_threads(scatter, [(views[0][0], box, edges[t], edges[t + 1], t, *args) for t in threads])
        return
    # Scatter with the general loop
    for first, n, flats in _groups(views):
        dtypes = flats[0].dtype, pos.dtype, lattice.dtype, mass.dtype
        scatter = general_scatter_loop(dtypes, ndim, cells, n, moving, spreading)
        rest = BLOCK, pos, step, lattice, mass[first:], mass_step, speed, float(rate)
        turns = [_turns(_asked(box), mask, t, len(threads) == 1) for t in threads]
        places = [(edges[t], edges[t + 1], t) for t in threads]
        run_on_threads(
            partial(_scatter_in_turns, scatter), [(turns[t], (*flats, box), places[t], rest) for t in threads]
        )


def _turns(asked: int, mask: Array, owner: int, alone: bool) -> list[tuple[int, Array]]:
    """Along how many axes to ask where cells are, for an owner, and the mask of the blocks for which it is so."""
    if asked > 0 or alone:
        return [(asked, mask)]
    mine = mask == numpy.uint64(1) << numpy.uint64(owner)
    return [(0, numpy.where(mine, mask, 0)), (1, numpy.where(mine, 0, mask))]


def _scatter_in_turns(
    scatter: Callable[..., object],
    turns: Sequence[tuple[int, Array]],
    meshes: tuple[Any, ...],
    place: tuple[Any, ...],
    rest: tuple[Any, ...],
) -> None:
    for asked, mask in turns:
        scatter(*meshes, asked, *place, mask, *rest)


def _gather(
    meshes: Sequence[Array],
    pos: Array,
    window: WindowLike,
    transform: Transform | None,
    out: Array | None = None,
    speed: Array | None = None,
    coef: Array | None = None,
    coef_step: int = 0,
    slope: Array | None = None,
    given: int | None = None,
    base: Array | None = None,
    factor: float = 1.0,
    lattice: ArrayLike | None = None,
) -> Array:
    """Fill `out` (N, n) with values, or changes along `speed`; return the slopes if `coef` is there.

    Both in one go only for a single mesh. The slopes fill `slope` (N, ndim), or a new array. There are
    coefficients for the first `given` meshes, by default for all; the others have one. With `base`, what comes
    out is that plus `factor` times the values, or else the slopes.
    """
    cells = _find_support(window)
    ndim = meshes[0].ndim
    written = [array for array in (out, slope) if array is not None]
    # Look at what is to be read and written
    pos = check_positions(pos, ndim)
    pos, lattice, coef, speed, *meshes = (
        _apart(a, *written) for a in (pos, check_lattice(lattice, pos), coef, speed, *meshes)
    )
    npart, step = pos.shape
    slopes, given = coef is not None, len(meshes) if given is None else given
    # Check the sizes of what is read and written
    width = ndim if slopes else len(meshes)
    _check_sizes(
        npart,
        results=(out, len(meshes), len(meshes)),
        velocities=(speed, ndim, ndim),
        slopes=(slope, ndim, ndim),
        factors=(coef, coef_step, given),
        base=(base, width, width),
    )
    if slope is None:
        like: Any = out if coef is None else coef
        slope = memory.empty((npart if slopes else 0, ndim), like.dtype)
    # Answer for no particles or no cells
    mesh, views = _readable(meshes)
    box = _box(mesh, transform)
    if not npart or not mesh.size:
        for result in (out, slope):
            if result is not None and len(result):
                result[...] = 0.0 if base is None else base
        return slope
    # Flatten what is read, and share out the particles
    pos, lattice = flatten(pos), _flat_lattice(lattice, pos)
    none = numpy.empty(0, slope.dtype if out is None else out.dtype)
    base = none if base is None else base.reshape(-1)
    cuts = share_out(npart, 4 * BLOCK)
    flat_out, flat_slope = (none if a is None else a.reshape(-1) for a in (out, slope))
    moving, speed = speed is not None, none if speed is None else speed
    coef = none if coef is None else coef
    if is_straight(views, box, cells, ndim, step):
        # Gather with the straight loop
        kind: Any = "slopes" if slopes else "changes" if moving else "values"
        gather = gather_loop((views[0][0].dtype, pos.dtype, lattice.dtype, none.dtype), len(views), kind)
        args = pos, lattice, flat_out, flat_slope, speed, coef, coef_step, given, base, float(factor)
        run_on_threads(gather, [(views[0][0], box, a, b, *args) for a, b in zip(cuts, cuts[1:])])
    else:
        # Gather with the general loop
        width = 0 if out is None else len(meshes)
        for first, n, flats in _groups(views):
            dtypes = flats[0].dtype, pos.dtype, lattice.dtype, none.dtype
            gather = general_gather_loop(dtypes, ndim, cells, n, moving, slopes)
            part = memory.empty_like(slope) if first else slope
            below = base[first:] if not slopes else none if first else base
            results = flat_out[first:], width, speed, part.reshape(-1)
            weights = coef[first:], coef_step, max(0, given - first), below, float(factor)
            rest = pos, step, lattice, *results, *weights
            run_on_threads(gather, [(*flats, box, _asked(box), a, b, *rest) for a, b in zip(cuts, cuts[1:])])
            if first and slopes:
                slope += part * factor if len(base) else part
    return slope


def paint(
    mesh: Mesh,
    pos: Array,
    mass: ArrayLike = 1.0,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    lattice: ArrayLike | None = None,
) -> Mesh:
    """Add particles to `mesh`, in place.

    Parameters
    ----------
    mesh : array or RealField, shape (n0, ...), float32 or float64
    pos : (N, ndim) positions; times ``transform.scale`` they are in cells
    mass : one number, or (N,)
    window : 'nnb', 'cic', 'tsc' or 'pcs', or pmesh's object
    transform : pmesh's Affine, or None for positions in cells on a periodic mesh
    lattice : (N, ndim), or None; the particles are at ``lattice + pos``, a sum that is taken in float64

    The other functions of this module take the last three likewise. Raises ValueError for shapes that do not
    fit, TypeError for what is not a real number, or a mesh that cannot be added to.

    Returns the mesh. A position that is not a number makes NaN of a few cells of the mesh (with 'nnb', it
    counts for one of them); it is never written beside the mesh.
    """
    targets = _targets([mesh])
    mass, step = _per_particle(mass, len(pos), "mass", _dtype_of_masses(targets, mass))
    _scatter(targets, pos, mass, step, window, transform, lattice=lattice)
    return mesh


def _dtype_of_masses(targets: Sequence[Array], *values: Any) -> DType:
    """The type of what particles add to meshes: that of the arrays that are given, or else of the meshes."""
    arrays = [value for value in values if numpy.ndim(value)]
    return _dtype_of(arrays[0], *arrays[1:]) if arrays else _real_dtype(targets[0], "the mesh")


def readout(
    meshes: Mesh | Sequence[Mesh],
    pos: Array,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    out: Array | None = None,
    base: ArrayLike | None = None,
    factor: float = 1.0,
    lattice: ArrayLike | None = None,
) -> Array:
    """Values of meshes at positions: (N,) for one mesh, (N, n) for a list of n, in the dtype of the positions.

    They fill `out` if it is given, a C-ordered array of that shape, in its dtype, float32 or float64. The
    particles are at ``lattice + pos`` if there is a lattice, see `paint`. With `base`, another such array or
    `out` itself, the result is base + factor * values. A position that is not a number gives NaN or the value
    of some cell of the mesh, never one of the memory around it.
    """
    several = isinstance(meshes, (list, tuple))
    values = _meshes(meshes if several else [meshes])
    out = _result(out, (len(pos), len(values)) if several else (len(pos),), _dtype_of(pos))
    rows, base = out.reshape(len(pos), len(values)), _base(base, out)
    _gather(values, pos, window, transform, out=rows, base=base, factor=factor, lattice=lattice)
    return out


def _result(out: Array | None, shape: tuple[int, ...], dtype: DType) -> Array:
    """`out`, if it is fit to hold a result of this shape, or a new array of a type."""
    if out is None:
        return memory.empty(shape, dtype)
    if (
        not isinstance(out, numpy.ndarray)
        or out.shape != shape
        or out.dtype not in ("f4", "f8")
        or not out.flags.carray
    ):
        found = f"{out.dtype} of shape {out.shape}" if isinstance(out, numpy.ndarray) else type(out).__name__
        raise ValueError(
            f"out must be a writeable C-ordered array of float32 or float64 of shape {shape}, not {found}"
        )
    return out


def _base(base: ArrayLike | None, out: Array) -> Array | None:
    """What the result is added to as memory like that of `out`; or None."""
    if base is None:
        return None
    if numpy.shape(base) != out.shape:
        raise ValueError(f"base must have the shape of the result, {out.shape}, not {numpy.shape(base)}")
    base = numpy.require(base, out.dtype, ["C", "A"])
    return flatten(base if base.ctypes.data == out.ctypes.data else _apart(base, out)).reshape(out.shape)


def gradient(
    mesh: Mesh,
    pos: Array,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    out: Array | None = None,
    lattice: ArrayLike | None = None,
) -> Array:
    """Derivatives of the value of a mesh at positions, along all axes: (N, ndim), in units of the mesh by length.

    Their dtype is that of the positions, or of `out` if it is given; `lattice` as in `paint`.
    """
    values = _meshes([mesh])
    out = _result(out, (len(pos), values[0].ndim), _dtype_of(pos))
    one = numpy.ones(1, out.dtype)
    return _gather(values, pos, window, transform, coef=one, slope=out, lattice=lattice)


def weighted_gradient(
    meshes: Sequence[Mesh],
    pos: Array,
    factors: ArrayLike | None = None,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    out: Array | None = None,
    base: ArrayLike | None = None,
    factor: float = 1.0,
    lattice: ArrayLike | None = None,
) -> Array:
    """The sum of the gradients of meshes at positions, each times its column of factors: (N, ndim).

    Its dtype is that of the positions, or of `out` if it is given. `factors` has a row for each particle and a
    column for each of the first meshes, or is one number for all of them; meshes beyond, or all if it is None,
    have the factor one. `out`, `base` and `factor` as in `readout`, `lattice` as in `paint`.
    """
    values = _meshes(list(meshes))
    out = _result(out, (len(pos), values[0].ndim), _dtype_of(pos))
    coef, step, given = _coefficients(factors, len(pos), len(values), out.dtype)
    weights: Any = dict(coef=coef, coef_step=step, given=given, base=_base(base, out), factor=factor)
    return _gather(values, pos, window, transform, slope=out, lattice=lattice, **weights)


def _coefficients(factors: Any, npart: int, count: int, dtype: DType) -> tuple[Array, int, int]:
    """The factors of `count` meshes as flat memory, their step, and for how many of the meshes they are."""
    given = 0 if factors is None else numpy.shape(factors)[-1] if numpy.ndim(factors) else count
    if given > count:
        raise ValueError(f"there are {given} columns of factors for {count} meshes")
    return (
        *(_per_particle(factors, npart, "factors", dtype, given) if given else (numpy.empty(0, dtype), 0)),
        given,
    )


def paint_vjp(
    mesh: Mesh,
    pos: Array,
    mass: ArrayLike = 1.0,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    need_pos: bool = True,
    need_mass: bool = True,
    lattice: ArrayLike | None = None,
) -> tuple[Array | None, Array | None]:
    """Cotangents of positions (N, ndim) and masses (N,) from the cotangent of the painted mesh.

    What is not needed comes back as None. With one mass for all, the second is still for each particle. Both
    have the dtype of the positions; `lattice` as in `paint`.
    """
    dtype = _dtype_of(pos)
    mass, step = _per_particle(mass, len(pos), "mass", dtype)
    _mass: Any = memory.empty((len(pos), 1), dtype) if need_mass else None
    coef = mass if need_pos else None
    _pos = _gather(_meshes([mesh]), pos, window, transform, _mass, coef=coef, coef_step=step, lattice=lattice)
    return (_pos if need_pos else None), (_mass[:, 0] if need_mass else None)


def _velocities(pos_: ArrayLike, npart: int, ndim: int, dtype: DType) -> Array:
    """The tangent of positions as flat memory with `ndim` numbers for each particle, also if it is one number."""
    speed, step = _per_particle(pos_, npart, "tangent of positions", dtype, ndim)
    return speed if step else numpy.tile(speed, npart)


def paint_jvp(
    mesh: Mesh,
    pos: Array,
    mass: Any = 1.0,
    pos_: ArrayLike | None = None,
    mass_: ArrayLike | None = None,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    lattice: ArrayLike | None = None,
) -> Mesh:
    """Add to `mesh` the tangent of painting along `pos_` (N, ndim) and `mass_` (N,); None is zero.

    The lattice, as in `paint`, stays where it is. Returns the mesh.
    """
    (value,) = _targets([mesh])
    dtype = _dtype_of_masses([value], mass, *(v for v in (pos_, mass_) if v is not None))
    change, step = _per_particle(0.0 if mass_ is None else mass_, len(pos), "tangent of mass", dtype)
    # Take the momenta, or velocities and a rate
    speed, rate = None, 1.0
    if pos_ is not None:
        speed = _velocities(pos_, len(pos), value.ndim, dtype)
        mass, mass_step = _per_particle(mass, len(pos), "mass", dtype)
        if mass_step:
            speed = (speed.reshape(-1, value.ndim) * mass[:, None]).reshape(-1)
        else:
            rate = float(mass[0])
    if pos_ is not None or mass_ is not None:
        _scatter([value], pos, change, step, window, transform, speed, rate, lattice=lattice)
    return mesh


def readout_vjp(
    meshes: Any,
    pos: Array,
    value: ArrayLike,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    out: Any = None,
    need_pos: bool = True,
    lattice: ArrayLike | None = None,
) -> Array | None:
    """Cotangents of `readout(meshes, pos)` from that of its result, `value`: (N,) or (N, n).

    The meshes' cotangents are added to `out` (a mesh, or a list of n); without it they are not computed.
    Returns the positions' cotangent (N, ndim), or None if it is not needed. For that alone the meshes
    themselves are used, so that they may be None otherwise. The result has the dtype of the positions;
    `lattice` as in `paint`.
    """
    several = isinstance(meshes if meshes is not None else out, (list, tuple))
    width = len(meshes if meshes is not None else out) if several else None
    coef, step = _per_particle(value, len(pos), "cotangent of the values", _dtype_of(pos), width)
    if out is not None:
        targets = _targets(out if several else [out])
        _scatter(targets, pos, coef, step, window, transform, lattice=lattice)
    if not need_pos:
        return None
    values = _meshes(meshes if several else [meshes])
    return _gather(values, pos, window, transform, coef=coef, coef_step=step, lattice=lattice)


def readout_jvp(
    meshes: Any,
    pos: Array,
    pos_: ArrayLike | None = None,
    meshes_: Any = None,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    lattice: ArrayLike | None = None,
) -> Array:
    """Tangent of `readout(meshes, pos)` along `pos_` (N, ndim) and `meshes_`, as a readout; None is zero.

    The result has the dtype of the positions; the lattice, as in `paint`, stays where it is.
    """
    # Count the meshes of a readout
    several = isinstance(meshes if meshes is not None else meshes_, (list, tuple))
    width = len(meshes if meshes is not None else meshes_) if several else 1
    if meshes is not None and meshes_ is not None and (len(meshes_) if several else 1) != width:
        raise ValueError(f"there are {width} meshes, and {len(meshes_)} tangents of meshes")
    dtype = _dtype_of(pos)
    out = memory.empty((len(pos), width), dtype)
    # Gather the two terms of the tangent
    gather = partial(_gather, pos=pos, window=window, transform=transform, out=out, lattice=lattice)
    if pos_ is not None:
        values = _meshes(meshes if several else [meshes])
        gather(values, speed=_velocities(pos_, len(pos), values[0].ndim, dtype))
    if meshes_ is not None:
        gather(_meshes(meshes_ if several else [meshes_]), base=None if pos_ is None else out)
    elif pos_ is None:
        out.fill(0)
    return out if several else out[:, 0]


@inlined
def spline_curvatures(support, x):
    """The second derivatives of the B-spline of this support at `x`, in the cells of `_spline`."""
    if support == 3:
        return 1.0, -2.0, 1.0, 0.0
    if support == 4:
        u = x - numpy.floor(x)
        return 1.0 - u, 3.0 * u - 2.0, 1.0 - 3.0 * u, u
    return 0.0, 0.0, 0.0, 0.0


@lru_cache(maxsize=None)
def _hessian_product_loop(dtypes: DTypes, ndim: int, support: int, n: int) -> Any:
    """The compiled loop that adds the Hessians of `n` meshes, with coefficients, times a velocity to `slope`."""
    support1 = support if ndim > 1 else 1
    support2 = support if ndim > 2 else 1
    moving = True

    # The loop that multiplies by Hessians
    def hessian_product(
        mesh0,
        mesh1,
        mesh2,
        mesh3,
        box,
        asked,
        start,
        end,
        pos,
        step,
        lattice,
        speed,
        slope,
        coef,
        coef_step,
        given,
    ):
        shape, stride, scale, translate, origin, period = box
        low, high, displaced = 0, shape[0], len(lattice) > 0
        for p in range(start, end):
            # Multiply the velocity of one particle by the Hessian
            # Locate the particle on each axis
            x = float64(pos[uintp(p * step)])
            if displaced:
                x += lattice[uintp(p * step)]
            x = x * scale[0] + translate[0]
            i, wx, dx = spline(support, x)
            cx = offsets(i + origin[0], period[0], low, high, stride[0], asked < 1)
            # Locate the particle on the second axis
            if ndim > 1:
                y = float64(pos[uintp(p * step + 1)])
                if displaced:
                    y += lattice[uintp(p * step + 1)]
                y = y * scale[1] + translate[1]
                i, wy, dy = spline(support1, y)
                cy = offsets(i + origin[1], period[1], 0, shape[1], stride[1], asked < 2)
            else:
                cy, wy, dy = (0, 0, 0, 0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)
            # Locate the particle on the third axis
            if ndim > 2:
                z = float64(pos[uintp(p * step + 2)])
                if displaced:
                    z += lattice[uintp(p * step + 2)]
                z = z * scale[2] + translate[2]
                i, wz, dz = spline(support2, z)
                cz = offsets(i + origin[2], period[2], 0, shape[2], stride[2], asked < 3)
            else:
                cz, wz, dz = (0, 0, 0, 0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)
            # Take the second derivatives of the weights
            bx = spline_curvatures(support, x)
            by = bz = (0.0, 0.0, 0.0, 0.0)
            if ndim > 1:
                by = spline_curvatures(support1, y)
            if ndim > 2:
                bz = spline_curvatures(support2, z)
            # Take the velocity of the particle
            vx = vy = vz = 0.0
            if moving:
                vx = speed[uintp(p * ndim)] * scale[0]
                vy = speed[uintp(p * ndim + 1)] * scale[1] if ndim > 1 else 0.0
                vz = speed[uintp(p * ndim + 2)] * scale[2] if ndim > 2 else 0.0
            # Take the coefficients of the meshes
            first = p * coef_step
            k0 = coef[uintp(first)] if given > 0 else 1.0
            k1 = (coef[uintp(first + 1)] if given > 1 else 1.0) if n > 1 else 0.0
            k2 = (coef[uintp(first + 2)] if given > 2 else 1.0) if n > 2 else 0.0
            k3 = (coef[uintp(first + 3)] if given > 3 else 1.0) if n > 3 else 0.0
            xx = xy = xz = yy = yz = zz = 0.0
            for ia in range(support):
                if asked > 0 and cx[ia] < 0:
                    continue
                # Reduce a plane of cells to six numbers
                r = ry = rz = ryy = ryz = rzz = 0.0
                for ib in range(support1):
                    if asked > 1 and cy[ib] < 0:
                        continue
                    first = cx[ia] + cy[ib]
                    q = qz = qzz = 0.0
                    for ic in range(support2):
                        if asked > 2 and cz[ic] < 0:
                            continue
                        i = uintp(first + cz[ic])
                        # Value of the cell, summed over the meshes
                        v = float(mesh0[i])
                        if n > 1:
                            v = k0 * v + k1 * mesh1[i]
                        if n > 2:
                            v += k2 * mesh2[i]
                        if n > 3:
                            v += k3 * mesh3[i]
                        q += v * wz[ic]
                        qz += v * dz[ic]
                        qzz += v * bz[ic]
                    # Add a row of cells
                    r += q * wy[ib]
                    ry += q * dy[ib]
                    rz += qz * wy[ib]
                    ryy += q * by[ib]
                    ryz += qz * dy[ib]
                    rzz += qzz * wy[ib]
                # Add a plane of cells to the Hessian
                xx += r * bx[ia]
                xy += ry * dx[ia]
                xz += rz * dx[ia]
                yy += ryy * wx[ia]
                yz += ryz * wx[ia]
                zz += rzz * wx[ia]
            # Hand out the product with the velocity
            if n == 1:
                vx, vy, vz = k0 * vx, k0 * vy, k0 * vz
            slope[uintp(p * ndim)] += (xx * vx + xy * vy + xz * vz) * scale[0]
            if ndim > 1:
                slope[uintp(p * ndim + 1)] += (xy * vx + yy * vy + yz * vz) * scale[1]
            if ndim > 2:
                slope[uintp(p * ndim + 2)] += (xz * vx + yz * vy + zz * vz) * scale[2]

    mesh, position, lattice, reals = map(array_of, dtypes)
    particles = position, int64, lattice, reals, reals, reals, int64, int64
    return compiled(hessian_product, *4 * [mesh], BOX, int64, int64, int64, *particles)


def _hessian_product(
    meshes: Sequence[Array],
    pos: Array,
    coef: Array,
    coef_step: int,
    given: int,
    speed: Array,
    slope: Array,
    window: WindowLike,
    transform: Transform | None,
    lattice: ArrayLike | None,
) -> None:
    """Add to `slope` (N, ndim) the Hessians of meshes, with coefficients for the first `given`, times `speed`."""
    cells = _find_support(window)
    ndim = meshes[0].ndim
    pos = check_positions(pos, ndim)
    lattice = check_lattice(lattice, pos)
    npart, step = pos.shape
    sizes = dict(factors=(coef, coef_step, given), velocities=(speed, ndim, ndim), slopes=(slope, ndim, ndim))
    _check_sizes(npart, **sizes)
    mesh, views = _readable(meshes)
    box = _box(mesh, transform)
    if not npart or not mesh.size:
        return
    pos, lattice = flatten(pos), _flat_lattice(lattice, pos)
    # Add the products of each group of meshes
    cuts = share_out(npart, 4 * BLOCK)
    for first, n, flats in _groups(views):
        loop = _hessian_product_loop((flats[0].dtype, pos.dtype, lattice.dtype, slope.dtype), ndim, cells, n)
        weights = coef[first:], coef_step, max(0, given - first)
        args = pos, step, lattice, speed, slope.reshape(-1), *weights
        run_on_threads(loop, [(*flats, box, _asked(box), a, b, *args) for a, b in zip(cuts, cuts[1:])])


def weighted_gradient_jvp(
    meshes: Any,
    pos: Array,
    factors: ArrayLike | None = None,
    pos_: ArrayLike | None = None,
    meshes_: Sequence[Mesh] | None = None,
    factors_: ArrayLike | None = None,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    lattice: ArrayLike | None = None,
) -> Array:
    """Tangent of `weighted_gradient(meshes, pos, factors)` along `pos_` (N, ndim), `meshes_`, and `factors_`; None is zero.

    `factors_` is shaped as the factors. The meshes may be None if neither positions nor factors change. The
    result (N, ndim) has the dtype of the positions; `lattice` as in `paint`.
    """
    dtype, where = _dtype_of(pos), dict(window=window, transform=transform, lattice=lattice)
    # Take the slopes of the changed meshes
    if meshes_ is None:
        slope = memory.zeros((len(pos), _meshes(list(meshes))[0].ndim), dtype)
    else:
        slope = weighted_gradient(meshes_, pos, factors, **where)
    # Take the slopes with the changed factors
    if factors_ is not None:
        count = numpy.shape(factors_)[-1] if numpy.ndim(factors_) else len(meshes)
        slope += weighted_gradient(list(meshes)[:count], pos, factors_, **where)
    # Take the curvature along the positions
    if pos_ is not None:
        values = _meshes(list(meshes))
        speed = _velocities(pos_, len(pos), values[0].ndim, dtype)
        coefficients = _coefficients(factors, len(pos), len(values), dtype)
        _hessian_product(values, pos, *coefficients, speed, slope, **where)
    return slope


def spread_jvp(
    out: Sequence[Mesh],
    pos: Array,
    value: ArrayLike,
    pos_: ArrayLike,
    window: WindowLike = "cic",
    transform: Transform | None = None,
    lattice: ArrayLike | None = None,
) -> Sequence[Mesh]:
    """Add to the n meshes of `out` the change along `pos_` of what `readout_vjp` adds for `value` (N, n).

    `lattice` as in `paint`. Returns `out`.
    """
    targets = _targets(out)
    dtype = _dtype_of(pos)
    mass, step = _per_particle(value, len(pos), "cotangent of the values", dtype, len(targets))
    speed = _velocities(pos_, len(pos), targets[0].ndim, dtype)
    _scatter(targets, pos, mass, step, window, transform, speed, spreading=True, lattice=lattice)
    return out
