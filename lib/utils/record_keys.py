"""Keys of records that hold a number or several names: one function writes each kind, one reads it."""

CURVE_METHODS = ("natural", "pgd-at", "trades", "rslad", "guided")  # experiment 3 has accuracy curves of these


def temperature_key(T: float) -> str:
    """Return the key of the network that was distilled at temperature T, such as T100."""
    return f"T{T:g}"


def temperature_of(key: str) -> float | None:
    """Return the temperature in a key that `temperature_key` wrote, None for another network's key."""
    return float(key[1:]) if key.startswith("T") else None


def run_key(*parts: str | float) -> str:
    """Return the key of a training, from its kind to its details, such as teacher/rslad/natural or tau/30."""
    return "/".join(part if isinstance(part, str) else f"{part:g}" for part in parts)


def run_parts(key: str) -> tuple[str, ...]:
    """Return the parts of a key that `run_key` wrote."""
    return tuple(key.split("/"))
