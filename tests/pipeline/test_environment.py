"""pyproject.toml, requirements.txt and environment.yml say the same; torchattacks comes by its own step."""

import importlib.metadata
import re

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lib.pipeline import environment
from lib.utils.files import ROOT

LOCK = dict(
    line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")
)


def test_every_direct_dependency_is_locked_within_its_bounds():
    for line in environment.declared_dependencies():
        requirement = Requirement(line)
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), line


def test_the_lock_is_the_closure_of_what_is_installed():
    assert environment.environment_problems() == []
    assert LOCK.keys() >= environment.installed_closure().keys()


def test_the_lock_suits_cpu_and_cuda_and_names_no_index():
    text = (ROOT / "requirements.txt").read_text()
    assert LOCK["torch"] == "2.13.0"
    assert not re.search(r"\+|://|--|@|^nvidia|^triton|^cuda", text.split("\n", 1)[1], re.MULTILINE)
    assert "torchattacks" not in LOCK and not any(
        "torchattacks" in line for line in environment.declared_dependencies()
    )
    assert int(LOCK["jupyterlab"].split(".")[0]) >= 4


def test_every_locked_package_installs_on_the_oldest_python():
    wanted = {name: importlib.metadata.metadata(name)["Requires-Python"] for name in environment.installed_closure()}
    refused = {name: python for name, python in wanted.items() if python and "3.11.0" not in SpecifierSet(python)}
    assert refused == {}, "Debian 12 has Python 3.11.2: bound these in pyproject.toml"


def test_conda_installs_the_same_set():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {"pip": ["-r requirements.txt", "-e ."]} in conda["dependencies"]
    assert any(re.fullmatch(r"python=3\.1[1-9]", str(d)) for d in conda["dependencies"])
    first = (ROOT / "environment.yml").read_text().splitlines()[0]
    assert "python -m lib.pipeline.environment" in first  # the step that brings torchattacks


def test_missing_and_outdated_packages_are_named(monkeypatch):
    monkeypatch.setattr(environment, "declared_dependencies", lambda: ["torch>=99", "no-such-package>=1"])
    outdated, missing = environment.environment_problems()
    assert outdated == f"expected torch>=99, got {importlib.metadata.version('torch')}"
    assert missing == "expected no-such-package>=1, which is missing"
