"""One seed, many independent streams: every purpose (data, init, batches, attack) draws from its own generator."""

import hashlib

import torch


def derive_seed(seed: int, purpose: str) -> int:
    """Returns a 63-bit seed that depends on `seed` and `purpose` alone (SHA-256), so that streams never overlap."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a fresh generator for one purpose of one seed, e.g. `seeded_generator(3, "batches")`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose))
