"""Hash that decides dropout in the Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """Compute a 32-bit integer hash with little bias (Wellons, "Prospecting for hash functions", lowbias32); uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def is_dropped(index, seed, threshold):
    """Return True for elements to drop, a share of threshold / 2**32, by a hash of their number and the seed."""
    return mix(index.to(tl.uint32) ^ seed.to(tl.uint32)) < threshold


def dropout_constants(dropout: float) -> tuple[int, float]:
    """Return the threshold on a 32-bit hash that drops this share, and the factor for the elements kept."""
    return min(round(dropout * 2**32), 2**32 - 1), 1.0 / (1.0 - dropout)
