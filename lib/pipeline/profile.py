"""Compose a profile's parameters: `python -m lib.profile NAME` writes params.yaml, which `dvc repro` runs.

profiles/base.yaml is the only source of defaults; a profile names what differs from it, or from the profile that it is
`like`. What is valid: `lib.pipeline.schema`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.pipeline.schema import check_names, check_profile
from lib.utils.files import ROOT, write_text
from lib.utils.processes import print_in_any_locale
from lib.utils.validation import Name, check_value, fits
from lib.utils.yaml_files import PARAMS, active_profile, dump_yaml, read_mapping

PROFILES = ROOT / "profiles"
BASE = "base"
HEADER = "# Written by `python -m lib.profile {name}` from profiles/base.yaml and profiles/{name}.yaml: edit those.\n"


def available_profiles(folder: Path = PROFILES) -> list[str]:
    """Return the names of all profiles."""
    return sorted(p.stem for p in folder.glob("*.yaml") if p.stem != BASE and fits(p.stem, Name))


def merge_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked settings overridden by checked changes, in the order of the first."""
    merged = {
        key: merge_settings(value, changes.get(key, {})) if isinstance(value, dict) else changes.get(key, value)
        for key, value in base.items()
    }
    return merged


def read_profile(name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Return what one profile changes, checked, and the profile that it is `like`, by default the base.

    Raises ValueError for an unknown name, an unreadable file, and settings that are not valid.
    """
    check_value("a profile", name, Name)
    known, path = available_profiles(folder), folder / f"{name}.yaml"
    check_names([name], known, "profiles/", what="profile")
    if path.is_symlink():
        raise ValueError(f"expected a profile's own file, got the link {path}: write `like: <profile>` into a file")
    where = f"profiles/{name}.yaml"
    changes = read_mapping(path)
    like = changes.pop("like", BASE)
    if like != BASE:
        check_value(f"like in {where}", like, Name)
    changes = check_profile(changes, where)
    if changes.setdefault("profile", name) != name:
        raise ValueError(
            f"expected profile: {name} in {where}, got {changes['profile']!r}: name the file as the profile"
        )
    return changes, like


def compose_profile(name: str, folder: Path = PROFILES) -> dict[str, Any]:
    """Return the parameters of one profile: the base, or the profile it is `like`, overridden by its own.

    Raises ValueError for an unknown name, profiles that are `like` each other, an unreadable file, and settings that
    are not valid.
    """
    chain: dict[str, dict] = {}
    while name != BASE or not chain:
        if name in chain:
            raise ValueError(f"expected an end of `like`, got the circle {' -> '.join([*chain, name])}: remove one")
        chain[name], name = read_profile(name, folder)
    composed = check_profile(read_mapping(folder / f"{BASE}.yaml"), f"profiles/{BASE}.yaml", complete=True)
    for changes in reversed(chain.values()):
        composed = merge_settings(composed, changes)
    return composed


def render_profile(name: str, folder: Path = PROFILES) -> str:
    """Return the text of params.yaml for one profile."""
    return HEADER.format(name=name) + dump_yaml(compose_profile(name, folder))


def read_params(path: Path = PARAMS) -> dict[str, Any]:
    """Return the parameters in params.yaml; ValueError for settings that are not valid, and missing ones."""
    return check_profile(read_mapping(path), path.name, complete=True)


def main() -> None:
    """Write params.yaml for the profile named on the command line."""
    print_in_any_locale()
    arguments = sys.argv[1:]
    try:
        if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
            usage = f"usage: python -m lib.profile NAME\navailable: {', '.join(available_profiles())}"
            if len(arguments) == 1:
                print(usage)
                return
            raise SystemExit(f"{usage}\nnow: {active_profile()}" if PARAMS.exists() else usage)
        text = render_profile(arguments[0])
    except ValueError as error:
        raise SystemExit(f"lib.profile: {error}") from None
    write_text(PARAMS, text)
    print(f"params.yaml holds profile {arguments[0]}: `dvc repro` runs it")


if __name__ == "__main__":
    main()
