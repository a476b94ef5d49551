"""The commonest window in straight code: cloud in cell, in three dimensions, on one mesh, or on three or four side by side.

It does what the loops of `window` do for all windows, in less time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy

from vmad_lit.core.error import needed_for
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.lib.compiled import compiled, inlined, inner
from vmad_lit.lib.vectors import (
    add,
    add_integers,
    all_within,
    between,
    choose,
    columns,
    convert,
    floors,
    fold,
)
from vmad_lit.lib.vectors import follow, join, load, load_some, multiply, multiply_add, pack, part, pointer
from vmad_lit.lib.vectors import room, store, subtract, sums, times_stride, where_within
from vmad_lit.lib.window_loops import BOX, array_of, fold_cell

with needed_for("compiled loops", extra="fast"):
    from numba import float64, int64, uint64, uintp

Kind = Literal["values", "changes", "slopes"]

#: Particles that are located together; and how many numbers that makes, in three and five columns.
GROUP, THREE, FIVE = 8, 24, 40


def is_straight(views: Sequence[tuple[Array, Shape]], box: Any, support: int, ndim: int, step: int) -> bool:
    """Whether the loops of this module serve for meshes, seen as flat memory with strides, with this geometry."""
    shape, stride, *_, period = box
    first, n = views[0][0], len(views)
    return (
        support == 2
        and ndim == step == 3
        and n in (1, 3, 4)
        and stride[2] == n
        and shape[1:] == period[1:]
        and max(*stride, *period) < 1 << 31
        and all(
            flat.ctypes.data == first.ctypes.data + c * first.itemsize for c, (flat, _) in enumerate(views)
        )
    )


@inlined
def _locate(cells, parts, pos, lattice, displaced, first, count, box, low, high, n):
    """Cells of particles, and how far they are into them.

    Of each particle `cells` has the offsets of its two planes, -1 for one that is not among the planes `low` to
    `high`; those of the first cells of its two rows in a plane; and from there to the second cells.
    """
    shape, stride, scale, translate, origin, period = box
    done = False
    if count == GROUP:
        # Locate eight particles
        # Take the positions of eight particles, in cells
        i, j, k = uintp(3 * first), uintp(3 * first + GROUP), uintp(3 * first + 2 * GROUP)
        x, y, z = columns(load(pos, i, GROUP), load(pos, j, GROUP), load(pos, k, GROUP))
        x, y, z = convert(x, float64), convert(y, float64), convert(z, float64)
        if displaced:
            qx, qy, qz = columns(load(lattice, i, GROUP), load(lattice, j, GROUP), load(lattice, k, GROUP))
            x, y, z = add(x, convert(qx, float64)), add(y, convert(qy, float64)), add(z, convert(qz, float64))
        x = multiply_add(x, scale[0], translate[0])
        y = multiply_add(y, scale[1], translate[1])
        z = multiply_add(z, scale[2], translate[2])
        bx, by, bz = floors(x), floors(y), floors(z)
        ix = fold(add(bx, origin[0]), period[0])
        iy = fold(add(by, origin[1]), period[1])
        iz = fold(add(bz, origin[2]), period[2])
        if all_within(ix, period[0]) and all_within(iy, period[1]) and all_within(iz, period[2]):
            done = True
            # Keep the cells of eight particles
            store(parts, uintp(0), convert(subtract(x, bx), parts), GROUP)
            store(parts, uintp(GROUP), convert(subtract(y, by), parts), GROUP)
            store(parts, uintp(2 * GROUP), convert(subtract(z, bz), parts), GROUP)
            jx, jy, jz = follow(ix, period[0]), follow(iy, period[1]), follow(iz, period[2])
            begin, end = float64(low), float64(high)
            store(cells, uintp(0), where_within(ix, begin, end, times_stride(ix, stride[0])), GROUP)
            # Keep the offsets of eight particles
            store(cells, uintp(GROUP), where_within(jx, begin, end, times_stride(jx, stride[0])), GROUP)
            inside = times_stride(iz, n)
            store(cells, uintp(2 * GROUP), add_integers(times_stride(iy, stride[1]), inside), GROUP)
            store(cells, uintp(3 * GROUP), add_integers(times_stride(jy, stride[1]), inside), GROUP)
            store(cells, uintp(4 * GROUP), times_stride(subtract(jz, iz), n), GROUP)
    if not done:
        for k in range(count):
            _locate_one(cells, parts, k, pos, lattice, displaced, first + k, box, low, high, n)


@inner
def _locate_one(cells, parts, k, pos, lattice, displaced, p, box, low, high, n):
    """What `_locate` does for a particle, wherever it is."""
    shape, stride, scale, translate, origin, period = box
    i, j, m = uintp(3 * p), uintp(3 * p + 1), uintp(3 * p + 2)
    x, y, z = float64(load(pos, i, 1)), float64(load(pos, j, 1)), float64(load(pos, m, 1))
    if displaced:
        x, y, z = x + load(lattice, i, 1), y + load(lattice, j, 1), z + load(lattice, m, 1)
    x, y, z = x * scale[0] + translate[0], y * scale[1] + translate[1], z * scale[2] + translate[2]
    bx, by, bz = numpy.floor(x), numpy.floor(y), numpy.floor(z)
    # Keep the cells of one particle
    store(parts, uintp(k), convert(x - bx, parts), 1)
    store(parts, uintp(GROUP + k), convert(y - by, parts), 1)
    store(parts, uintp(2 * GROUP + k), convert(z - bz, parts), 1)
    ix = fold_cell(int64(bx) + origin[0], period[0])
    iy = fold_cell(int64(by) + origin[1], period[1])
    iz = fold_cell(int64(bz) + origin[2], period[2])
    jx = ix + 1 if ix + 1 < period[0] else 0
    jy = iy + 1 if iy + 1 < period[1] else 0
    jz = iz + 1 if iz + 1 < period[2] else 0
    # Keep the offsets of one particle
    store(cells, uintp(k), int64(ix * stride[0] if low <= ix < high else -1), 1)
    store(cells, uintp(GROUP + k), int64(jx * stride[0] if low <= jx < high else -1), 1)
    store(cells, uintp(2 * GROUP + k), int64(iy * stride[1] + iz * n), 1)
    store(cells, uintp(3 * GROUP + k), int64(jy * stride[1] + iz * n), 1)
    store(cells, uintp(4 * GROUP + k), int64((jz - iz) * n), 1)


@lru_cache(maxsize=None)
def gather_loop(dtypes: tuple[Any, ...], n: int, kind: Kind) -> Any:
    """The compiled loop that reads `n` meshes, their changes along a velocity, or the sum of their slopes.

    `dtypes` are those of the meshes, the positions, the lattice, and what particles have.
    """
    pair, values, slopes = 2 * n, kind == "values", kind == "slopes"

    # The straight loop that gathers
    def gather(mesh, box, start, end, pos, lattice, out, slope, speed, coef, coef_step, given, base, factor):
        shape, stride, scale, translate, origin, period = box
        cells, parts, displaced, added = room(int64, FIVE), room(mesh, THREE), len(lattice) > 0, len(base) > 0
        at, q, A, to, slope_to = pointer(pos), pointer(lattice), pointer(mesh), pointer(out), pointer(slope)
        speeds, coefs, bases = pointer(speed), pointer(coef), pointer(base)
        for first in range(start, end, GROUP):
            count = min(GROUP, end - first)
            _locate(cells, parts, at, q, displaced, first, count, box, 0, shape[0], n)
            for k in range(count):
                p = first + k
                # Gather one particle
                # Look up the cells of the particle
                x0, x1 = load(cells, uintp(k), 1), load(cells, uintp(GROUP + k), 1)
                y0, y1 = load(cells, uintp(2 * GROUP + k), 1), load(cells, uintp(3 * GROUP + k), 1)
                dz = load(cells, uintp(4 * GROUP + k), 1)
                ux, uy = load(parts, uintp(k), 1), load(parts, uintp(GROUP + k), 1)
                uz = load(parts, uintp(2 * GROUP + k), 1)
                # Load four pairs of cells
                here, there = x0 >= 0, x1 >= 0
                whole = here and there
                if not whole:
                    x0, x1 = max(x0, 0), max(x1, 0)
                if dz == n:
                    a00, a01 = load(A, uintp(x0 + y0), pair), load(A, uintp(x0 + y1), pair)
                    a10, a11 = load(A, uintp(x1 + y0), pair), load(A, uintp(x1 + y1), pair)
                else:
                    a00 = join(load(A, uintp(x0 + y0), n), load(A, uintp(x0 + y0 + dz), n), n)
                    a01 = join(load(A, uintp(x0 + y1), n), load(A, uintp(x0 + y1 + dz), n), n)
                    a10 = join(load(A, uintp(x1 + y0), n), load(A, uintp(x1 + y0 + dz), n), n)
                    a11 = join(load(A, uintp(x1 + y1), n), load(A, uintp(x1 + y1 + dz), n), n)
                # Go from four pairs to one
                d0, d1 = subtract(a01, a00), subtract(a11, a10)
                r0, r1 = multiply_add(d0, uy, a00), multiply_add(d1, uy, a10)
                if not whole:
                    r0, d0 = choose(here, r0, 0.0), choose(here, d0, 0.0)
                    r1, d1 = choose(there, r1, 0.0), choose(there, d1, 0.0)
                dx = subtract(r1, r0)
                v = multiply_add(dx, ux, r0)
                if values:
                    value = between(part(v, 0, n), part(v, n, n), uz)
                    # Hand out the values of the particle
                    i = uintp(p * n)
                    value = convert(value, out)
                    if added:
                        value = multiply_add(value, factor, load(bases, i, n))
                    store(to, i, value, n)
                else:
                    # Take the derivatives along each axis
                    dy = between(d0, d1, ux)
                    tx = between(part(dx, 0, n), part(dx, n, n), uz)
                    ty = between(part(dy, 0, n), part(dy, n, n), uz)
                    tz = subtract(part(v, n, n), part(v, 0, n))
                    if slopes:
                        # Sum the slopes of the meshes
                        i = uintp(3 * p)
                        if n == 1:
                            # Take the slopes of a single mesh
                            c = load(coefs, uintp(p * coef_step), 1) if given > 0 else 1.0
                            total = pack(
                                (
                                    float64(tx) * c * scale[0],
                                    float64(ty) * c * scale[1],
                                    float64(tz) * c * scale[2],
                                )
                            )
                            if len(out):
                                store(
                                    to, uintp(p), convert(between(part(v, 0, n), part(v, n, n), uz), out), 1
                                )
                        else:
                            c = convert(load_some(coefs, uintp(p * coef_step), given, n), mesh)
                            total = sums(multiply(tx, c), multiply(ty, c), multiply(tz, c))
                            total = multiply(total, convert(pack(scale), mesh))
                        total = convert(total, slope)
                        if added:
                            total = multiply_add(total, factor, load(bases, i, 3))
                        store(slope_to, i, total, 3)
                    else:
                        # Take the change along the velocity
                        i = uintp(3 * p)
                        vx = load(speeds, i, 1) * scale[0]
                        vy = load(speeds, uintp(i + 1), 1) * scale[1]
                        vz = load(speeds, uintp(i + 2), 1) * scale[2]
                        value = multiply_add(tx, vx, multiply_add(ty, vy, multiply(tz, vz)))
                        # Hand out the values of the particle
                        i = uintp(p * n)
                        value = convert(value, out)
                        if added:
                            value = multiply_add(value, factor, load(bases, i, n))
                        store(to, i, value, n)

    mesh, pos, lattice, reals = map(array_of, dtypes)
    integers = int64, int64
    return compiled(gather, mesh, BOX, *integers, pos, lattice, *4 * [reals], *integers, reals, float64)


@lru_cache(maxsize=None)
def scatter_loop(dtypes: tuple[Any, ...], n: int, moving: bool) -> Any:
    """The compiled loop that adds particles to `n` meshes; `moving`: or to one, and its change along a velocity.

    `dtypes` as for `gather_loop`.
    """

    # Add to a cell, a row, and a plane
    @inlined
    def add_to_cell(A, i, value):
        store(A, i, add(load(A, i, n), value), n)

    @inlined
    def add_to_row(A, i, dz, value, change, uz):
        upper = multiply(value, uz)
        lower = subtract(value, upper)
        if moving:
            lower, upper = lower - change, upper + change
        add_to_cell(A, uintp(i), lower)
        add_to_cell(A, uintp(i + dz), upper)

    # Add to a plane
    @inlined
    def add_to_plane(A, i, y0, y1, dz, value, vy, vz, uy, uz):
        upper = multiply(value, uy)
        lower = subtract(value, upper)
        if moving:
            lower, upper = lower - vy, upper + vy
        add_to_row(A, i + y0, dz, lower, vz * (1 - uy), uz)
        add_to_row(A, i + y1, dz, upper, vz * uy, uz)

    # The straight loop that scatters
    def scatter(mesh, box, low, high, owner, mask, block, pos, lattice, mass, mass_step, speed, rate):
        shape, stride, scale, translate, origin, period = box
        cells, parts, displaced = room(int64, FIVE), room(mesh, THREE), len(lattice) > 0
        at, q, A = pointer(pos), pointer(lattice), pointer(mesh)
        masses, speeds = pointer(mass), pointer(speed)
        npart = len(pos) // 3
        for b in range(len(mask)):
            if not (mask[b] >> owner) & uint64(1):
                continue
            end = min(npart, (b + 1) * block)
            for first in range(b * block, end, GROUP):
                count = min(GROUP, end - first)
                _locate(cells, parts, at, q, displaced, first, count, box, low, high, n)
                for k in range(count):
                    p = first + k
                    # Scatter one particle to its planes
                    # Look up the cells of the particle
                    x0, x1 = load(cells, uintp(k), 1), load(cells, uintp(GROUP + k), 1)
                    y0, y1 = load(cells, uintp(2 * GROUP + k), 1), load(cells, uintp(3 * GROUP + k), 1)
                    dz = load(cells, uintp(4 * GROUP + k), 1)
                    ux, uy = load(parts, uintp(k), 1), load(parts, uintp(GROUP + k), 1)
                    uz = load(parts, uintp(2 * GROUP + k), 1)
                    # Share the mass between two planes
                    m = convert(load(masses, uintp(p * mass_step), n), mesh)
                    m1 = multiply(m, ux)
                    m0 = subtract(m, m1)
                    vx = vy = vz = 0 * ux
                    if moving:
                        i = uintp(3 * p)
                        vx = convert(load(speeds, i, 1) * (rate * scale[0]), mesh)
                        vy = convert(load(speeds, uintp(i + 1), 1) * (rate * scale[1]), mesh)
                        vz = convert(load(speeds, uintp(i + 2), 1) * (rate * scale[2]), mesh)
                        m0, m1 = m0 - vx, m1 + vx
                    if x0 >= 0:
                        add_to_plane(A, x0, y0, y1, dz, m0, vy * (1 - ux), vz * (1 - ux), uy, uz)
                    if x1 >= 0:
                        add_to_plane(A, x1, y0, y1, dz, m1, vy * ux, vz * ux, uy, uz)

    mesh, pos, lattice, reals = map(array_of, dtypes)
    places = int64, int64, int64, uint64[::1], int64
    return compiled(scatter, mesh, BOX, *places, pos, lattice, reals, int64, reals, float64)
