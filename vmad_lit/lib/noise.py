"""White noise by a counter-based generator: the numbers of a mode are a function of its wavenumber and of a key.

So a field is the same however a mesh is cut into parts, and a finer mesh has the same long waves.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy
from numpy.typing import ArrayLike

from vmad_lit.core.arguments import plain_array, show, whole_number
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.lib.threads import share

try:
    from vmad_lit.lib import normal_loops
except ImportError:  # no numba
    normal_loops = None  # type: ignore[assignment]

BLOCK = 1 << 13  # modes that are worked on at a time, so that they stay in the cache
LEAST = 1 << 14  # normal numbers that are worth a thread
MULTIPLIERS = numpy.uint64(0xD2511F53), numpy.uint64(0xCD9E8D57)
STEPS = 0x9E3779B9, 0xBB67AE85  # by which the key moves from round to round
HALF, LOW = numpy.uint64(32), numpy.uint64(0xFFFFFFFF)


def philox(counter: Sequence[Array], key: Sequence[int]) -> Sequence[Array]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 bits from each counter of four, all kept in uint64."""
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (numpy.uint64((word + i * step) % 2**32) for word, step in zip(key, STEPS))
        ma, mc = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (mc >> HALF) ^ b ^ k0, mc & LOW, (ma >> HALF) ^ d ^ k1, ma & LOW
    return a, b, c, d


Purpose = str | tuple[str | int, ...]  # what random numbers are for: a word, or words and counts


def stream(seed: int, purpose: Purpose = "field") -> numpy.random.SeedSequence:
    """The root of all random numbers of a seed, any whole number of at least 0, for one purpose."""
    seed = whole_number("seed", seed, least=0)
    parts = (purpose,) if isinstance(purpose, str) else purpose
    key = [zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in parts]
    return numpy.random.SeedSequence(seed, spawn_key=tuple(key))


def words_of_key(seed: int, purpose: Purpose) -> list[int]:
    """The three words that a seed and a purpose give to the generator."""
    return [int(word) for word in stream(seed, purpose).generate_state(3)]


def uniform(high: Array, low: Array) -> Array:
    """Numbers in [0, 1) from two words each."""
    return ((high << HALF | low) >> numpy.uint64(11)) * 2.0**-53


def normal(words: Sequence[Array], unitary: bool) -> Array:
    """Complex normal deviates of unit variance, from four words each; if `unitary`, only their phases."""
    phase = numpy.exp(2j * numpy.pi * uniform(*words[2:]))
    return phase if unitary else numpy.sqrt(-numpy.log1p(-uniform(*words[:2]))) * phase


def signed(index: Array, n: int) -> Array:
    """Wavenumbers in units of the fundamental one, from -(n - 1) // 2 to n // 2, from indices along an axis."""
    index = index % n
    return index - n * (2 * index > n)


def white_modes(
    index: Sequence[Array], Nmesh: Sequence[int], key: Sequence[int], unitary: bool = False
) -> Array:
    """White noise at the modes with these indices, broadcastable arrays; `key` has three words."""
    if len(index) > 3:
        raise ValueError(f"white noise is made on meshes of 1 to 3 dimensions, not of {len(index)}")
    wavenumbers = [signed(i, n) for i, n in zip(index, Nmesh)]
    mirrored = [signed(-i, n) for i, n in zip(index, Nmesh)]
    side: Array = numpy.zeros((), "i8")
    for own, other in zip(wavenumbers[::-1], mirrored[::-1]):
        side = numpy.where(side == 0, own - other, side)
    # Number the modes, and roll
    counter = [numpy.where(side < 0, other, own) for own, other in zip(wavenumbers, mirrored)]
    counter += [numpy.zeros_like(side)] * (3 - len(counter)) + [numpy.full_like(side, key[2])]
    modes = normal(philox([word.astype("u8") & LOW for word in counter], key[:2]), unitary)
    alone = modes.real * numpy.sqrt(2)
    alone = numpy.copysign(1.0, alone) if unitary else alone
    return numpy.where(side == 0, alone, numpy.where(side < 0, modes.conj(), modes))


def fill_white(
    modes: Array,
    index: Sequence[Any],
    Nmesh: Sequence[int],
    seed: int,
    purpose: Purpose = "field",
    unitary: bool = False,
    mean: float | None = None,
) -> None:
    """Write white noise into an array of modes with these indices; `mean` is that of the field, None if random."""
    key = words_of_key(seed, purpose)
    first, *others = (numpy.asarray(i, "i8") for i in index)
    planes = max(1, BLOCK * len(modes) // max(1, modes.size))
    for begin in range(0, len(modes), planes):
        block = slice(begin, begin + planes)
        modes[block] = white_modes([first[block], *others], Nmesh, key, unitary)
    if mean is not None:
        zero = numpy.ones((), "?")
        for i in (first, *others):
            zero = zero & (i == 0)
        modes[zero] = mean


def uniform_numbers(ids: ArrayLike, seed: int, purpose: Purpose) -> Array:
    """Random numbers in [0, 1) for whole numbers of at least 0, each a function of its number alone."""
    key, ids = words_of_key(seed, purpose), plain_array("ids", ids)
    if ids.size and (ids.dtype.kind not in "iu" or (ids < 0).any()):
        raise ValueError(f"ids must be whole numbers of at least 0, not {show(ids)}")
    flat, result = ids.ravel().astype("u8", copy=False), numpy.empty(ids.size)
    for begin in range(0, ids.size, BLOCK):
        block = slice(begin, begin + BLOCK)
        high, low = flat[block] >> HALF, flat[block] & LOW
        rest = numpy.full_like(low, key[2])
        result[block] = uniform(*philox([low, high, numpy.zeros_like(low), rest], key[:2])[:2])
    return result.reshape(ids.shape)


def fill_normal(out: Array, first: ArrayLike, seed: int, purpose: Purpose) -> None:
    """Fill the rows of `out` (rows, n), real, with independent normal numbers of mean 0 and variance 1.

    Row i gets those that belong to the whole numbers ``first[i], first[i] + 1, ...``: each is a function of its
    number, of the seed and of the purpose alone.
    """
    first, key = numpy.asarray(first, "u8"), words_of_key(seed, purpose)
    if normal_loops is not None and out.dtype == "f8" and out.flags.c_contiguous:
        words = [numpy.uint64(word) for word in key]
        share(
            partial(normal_loops.fill, out, first, *words), len(out), least=1 + LEAST // max(1, out.shape[-1])
        )
        return
    rows = max(1, BLOCK // max(1, out.shape[-1]))
    for begin in range(0, len(out), rows):
        number = first[begin : begin + rows, None] + numpy.arange(out.shape[-1], dtype="u8")
        # Take one of the two components of each deviate
        block = number >> numpy.uint64(1)
        rest = numpy.full_like(block, key[2])
        deviates = normal(philox([block & LOW, block >> HALF, numpy.ones_like(block), rest], key[:2]), False)
        out[begin : begin + rows] = numpy.sqrt(2) * numpy.where(number % 2 == 0, deviates.real, deviates.imag)
