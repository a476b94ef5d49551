"""The compiled loop of normal random numbers."""

from __future__ import annotations

import numpy

from vmad_lit.core.error import needed_for
from vmad_lit.lib.compiled import compiled, inlined

with needed_for("compiled loops", extra="fast"):
    from numba import uint64


@inlined
def scramble(block, word, k0, k1):
    """The four words of Philox4x32-10 for a block of normal numbers."""
    low = uint64(0xFFFFFFFF)
    a, b, c, d = block & low, block >> uint64(32), uint64(1), word
    for i in range(10):
        ma, mc = a * uint64(0xD2511F53), c * uint64(0xCD9E8D57)
        a, b, c, d = (mc >> uint64(32)) ^ b ^ k0, mc & low, (ma >> uint64(32)) ^ d ^ k1, ma & low
        k0, k1 = (k0 + uint64(0x9E3779B9)) & low, (k1 + uint64(0xBB67AE85)) & low
    return a, b, c, d


@compiled
def fill(out, first, k0, k1, word, start, end):
    """Fill the rows start:end of `out` with the numbers that begin with `first`; see `fill_normal`."""
    for i in range(start, end):
        x = y = 0.0
        for j in range(out.shape[1]):
            number = first[i] + uint64(j)
            odd = number & uint64(1)
            if j == 0 or odd == 0:
                # Make a pair of normal numbers
                a, b, c, d = scramble(number >> uint64(1), word, k0, k1)
                u = float((a << uint64(32) | b) >> uint64(11)) * 2.0**-53
                v = float((c << uint64(32) | d) >> uint64(11)) * 2.0**-53
                radius, phase = numpy.sqrt(-2.0 * numpy.log1p(-u)), 2.0 * numpy.pi * v
                x, y = radius * numpy.cos(phase), radius * numpy.sin(phase)
            out[i, j] = y if odd else x
