"""Profiles: `python -m lib.profile NAME` writes params.yaml from profiles/base.yaml and the differences of one profile.

params.yaml is the truth of what `dvc repro` runs; profiles are where it comes from.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from lib.utils.files import ROOT, write_text

PROFILES = ROOT / "profiles"
HEADER = "# Written by `python -m lib.profile {name}` from profiles/base.yaml and profiles/{name}.yaml: edit those.\n"


def available_profiles(folder: Path = PROFILES) -> list[str]:
    """Returns the names of all profiles."""
    return sorted(p.stem for p in folder.glob("*.yaml") if p.stem != "base")


def fits_type(value: Any, default: Any) -> bool:
    """Tells whether `value` has the type of `default`: an int may be a float, a list's items follow its first."""
    if isinstance(default, float) and not isinstance(value, bool):
        return isinstance(value, int | float)
    if isinstance(default, list) and isinstance(value, list):
        return not default or all(fits_type(v, default[0]) for v in value)
    return type(value) is type(default)


def type_name(default: Any) -> str:
    """Returns a readable name of a default's type, such as `float` or `list of int`."""
    if isinstance(default, list) and default:
        return f"list of {type(default[0]).__name__}"
    return type(default).__name__


def merge_settings(base: dict, changes: dict, where: str = "") -> dict:
    """Returns `base` with `changes` laid over it.

    Raises KeyError for a key that `base` lacks, naming the valid ones, and TypeError for a value of another type.
    """
    merged = dict(base)
    for key, value in (changes or {}).items():
        path = f"{where}{key}"
        if key not in base:
            raise KeyError(f"unknown key {path!r}: valid here are {', '.join(map(str, base))}")
        if isinstance(base[key], dict):
            if not isinstance(value, dict | None):
                raise TypeError(f"{path} is {value!r}: a section is due")
            merged[key] = merge_settings(base[key], value, f"{path}.")
        elif not fits_type(value, base[key]):
            hint = "; YAML 1.1 reads 1e-3 as text: write 1.0e-3" if isinstance(value, str) else ""
            raise TypeError(f"{path} is {value!r} ({type(value).__name__}): {type_name(base[key])} is due{hint}")
        else:
            merged[key] = float(value) if isinstance(base[key], float) else value
    return merged


def compose_profile(name: str, folder: Path = PROFILES) -> dict:
    """Returns the parameters of one profile: its differences laid over the base, or over the profile it is `like`.

    ValueError for an unknown name, and `merge_settings`'s errors.
    """
    if name not in available_profiles(folder):
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(available_profiles(folder))}")
    base, changes = (yaml.safe_load((folder / f"{n}.yaml").read_text()) or {} for n in ("base", name))
    if like := changes.pop("like", ""):
        base = compose_profile(like, folder)
    return merge_settings(base, changes) | {"profile": name}


def render_profile(name: str, folder: Path = PROFILES) -> str:
    """Returns the text of params.yaml for one profile."""
    return HEADER.format(name=name) + yaml.safe_dump(compose_profile(name, folder), sort_keys=False, width=110)


def main() -> None:
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
