"""Memory that a process keeps: what one operation frees serves the next, rather than go back to the system.

glibc returns blocks above 32 MiB at once, and tensors of many images are larger, so every operation pays for new pages:
half of the time of a diffusion network on 28 × 28 images. Results are equal to the bit. The price: a process holds on
to the most memory that it ever needed.
"""

import ctypes
import sys

KEPT = 2**31 - 1  # bytes that may stay free, the most that mallopt takes
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(KEPT)}  # environment of a process to start
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, malloc.h


def keep_memory() -> bool:
    """Let this process keep the memory that it frees; return whether its C library can (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, KEPT))
