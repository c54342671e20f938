"""The frozen protocol: its files are those of its commit, and the records of its seeds were made under it."""

import shutil
import subprocess
import sys

import pytest

from lib.pipeline import protocol as command
from lib.pipeline import provenance
from lib.pipeline.profile import compose_profile
from lib.pipeline.protocol import CHANGE_REMEDY, committed_hash
from lib.pipeline.provenance import git_state, git_text
from lib.utils import artifacts, protocol
from lib.utils.artifacts import record_name, results_dir
from lib.utils.files import ROOT, read_json
from lib.utils.protocol import PROTOCOL, protocol_state, read_protocol
from lib.utils.yaml_files import read_mapping
from tests.pipeline.clones import environment, git

FROZEN = read_protocol()
SEEDS = [
    (profile, experiment, seeds)
    for profile, experiments in FROZEN["seeds"].items()
    for experiment, seeds in experiments.items()
]
IDENTITY = ("-c", "user.name=t", "-c", "user.email=t@t")
CLAIMS = "lib/report/claims.yaml"


def test_the_frozen_files_are_as_they_were_frozen():
    assert FROZEN["changed"] == [], f"frozen files of {FROZEN['name']} changed: {CHANGE_REMEDY}"


def wrong_history(frozen: dict) -> list[str]:
    """Return what in the history is not as the protocol says; skip the test where the history does not reach so far."""
    if git_state()[1] is None:
        pytest.skip("not a git repository")
    added = {f"profiles/{one['profile']}.yaml": one["commit"] for one in frozen.get("additions", [])}
    commits, (shallow, _) = {frozen["commit"], *added.values()}, git_text("rev-parse", "--is-shallow-repository")
    wrong = []
    for commit in sorted(commits):
        if not git_text("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")[0]:
            if shallow == "true":
                pytest.skip(f"a shallow repository without commit {commit[:7]}")
            return [f"expected commit {commit} in the history, got none"]
        if shallow != "true" and not is_ancestor(commit):
            wrong += [f"expected commit {commit} to be an ancestor of HEAD"]
    files = frozen["files"].items()
    return wrong + [name for name, known in files if committed_hash(added.get(name, frozen["commit"]), name) != known]


def is_ancestor(commit: str) -> bool:
    return git_text("merge-base", commit, "HEAD")[0] == commit


def test_the_frozen_files_are_those_of_the_commit():
    assert wrong_history(FROZEN) == [], CHANGE_REMEDY


@pytest.mark.parametrize(("profile", "experiment", "seeds"), SEEDS)
def test_the_profile_runs_the_protocols_seeds(profile, experiment, seeds):
    assert compose_profile(profile)["seeds"][f"{experiment}_seeds"] == seeds, f"profiles/ or {PROTOCOL}: one is wrong"


@pytest.mark.parametrize(("profile", "experiment", "seeds"), SEEDS)
def test_records_of_the_protocols_seeds_were_made_under_it(profile, experiment, seeds):
    expected = {"name": FROZEN["name"], "commit": FROZEN["commit"], "changed": []}
    paths = [results_dir(profile, "records") / record_name(experiment, seed) for seed in seeds]
    states = {path.name: read_json(path).get("protocol") for path in paths if path.exists()}
    assert states == dict.fromkeys(states, expected)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A repository of the package and the frozen files alone, with its protocol frozen; the root for the test."""
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "*.part")
    for folder in ("lib", "profiles"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    git(root, "init", "-q")
    commit_all(root)
    for module in (artifacts, command, protocol, provenance):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(command, "read_protocol", lambda: read_protocol(root))
    monkeypatch.setattr(artifacts, "protocol_state", lambda: protocol_state(root))
    command.freeze("protocol 1")
    return root


def commit_all(folder):
    git(folder, "add", ".")
    git(folder, *IDENTITY, "commit", "-qm", "c")


def edit(folder, name, text="# changed\n"):
    path = folder / name
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_freezing_keeps_seeds_and_earlier_and_names_the_commit(copy):
    before, after = read_protocol(), read_protocol(copy)
    assert after["commit"] == git_state()[0] and after["changed"] == [] and wrong_history(after) == []
    assert (
        all(after[key] == before[key] for key in ("seeds", "earlier"))
        and after["files"].keys() == before["files"].keys()
    )
    assert "changed" not in read_mapping(copy / PROTOCOL)


def test_a_profile_is_added_once_by_a_commit_of_its_own_before_its_run(copy):
    first, name = read_protocol(copy), "profiles/mnist.yaml"
    with pytest.raises(ValueError, match=r"expected seeds of profile 'mnist' in .*: write them there first"):
        command.add_profile("mnist")
    (copy / PROTOCOL).write_text(
        (copy / PROTOCOL).read_text(encoding="utf-8").replace("seeds:\n", "seeds:\n  mnist:\n    kd:\n    - 10\n"),
        encoding="utf-8",
    )
    edit(copy, name)
    with pytest.raises(ValueError, match=f"commit {name} first"):
        command.add_profile("mnist")
    commit_all(copy)
    command.main(["--add", "mnist"])
    added = read_protocol(copy)
    assert {key: added[key] for key in ("name", "commit", "date")} == {
        key: first[key] for key in ("name", "commit", "date")
    }
    assert added["additions"][-1] == {"profile": "mnist", "commit": git_state()[0], "date": added["date"]}
    assert added["files"].keys() - first["files"].keys() == {name} and wrong_history(added) == []
    later = added | {"additions": []}
    assert wrong_history(later) == [name]  # in the first commit it was another
    with pytest.raises(ValueError, match="expected a profile that is not frozen yet, got 'mnist'"):
        command.add_profile("mnist")
    edit(copy, name)
    assert read_protocol(copy)["changed"] == [name]
    with pytest.raises(ValueError, match=f"expected protocol 1 as it was frozen, got changes to {name}"):
        command.add_profile("cifar10")
    commit_all(copy)
    frozen = command.freeze("protocol 2")
    assert "additions" not in frozen and name in frozen["files"] and wrong_history(frozen) == []


def test_uncommitted_frozen_files_cannot_be_frozen(copy):
    before = (copy / PROTOCOL).read_bytes()
    edit(copy, CLAIMS)
    with pytest.raises(
        ValueError, match=r"expected the frozen files of commit .*: commit lib/report/claims.yaml first"
    ):
        command.freeze("protocol 2")
    git(copy, "add", CLAIMS)  # staged is not committed
    with pytest.raises(SystemExit, match=r"commit lib/report/claims.yaml first"):
        command.main(["--freeze", "protocol 2"])
    assert (copy / PROTOCOL).read_bytes() == before
    commit_all(copy)
    (copy / "profiles/digits.yaml").unlink()
    with pytest.raises(ValueError, match=r"commit profiles/digits.yaml first"):
        command.freeze("protocol 2")
    git(copy, "checkout", "-q", "profiles/digits.yaml")
    frozen = command.freeze("protocol 2")
    assert (
        frozen["name"] == "protocol 2" and frozen["commit"] == git_state()[0] and read_protocol(copy)["changed"] == []
    )


def test_a_history_that_is_not_the_protocols_is_noticed(copy):
    frozen = read_protocol(copy)
    edit(copy, CLAIMS)
    commit_all(copy)
    assert wrong_history(frozen) == []
    later = frozen | {"commit": git_state()[0]}
    assert wrong_history(later) == [CLAIMS]
    assert wrong_history(frozen | {"commit": "f" * 40}) == [f"expected commit {'f' * 40} in the history, got none"]
    git(copy, "reset", "-q", "--hard", frozen["commit"])
    assert "ancestor" in wrong_history(later)[0]


def test_a_record_names_the_protocol_and_what_changed(copy, capsys):
    save = lambda seed: artifacts.save_record("p", "kd", seed, metrics={"a": 1}, arrays={})  # noqa: E731
    frozen = read_protocol(copy)
    expected = {"name": "protocol 1", "commit": frozen["commit"], "changed": []}
    assert save(0)["protocol"] == expected and artifacts.load_record("p", "kd", 0)["protocol"] == expected
    assert read_json(copy / "data/p/metrics/kd-s0.json") == {"a": 1}
    command.main([])
    assert f"protocol 1, commit {frozen['commit']}" in capsys.readouterr().out
    for path in (copy / CLAIMS, copy / "profiles/base.yaml"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # the same text
    assert save(1)["protocol"] == expected
    edit(copy, CLAIMS)
    (copy / "lib/report/statistics.py").unlink()
    shutil.rmtree(copy / ".git")  # a record needs no git
    assert save(2)["protocol"] == expected | {"changed": [CLAIMS, "lib/report/statistics.py"]}
    with pytest.raises(
        SystemExit, match=r"changed since: lib/report/claims.yaml, .*: freeze a new protocol .* or restore"
    ):
        command.main([])
    with pytest.raises(SystemExit, match="expected a repository with a commit, got not a git repository"):
        command.main(["--freeze", "protocol 2"])


def test_the_command_runs(copy):
    edit(copy, CLAIMS)
    run = (sys.executable, "-m", "lib.pipeline.protocol")
    done = subprocess.run(run, cwd=copy, env=environment(copy), capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and f"changed since: {CLAIMS}: freeze a new protocol" in done.stderr
