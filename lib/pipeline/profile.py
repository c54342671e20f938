"""Compose a profile's parameters: `python -m lib.profile NAME` writes params.yaml, which `dvc repro` runs.

profiles/base.yaml is the only source of defaults; a profile names what differs from it, or from the profile that it is
`like`.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from lib.utils.files import ROOT, write_text

PROFILES = ROOT / "profiles"
HEADER = "# Written by `python -m lib.profile {name}` from profiles/base.yaml and profiles/{name}.yaml: edit those.\n"


def available_profiles(folder: Path = PROFILES) -> list[str]:
    """Return the names of all profiles."""
    return sorted(p.stem for p in folder.glob("*.yaml") if p.stem != "base")


def fits_type(value: Any, default: Any) -> bool:
    """Return whether `value` has the type of `default`: an int passes as a float, list items follow the first one."""
    if isinstance(default, float) and not isinstance(value, bool):
        return isinstance(value, int | float)
    if isinstance(default, list) and isinstance(value, list):
        return not default or all(fits_type(v, default[0]) for v in value)
    return type(value) is type(default)


def type_name(default: Any) -> str:
    """Return a readable name of a default's type, such as `float` or `list of int`."""
    if isinstance(default, list) and default:
        return f"list of {type(default[0]).__name__}"
    return type(default).__name__


def merge_settings(base: dict, changes: dict | None, where: str = "") -> dict:
    """Return `base` overridden by `changes`.

    Raises KeyError for an unknown key, naming the valid ones, and TypeError for a value of another type.
    """
    merged = dict(base)
    for key, value in (changes or {}).items():
        path = f"{where}{key}"
        if key not in base:
            raise KeyError(f"unknown key {path!r}: expected one of {', '.join(map(str, base))}")
        if isinstance(base[key], dict):
            if not isinstance(value, dict | None):
                raise TypeError(f"{path}: expected a section, got {value!r}")
            merged[key] = merge_settings(base[key], value, f"{path}.")
        elif not fits_type(value, base[key]):
            hint = "; YAML 1.1 reads 1e-3 as text: write 1.0e-3" if isinstance(value, str) else ""
            raise TypeError(f"{path}: expected {type_name(base[key])}, got {value!r} ({type(value).__name__}){hint}")
        else:
            merged[key] = float(value) if isinstance(base[key], float) else value
    return merged


def compose_profile(name: str, folder: Path = PROFILES) -> dict:
    """Return the parameters of one profile: the base, or the profile it is `like`, overridden by its own.

    Raises ValueError for an unknown name, and the errors of `merge_settings`.
    """
    if name not in available_profiles(folder):
        raise ValueError(f"unknown profile {name!r}: expected one of {', '.join(available_profiles(folder))}")
    base, changes = (yaml.safe_load((folder / f"{n}.yaml").read_text()) or {} for n in ("base", name))
    if like := changes.pop("like", ""):
        base = compose_profile(like, folder)
    return merge_settings(base, changes) | {"profile": name}


def render_profile(name: str, folder: Path = PROFILES) -> str:
    """Return the text of params.yaml for one profile."""
    return HEADER.format(name=name) + yaml.safe_dump(compose_profile(name, folder), sort_keys=False, width=110)


def main() -> None:
    """Write params.yaml for the profile named on the command line."""
    arguments = sys.argv[1:]
    if len(arguments) != 1:
        current = yaml.safe_load((ROOT / "params.yaml").read_text())["profile"]
        raise SystemExit(
            f"usage: python -m lib.profile NAME\nnow: {current}\navailable: {', '.join(available_profiles())}"
        )
    try:
        text = render_profile(arguments[0])
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"lib.profile: {error.args[0]}") from None
    write_text(ROOT / "params.yaml", text)
    print(f"params.yaml holds profile {arguments[0]}: `dvc repro` runs it")


if __name__ == "__main__":
    main()
