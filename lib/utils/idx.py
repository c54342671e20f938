"""MNIST's format of arrays."""

import numpy as np


def parse_idx(content: bytes) -> np.ndarray:
    """Return the array of unsigned bytes in a file of MNIST's IDX format."""
    dims = np.frombuffer(content, ">i4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)
