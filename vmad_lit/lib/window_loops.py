"""The loops over particles and the cells they touch, for all windows: scatter and gather.

They are compiled by numba for each window and dimension when first used, and kept on disk. `cells` does the same for
the commonest window in less time, and `window` calls them.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor
from typing import Any

import numpy

from vmad_lit.core.error import needed_for
from vmad_lit.lib.compiled import compiled, inlined

with needed_for("compiled loops", extra="fast"):
    from numba import float64, from_dtype, int64, types, uint64, uintp

DType = numpy.dtype[Any]
DTypes = tuple[DType, DType, DType, DType]  # of meshes, positions, the lattice, and what particles have

#: The type of a geometry: shape, stride, scale, translate, origin and period, each for three axes.
BOX = types.Tuple([types.UniTuple(kind, 3) for kind in (int64, int64, float64, float64, int64, int64)])


def array_of(dtype: numpy.dtype[Any]) -> Any:
    """The type of a flat array, for a signature."""
    return types.Array(from_dtype(dtype), 1, "C")


@inlined
def spline(support, x):
    """First cell, weights and derivatives of the B-spline of this support at `x`.

    Hockney & Eastwood (1988), section 5-3; the cubic spline after eq. 18 of arXiv:1512.07295.
    """
    below = numpy.floor(x + 0.5 * (support % 2))
    u = x - below
    i = int(below) - (support - 1) // 2
    if support == 1:
        return i, (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)
    if support == 2:
        return i, (1.0 - u, u, 0.0, 0.0), (-1.0, 1.0, 0.0, 0.0)
    # The three weights of a parabola
    if support == 3:
        v, w = 0.5 - u, 0.5 + u
        return i, (0.5 * v * v, 0.75 - u * u, 0.5 * w * w, 0.0), (-v, -2.0 * u, w, 0.0)
    # The four weights of a cubic
    v = 1.0 - u
    return (
        i,
        (
            v * v * v / 6,
            (4 - 6 * u * u + 3 * u * u * u) / 6,
            (4 - 6 * v * v + 3 * v * v * v) / 6,
            u * u * u / 6,
        ),
        (-0.5 * v * v, (1.5 * u - 2.0) * u, (2.0 - 1.5 * v) * v, 0.5 * u * u),
    )


@inlined
def fold_cell(i, period):
    """The cell `i` of a mesh of this period."""
    return i if uintp(i) < uintp(period) else i % period


@inlined
def _offset(cell, low, high, stride, whole):
    """Offset of a folded cell in memory, or -1 if it is not among the local cells `low` to `high`."""
    return cell * stride if whole or low <= cell < high else -1


@inlined
def offsets(first, period, low, high, stride, whole):
    """Offsets of the cells from `first` on, as many as the widest window has; `whole`: all are local."""
    a = fold_cell(first, period)
    b = a + 1 if a + 1 < period else 0
    c = b + 1 if b + 1 < period else 0
    d = c + 1 if c + 1 < period else 0
    return (
        _offset(a, low, high, stride, whole),
        _offset(b, low, high, stride, whole),
        _offset(c, low, high, stride, whole),
        _offset(d, low, high, stride, whole),
    )


@lru_cache(maxsize=None)
def general_scatter_loop(
    dtypes: DTypes,
    ndim: int,
    support: int,
    n: int,
    moving: bool,
    spreading: bool = False,
) -> Any:
    """The compiled loop that adds particles to `n` meshes, for these types of arrays.

    Along the first `asked` axes cells may be elsewhere: that is an argument of the loop. `moving`: the tangent of painting
    one mesh; or (`spreading`) of adding to several meshes, each its own masses.
    """
    support1 = support if ndim > 1 else 1
    support2 = support if ndim > 2 else 1

    # The loop that scatters
    def scatter(
        mesh0,
        mesh1,
        mesh2,
        mesh3,
        box,
        asked,
        low,
        high,
        owner,
        mask,
        block,
        pos,
        step,
        lattice,
        mass,
        mass_step,
        speed,
        rate,
    ):
        # Visit the blocks of particles
        shape, stride, scale, translate, origin, period = box
        npart, displaced = len(pos) // step, len(lattice) > 0
        listed = numpy.empty(block if asked > 0 else 0, dtype="i8")
        for b in range(len(mask)):
            if not (mask[b] >> owner) & uint64(1):
                continue
            start = b * block
            count = min(npart, start + block) - start
            shared = asked > 0 and mask[b] != uint64(1) << owner
            if shared:
                # List the particles of the block that are near
                near = 0
                reach = support + 1
                for k in range(count):
                    x = float64(pos[uintp((start + k) * step)])
                    if displaced:
                        x += lattice[uintp((start + k) * step)]
                    x = x * scale[0] + translate[0]
                    i = floor(x + 0.5 * (support % 2)) - (support - 1) // 2 - 1 + origin[0]
                    i = fold_cell(i, period[0])
                    listed[uintp(near)] = start + k
                    near += ((i < high) & (i + reach >= low)) | (i + reach - period[0] >= low)
                count = near
            for k in range(count):
                p = listed[uintp(k)] if shared else start + k
                # Scatter one particle
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
                # Take the masses of the particle
                m0 = mass[uintp(p * mass_step)]
                m1 = mass[uintp(p * mass_step + 1)] if n > 1 else 0.0
                m2 = mass[uintp(p * mass_step + 2)] if n > 2 else 0.0
                m3 = mass[uintp(p * mass_step + 3)] if n > 3 else 0.0
                unit = 0.0 if spreading else m0 if n == 1 else 1.0
                # Take the velocity of the particle
                vx = vy = vz = 0.0
                if moving:
                    vx = speed[uintp(p * ndim)] * scale[0]
                    vy = speed[uintp(p * ndim + 1)] * scale[1] if ndim > 1 else 0.0
                    vz = speed[uintp(p * ndim + 2)] * scale[2] if ndim > 2 else 0.0
                factor = m0 if spreading and n == 1 else rate
                vx, vy, vz = factor * vx, factor * vy, factor * vz
                # Add to the cells
                for ia in range(support):
                    if asked > 0 and cx[ia] < 0:
                        continue
                    # Weight of a plane of cells
                    a = unit * wx[ia]
                    if moving:
                        a += vx * dx[ia]
                    for ib in range(support1):
                        if asked > 1 and cy[ib] < 0:
                            continue
                        # Weight of a row of cells
                        first = cx[ia] + cy[ib]
                        w = a * wy[ib]
                        if moving:
                            w += vy * wx[ia] * dy[ib]
                            d = vz * wx[ia] * wy[ib]
                        for ic in range(support2):
                            if asked > 2 and cz[ic] < 0:
                                continue
                            i = uintp(first + cz[ic])
                            # Weight of a cell
                            weight = w * wz[ic]
                            if moving:
                                weight += d * dz[ic]
                            # Add to a cell of each mesh
                            if n == 1:
                                mesh0[i] += weight
                            else:
                                mesh0[i] += weight * m0
                                mesh1[i] += weight * m1
                            if n > 2:
                                mesh2[i] += weight * m2
                            if n > 3:
                                mesh3[i] += weight * m3

    mesh, position, lattice, reals = map(array_of, dtypes)
    places = int64, int64, int64, int64, uint64[::1], int64
    return compiled(
        scatter, *4 * [mesh], BOX, *places, position, int64, lattice, reals, int64, reals, float64
    )


@lru_cache(maxsize=None)
def general_gather_loop(dtypes: DTypes, ndim: int, support: int, n: int, moving: bool, slopes: bool) -> Any:
    """The compiled loop that reads `n` meshes, their change (`moving`) or their gradients (`weighted_gradient`).

    Along the first `asked` axes, an argument of the loop, cells may be elsewhere.
    """
    support1 = support if ndim > 1 else 1
    support2 = support if ndim > 2 else 1

    # The loop that gathers
    def gather(
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
        out,
        out_step,
        speed,
        slope,
        coef,
        coef_step,
        given,
        base,
        factor,
    ):
        shape, stride, scale, translate, origin, period = box
        low, high, displaced = 0, shape[0], len(lattice) > 0
        for p in range(start, end):
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
            if slopes:
                # Sum the gradients of the meshes
                # Take the coefficients of the meshes
                first = p * coef_step
                k0 = coef[uintp(first)] if given > 0 else 1.0
                k1 = (coef[uintp(first + 1)] if given > 1 else 1.0) if n > 1 else 0.0
                k2 = (coef[uintp(first + 2)] if given > 2 else 1.0) if n > 2 else 0.0
                k3 = (coef[uintp(first + 3)] if given > 3 else 1.0) if n > 3 else 0.0
                s = tx = ty = tz = 0.0
                for ia in range(support):
                    if asked > 0 and cx[ia] < 0:
                        continue
                    r = ry = rz = 0.0
                    # Reduce a plane of cells to three numbers
                    for ib in range(support1):
                        if asked > 1 and cy[ib] < 0:
                            continue
                        first = cx[ia] + cy[ib]
                        q = qz = 0.0
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
                        # Add a row of cells
                        r += q * wy[ib]
                        ry += q * dy[ib]
                        rz += qz * wy[ib]
                    # Add a plane of cells
                    s += r * wx[ia]
                    tx += r * dx[ia]
                    ty += ry * wx[ia]
                    tz += rz * wx[ia]
                # Hand out the slopes
                if n == 1:
                    tx, ty, tz = k0 * tx, k0 * ty, k0 * tz
                    if out_step > 0:
                        out[uintp(p * out_step)] = s
                first = p * ndim
                tx, ty, tz = tx * scale[0], ty * scale[1], tz * scale[2]
                if len(base):
                    tx = base[uintp(first)] + factor * tx
                    ty = base[uintp(first + 1)] + factor * ty if ndim > 1 else 0.0
                    tz = base[uintp(first + 2)] + factor * tz if ndim > 2 else 0.0
                slope[uintp(first)] = tx
                if ndim > 1:
                    slope[uintp(first + 1)] = ty
                if ndim > 2:
                    slope[uintp(first + 2)] = tz
            else:
                # Sum the values of the meshes
                unit = 0.0 if moving else 1.0
                # Take the velocity of the particle
                vx = vy = vz = 0.0
                if moving:
                    vx = speed[uintp(p * ndim)] * scale[0]
                    vy = speed[uintp(p * ndim + 1)] * scale[1] if ndim > 1 else 0.0
                    vz = speed[uintp(p * ndim + 2)] * scale[2] if ndim > 2 else 0.0
                s0 = s1 = s2 = s3 = 0.0
                for ia in range(support):
                    if asked > 0 and cx[ia] < 0:
                        continue
                    # Weight of a plane of cells
                    a = unit * wx[ia]
                    if moving:
                        a += vx * dx[ia]
                    for ib in range(support1):
                        if asked > 1 and cy[ib] < 0:
                            continue
                        # Weight of a row of cells
                        first = cx[ia] + cy[ib]
                        w = a * wy[ib]
                        if moving:
                            w += vy * wx[ia] * dy[ib]
                            d = vz * wx[ia] * wy[ib]
                        for ic in range(support2):
                            if asked > 2 and cz[ic] < 0:
                                continue
                            i = uintp(first + cz[ic])
                            # Weight of a cell
                            weight = w * wz[ic]
                            if moving:
                                weight += d * dz[ic]
                            # Add a cell of each mesh
                            s0 += weight * mesh0[i]
                            if n > 1:
                                s1 += weight * mesh1[i]
                            if n > 2:
                                s2 += weight * mesh2[i]
                            if n > 3:
                                s3 += weight * mesh3[i]
                # Hand out the values
                first = p * out_step
                if len(base):
                    s0 = base[uintp(first)] + factor * s0
                    s1 = base[uintp(first + 1)] + factor * s1 if n > 1 else 0.0
                    s2 = base[uintp(first + 2)] + factor * s2 if n > 2 else 0.0
                    s3 = base[uintp(first + 3)] + factor * s3 if n > 3 else 0.0
                # Store as many values as there are meshes
                out[uintp(first)] = s0
                if n > 1:
                    out[uintp(first + 1)] = s1
                if n > 2:
                    out[uintp(first + 2)] = s2
                if n > 3:
                    out[uintp(first + 3)] = s3

    mesh, position, lattice, reals = map(array_of, dtypes)
    results = reals, int64, reals, reals
    weights = reals, int64, int64, reals, float64
    return compiled(
        gather, *4 * [mesh], BOX, int64, int64, int64, position, int64, lattice, *results, *weights
    )
