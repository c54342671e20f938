"""What an installation lacks: extras of the package, and the checkout that some commands are about."""

import importlib.metadata
import re

from packaging.requirements import Requirement

from lib.utils.files import ROOT

DISTRIBUTION = "distilled-defence"
APART = "torchattacks"  # in no extra: it declares an old requests, which jupyterlab refuses, and imports none


def declared_extras() -> dict[str, list[str]]:
    """Return the names of the extras that bring each package; empty where this project is not installed."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    extras: dict[str, list[str]] = {}
    for requirement in map(Requirement, lines):
        for extra in re.findall(r"extra == [\"']([\w-]+)[\"']", str(requirement.marker or "")):
            extras.setdefault(requirement.name.replace("-", "_"), []).append(extra)
    return extras


def missing_package(error: ImportError) -> str:
    """Return a line that says which package is missing and how to install it; for another error its own words."""
    cause = error.__cause__ if isinstance(error.__cause__, ModuleNotFoundError) else error
    if not isinstance(cause, ModuleNotFoundError) or not cause.name:
        return str(error)
    name = cause.name.partition(".")[0]
    if name == APART:
        return f"expected the package {name}, got none: pip install --no-deps {name}"
    extras = declared_extras().get(name)
    source = f"'{DISTRIBUTION}[{extras[0]}]'" if extras else name
    return f"expected the package {name}, got none: pip install {source}"


def check_checkout() -> None:
    """Raise FileNotFoundError unless this code lies in a checkout of the repository, with profiles and results."""
    if not (ROOT / "params.yaml").is_file():
        remedy = "clone the repository and `pip install -e .` there"
        raise FileNotFoundError(f"expected a checkout of the repository, got an installed package: {remedy}")
