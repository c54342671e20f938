"""The package as it is installed: what its core imports, what a missing extra says, and where its networks are."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lib.commands import installed
from lib.pipeline import environment
from lib.utils.files import ROOT

DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = ["lib.purify", "lib.models", "lib.training", "lib.attacks.api", "lib.pretrained", "lib.__main__"]
CORE += [f"lib.evaluation.{path.stem}" for path in sorted((ROOT / "lib/evaluation").glob("[!_]*.py"))]
CORE += [f"lib.commands.{name}" for name in ("check", "evaluate", "installed", "leaderboard", "named")]
WITHOUT = """
import importlib.metadata, sys
missing, finders = set({missing!r}), sys.meta_path[:]
class Finder:
    find_distributions = importlib.metadata.MetadataPathFinder.find_distributions
    def find_spec(self, name, path=None, target=None):
        specs = (finder.find_spec(name, path, target) for finder in finders)
        return None if name.partition(".")[0] in missing else next(filter(None, specs), None)
sys.meta_path[:] = [Finder()]
"""


def names_of(lines):
    return {canonicalize_name(Requirement(line).name) for line in lines}


def closure(names):
    """The names of packages with all that they need, as installed here."""
    todo, every = set(names), set()
    while todo:
        every.add(name := todo.pop())
        try:
            lines = map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = (r for r in lines if r.marker is None or r.marker.evaluate({"extra": ""}))
        todo |= {canonicalize_name(r.name) for r in needed} - every
    return every


def beyond_the_core():
    """The modules of all packages that are installed here and that the core does not bring."""
    core = closure(names_of(DECLARED["project"]["dependencies"]))
    modules = importlib.metadata.packages_distributions()
    return sorted(
        m
        for m, packages in modules.items()
        if m not in ("lib", "data", "setuptools", "_distutils_hack", "sitecustomize")
        and not {canonicalize_name(p) for p in packages} & core
        and not m.startswith("__editable__")
    )


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)


def test_the_core_imports_none_of_the_extras():
    missing = beyond_the_core()
    assert {"nbformat", "matplotlib", "onnx", "dvc", "pytest", "torchattacks"} <= set(missing)
    imports = "".join(f"import {name}\n" for name in CORE)
    done = python(WITHOUT.format(missing=missing) + imports, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_environment_is_core_extras_and_groups():
    """One environment for `make reproduce` and `make test`, whatever part of pyproject.toml a package is in."""
    lists = DECLARED["project"]["optional-dependencies"] | DECLARED["dependency-groups"]
    wanted = {name for name in lists if name not in environment.SEPARATE}
    assert wanted == {"notebooks", "pipeline", "export", "test", "lint"}
    declared = environment.declared_dependencies()
    assert set(declared) == {*DECLARED["project"]["dependencies"], *(x for name in wanted for x in lists[name])}
    assert len(declared) == len(set(declared)) == len(names_of(declared))  # one bound for each package
    done = subprocess.run(
        [sys.executable, "-m", "lib.pipeline.environment", "--list"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == declared


@pytest.mark.parametrize(
    ("command", "package", "source"),
    [
        (("export", "digits/natural", "a.onnx"), "onnx", "'distilled-defence[export]'"),
        (("run", "notebooks/01_classic_kd.ipynb", "a.ipynb"), "nbformat", "'distilled-defence[pipeline]'"),
        (
            ("evaluate", "digits/natural", "--data", "digits", "--images", "2", "--eps", "0.1", "--effort", "quick"),
            "torchattacks",
            "--no-deps torchattacks",
        ),
    ],
)
def test_a_missing_extra_is_one_line(command, package, source):
    """By the extras of pyproject.toml, whatever state of it is installed here."""
    extras = DECLARED["project"]["optional-dependencies"]
    lines = [f"{line}; extra == '{extra}'" for extra, each in extras.items() for line in each]
    code = WITHOUT.format(missing=[package]) + f"importlib.metadata.requires = lambda name: {lines!r}\n"
    code += f"sys.argv[1:] = {list(command)!r}\nfrom lib.__main__ import main\nmain()"
    done = python(code, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr == f"python -m lib {command[0]}: expected the package {package}, got none: pip install {source}\n"
    )


def test_extras_are_those_of_the_metadata(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["a-b>=1; extra == 'x'", "c", 'a-b; extra == "y"'])
    assert installed.declared_extras() == {"a_b": ["x", "y"]}


def test_commands_about_the_repository_need_a_checkout(monkeypatch, tmp_path):
    installed.check_checkout()
    monkeypatch.setattr(installed, "ROOT", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="expected a checkout of the repository, got an installed package: clone"
    ):
        installed.check_checkout()


@pytest.mark.slow
def test_an_installed_package_evaluates_its_networks_from_anywhere(tmp_path):
    """A wheel of lib and the networks, unpacked into a folder; the checkout is out of reach, and so are the extras."""
    source = tmp_path / "source"
    for name in ("lib", "data/pretrained"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, tmp_path, source], check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("distilled_defence-*.whl")
    assert DECLARED["project"]["version"] in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    weights = {path.relative_to(ROOT) for path in (ROOT / "data/pretrained").rglob("*.safetensors")}
    assert weights and all((tmp_path / "site" / path).is_file() for path in weights)
    assert (tmp_path / "site/lib/report/protocol.yaml").is_file()
    environment_ = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    (tmp_path / "elsewhere").mkdir()
    missing = [m for m in beyond_the_core() if m != "torchattacks"]  # which is installed apart

    def distill(*words):
        code = (
            WITHOUT.format(missing=missing)
            + f"sys.argv[1:] = {list(words)!r}\nimport lib\nfrom lib.__main__ import main\n"
        )
        code += f"assert lib.__file__.startswith({str(tmp_path)!r})\nmain()"
        return python(code, cwd=tmp_path / "elsewhere", env=environment_)

    done = distill(
        "evaluate", "digits/natural", "--data", "digits", "--images", "8", "--eps", "0.1", "--effort", "quick"
    )
    assert done.returncode == 0 and "a quick look" in done.stdout, done.stderr[-2000:]
    refused = distill("claims")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "pip install -e ." in refused.stderr
