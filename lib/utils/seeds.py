"""Independent random streams of one seed: every purpose (data, init, batches, attack) has its own generator."""

import hashlib

import torch


def derive_seed(seed: int, purpose: str) -> int:
    """Return a 63-bit seed that depends on `seed` and `purpose` alone (SHA-256), so that streams never overlap."""
    sha = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(sha[:8], "big") >> 1


def seeded_generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator for one purpose of one seed, e.g. `seeded_generator(3, "batches")`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose))
