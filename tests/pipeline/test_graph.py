"""The graph and its notebooks: the traps of DVC and papermill, each held by a check."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from lib.pipeline import profile
from lib.pipeline.parameters import check_parameters, notebook_defaults
from lib.utils.code_hash import CODE, SOURCES
from lib.utils.files import ROOT
from tests.pipeline.clones import environment, git, make_clone

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RUNS = {name: stage for name, stage in GRAPH.items() if "lib.run" in stage["cmd"]}


def words(stage: dict) -> list[str]:
    return stage["cmd"].split()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_canonical(path):
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert sum("parameters" in c.metadata.get("tags", []) for c in nb.cells) == 1
    assert nb.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert all(set(c.metadata) <= {"tags"} for c in nb.cells)
    computing = [c for c in code if not set(c.metadata.get("tags", [])) - {"parameters"}]
    assert len(computing) <= 15 and len(code) <= 22
    assert len(nb.cells) - len(code) >= len(computing) / 2 - 1
    assert not any("sys.path" in c.source or str(Path.home()) in c.source for c in code)
    nbformat.validate(nb)


@pytest.mark.parametrize("name", GRAPH)
def test_a_stage_depends_on_its_code_by_one_hash(name):
    stage = GRAPH[name]
    hashes = [d for d in stage["deps"] if d.startswith(CODE)]
    assert hashes == ([] if name == "code" else [f"{CODE}/{name}.txt"])
    assert name == "code" or not any(d.endswith((".py", ".ipynb")) or d in ("lib", "notebooks") for d in stage["deps"])
    if name in RUNS:
        assert SOURCES[name] in words(stage)
        assert f"--code {name} " in stage["cmd"]  # a single stage refuses a stale hash


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("params", profile.available_profiles())
def test_each_profile_has_only_parameters_that_the_notebook_knows(name, params):
    text = words(RUNS[name])
    path = ROOT / next(w for w in text if w.startswith("notebooks/"))
    sections = text[text.index("--section") + 1 :]
    sections = sections[: next((i for i, w in enumerate(sections) if w.startswith("-")), None)]
    values = {"profile": params}
    for section in sections:
        values |= profile.compose_profile(params)[section]
    check_parameters(values, notebook_defaults(path), path)
    given = [text[i + 1] for i, w in enumerate(text) if w == "-p"]
    assert values.keys() | set(given) == notebook_defaults(path).keys()  # the pipeline decides every parameter
    declared = set(RUNS[name]["params"])
    assert set(sections) <= declared


def test_executed_notebooks_are_leaves_and_every_output_carries_the_profile():
    deps = {d for stage in GRAPH.values() for d in stage["deps"]}
    for name, stage in GRAPH.items():
        if name == "code":  # one for all profiles
            continue
        outs = [o for key in ("outs", "metrics", "plots") for o in stage.get(key, [])]
        paths = [next(iter(o)) if isinstance(o, dict) else o for o in outs]
        assert all("${item.profile}" in p for p in paths), name
        assert stage["matrix"]["profile"] == ["${profile}"], name
        assert not [p for p in paths if p.endswith(".ipynb") and p in deps]
        for out in outs:  # what a reader sees without running anything is in git, not in DVC's cache
            assert ("models" in str(out)) != (isinstance(out, dict) and next(iter(out.values()))["cache"] is False)


def test_volatile_files_are_ignored():
    assert {"__pycache__", ".ipynb_checkpoints"} <= set((ROOT / ".dvcignore").read_text().split())
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/data/scratch/", "/data/raw/", ".venv/"} <= set(ignored)
    assert "metadata.tags" not in (ROOT / ".pre-commit-config.yaml").read_text()  # stripping tags breaks papermill


@pytest.fixture
def clone(tmp_path):
    return make_clone(tmp_path)


def repro(folder, name: str, *targets: str) -> str:
    output = ""
    for command in (
        (sys.executable, "-m", "lib.profile", name),
        (sys.executable, "-m", "dvc", "repro", *targets),
    ):
        done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        output += done.stdout
    return output


def results_of(folder, name: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "data" / name / "metrics").glob("*.json"))}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kd", "whole"])
def test_runs_from_scratch_are_equal_and_switching_profiles_recomputes_nothing(clone, whole):
    """Of experiment 1 alone, and, slow, of the whole graph: CI runs both."""
    mine, other = "kd@tiny-a-0", "kd@tiny-b-0"  # one experiment of another profile is enough to switch between two
    targets = () if whole else (mine,)
    assert f"Running stage '{mine}'" in repro(clone, "tiny-a", *targets)
    first = results_of(clone, "tiny-a")
    experiments = [f"{name.split('@')[0]}-s0.json" for name, stage in RUNS.items() if "seed" in stage["matrix"]]
    assert sorted(first) == sorted(["claims.json", "data.json", *experiments] if whole else ["data.json", "kd-s0.json"])
    assert "Running stage" in repro(clone, "tiny-b", other)
    second = results_of(clone, "tiny-b")
    for name, metrics, stages in (("tiny-a", first, targets), ("tiny-b", second, (other,)), ("tiny-a", first, targets)):
        assert "Running stage" not in repro(clone, name, *stages)
        assert results_of(clone, name) == metrics
    assert first["kd-s0.json"] != second["kd-s0.json"]
    drawn = [len(list((clone / "figures/tiny-a").glob(f"*.{kind}"))) for kind in ("svg", "png")]
    assert drawn[0] == drawn[1] and (drawn[0] > 0) == whole
    git(clone, "add", ".")
    git(clone, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "results")
    lock = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    shutil.rmtree(clone / ".dvc/cache")
    clone = clone.rename(clone.with_name(f"{clone.name}-elsewhere"))  # no result may say where it was made
    for file in (f for f in (clone / "data/tiny-a").rglob("*") if f.is_file()):
        if "report" not in file.name and file.name not in ("claims.json", "kd_gain.csv"):  # equal records, equal report
            file.unlink()
    assert f"Running stage '{mine}'" in repro(clone, "tiny-a", *targets)
    assert results_of(clone, "tiny-a") == first
    assert yaml.safe_load((clone / "dvc.lock").read_text())["stages"] == lock  # weights, figures, notebooks
    status = subprocess.run(("git", "status", "--porcelain"), cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""
    assert json.loads(first["data.json"])["size"] == {"train": 1047, "val": 250, "test": 500}


def shell_commands(text: str) -> list[list[str]]:
    """The commands of README's fenced blocks, one list for each block, and each command in its prose by itself."""
    blocks = [block.splitlines() for block in re.findall(r"```sh\n(.*?)```", re.sub(r"(?m)^ +", "", text), re.DOTALL)]
    inline = [
        [command]
        for command in re.findall(r"`([^`\n]*\bdvc [^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    ]
    return [[line.split(" #")[0].strip() for line in block] for block in blocks] + inline


def stages_of(name: str) -> dict[str, dict]:
    """The stages of a profile with their names, such as kd@digits-0, placeholders filled in."""
    params, stages = profile.compose_profile(name), {}
    for stage, entry in GRAPH.items():
        seeds = params["seeds"][f"{stage}_seeds"] if "seed" in entry.get("matrix", {}) else [None]
        for seed in seeds:
            key = stage if stage == "code" else f"{stage}@{name}" + ("" if seed is None else f"-{seed}")
            text = json.dumps(entry).replace("${item.profile}", name).replace("${item.seed}", str(seed))
            stages[key] = json.loads(text)
    return stages


def paths_of(stage: dict, *kinds: str) -> set[str]:
    return {next(iter(o)) if isinstance(o, dict) else o for kind in kinds for o in stage.get(kind, [])}


def test_fault_31_readmes_commands_work_in_the_order_given():
    """In a fresh clone: each stage is one of the profile's, and a single one has what it depends on."""
    committed = set(
        subprocess.run(("git", "ls-files"), cwd=ROOT, capture_output=True, encoding="utf-8").stdout.splitlines()
    )
    checked = []
    pages = (ROOT / name for name in ("README.md", "docs/using.md", "docs/reproducibility.md", "docs/cluster.md"))
    for commands in (block for page in pages for block in shell_commands(page.read_text(encoding="utf-8"))):
        name, there = "digits", set(committed)
        for command in commands:
            words_ = [word for word in command.split() if "=" not in word]
            if words_[:3] == ["python", "-m", "lib.profile"]:
                name = words_[3]
            if "dvc" not in words_ or "repro" not in words_ or "$" in command:
                continue
            targets = [word for word in words_[words_.index("repro") + 1 :] if not word.startswith("-") and word != "&"]
            stages = stages_of(name)
            assert set(targets) <= stages.keys(), f"{command}: a stage of {name}"
            for target in targets if "-s" in words_ else []:
                missing = {d for d in paths_of(stages[target], "deps") - there if not (ROOT / d).is_dir()}
                assert len(commands) == 1 or not missing, f"{command}: {missing}"
            done = stages if "-s" not in words_ else targets
            there |= {path for target in done for path in paths_of(stages[target], "outs", "metrics", "plots")}
            checked += targets
    assert {"kd@digits-20", "kd@digits-21"} <= set(checked)
