"""pyproject.toml, requirements.txt and environment.yml say the same; every package but torch comes with its hashes."""

import importlib.metadata
import re

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lib.pipeline import environment
from lib.utils.files import ROOT

TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in environment.HEADS}
LOCK = environment.read_pins(ROOT / environment.LOCK) | environment.read_pins(ROOT / environment.TORCH_LOCK)
DOCS_LOCK = environment.read_pins(ROOT / environment.DOCS_LOCK)


def test_every_direct_dependency_is_locked_within_its_bounds():
    for line in environment.declared_dependencies():
        requirement = Requirement(line)
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), line


def test_the_documentation_is_locked_apart_and_no_user_needs_it():
    for line in environment.declared_dependencies(environment.DOCS):
        requirement = Requirement(line)
        assert requirement.specifier.contains(DOCS_LOCK[canonicalize_name(requirement.name)]), line
    assert not DOCS_LOCK.keys() & LOCK.keys()
    assert not any("sphinx" in name for name in LOCK)
    if environment.requirement_problems(environment.declared_dependencies(environment.DOCS)):
        pytest.skip("no Sphinx: python -m lib.pipeline.environment --docs")
    assert (DOCS_LOCK | LOCK).keys() >= environment.installed_closure(environment.DOCS).keys()


def test_the_lock_is_the_closure_of_what_is_installed():
    assert environment.environment_problems() == []
    assert LOCK.keys() >= environment.installed_closure().keys()


def test_the_lock_suits_cpu_and_cuda_and_names_no_index():
    assert LOCK["torch"] == "2.13.0"
    for text in TEXT.values():
        lines = [line for line in text.splitlines() if not line.startswith(("#", "    --hash=sha256:"))]
        assert not any(re.search(r"\+|://|--|@|^nvidia|^triton|^cuda", line) for line in lines)
    assert not any("torchattacks" in line for line in environment.declared_dependencies())
    assert int(LOCK["jupyterlab"].split(".")[0]) >= 4


@pytest.mark.parametrize("name", [environment.LOCK, environment.DOCS_LOCK, environment.CROSSCHECK_LOCK])
def test_fault_47_every_locked_package_has_its_hashes(name):
    """All but torch, whose builds differ by index; pip is told to require them."""
    entries = re.sub(r"#.*\n|\\\n", "", TEXT[name]).splitlines()
    assert len(entries) == len(environment.read_pins(ROOT / name)) > 20
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==\S+(\s+--hash=sha256:[0-9a-f]{64})+\s*", entry), entry[:80]
    assert "torch" not in environment.read_pins(ROOT / name)


def test_fault_47_pip_is_told_to_require_hashes_wherever_a_lock_is_installed():
    steps = [" ".join(step) for step in (*environment.STEPS, environment.DOCS_STEP)]
    steps += (ROOT / "Makefile").read_text("utf-8").splitlines()
    installs = [step for step in steps if re.search(r"-r (requirements|\$<)", step)]
    assert len(installs) == 5
    for step in installs:
        assert ("--require-hashes" in step) != (environment.TORCH_LOCK in step), step


def test_every_locked_package_installs_on_the_oldest_python():
    closure = environment.installed_closure() | environment.installed_closure(environment.DOCS)
    wanted = {name: importlib.metadata.metadata(name)["Requires-Python"] for name in closure}
    refused = {name: python for name, python in wanted.items() if python and "3.11.0" not in SpecifierSet(python)}
    assert refused == {}, "Debian 12 has Python 3.11.2: bound these in pyproject.toml"


def test_conda_installs_the_same_set():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {str(d).split("=")[0] for d in conda["dependencies"]} == {"python", "pip"}
    assert any(re.fullmatch(r"python=3\.1[1-9]", str(d)) for d in conda["dependencies"])
    first = (ROOT / "environment.yml").read_text().splitlines()[0]
    assert "python -m lib.pipeline.environment" in first  # which installs the rest


def test_missing_and_outdated_packages_are_named(monkeypatch):
    monkeypatch.setattr(environment, "declared_dependencies", lambda: ["torch>=99", "no-such-package>=1"])
    outdated, missing = environment.environment_problems()
    assert outdated == f"expected torch>=99, got {importlib.metadata.version('torch')}"
    assert missing == "expected no-such-package>=1, which is missing"


def test_the_documentation_is_installed_where_it_is_missing_alone(monkeypatch, capsys):
    calls, missing = [], ["expected sphinx, which is missing"]

    def install(steps):
        calls.append(steps)
        if environment.DOCS_STEP in steps:
            missing.clear()

    monkeypatch.setattr(environment, "install", install)
    monkeypatch.setattr(environment, "environment_problems", list)
    monkeypatch.setattr(environment, "requirement_problems", lambda lines: list(missing) if lines else [])
    monkeypatch.setattr("sys.argv", ["environment", "--docs", "--check"])
    with pytest.raises(SystemExit, match="expected sphinx"):
        environment.main()
    monkeypatch.setattr("sys.argv", ["environment"])
    environment.main()
    monkeypatch.setattr("sys.argv", ["environment", "--docs"])
    environment.main()
    environment.main()
    assert calls == [(), (), (environment.DOCS_STEP,), ()]
    assert capsys.readouterr().out.count("the environment is complete") == 3
