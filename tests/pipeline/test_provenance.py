"""A run's record is about this very checkout: its commit, its changes, its code as it is."""

import os
import shutil
import subprocess

import pytest

from lib.pipeline import provenance
from lib.utils.code_hash import tree_hash
from lib.utils.files import ROOT

COMMITTER = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")


def git(folder, *arguments):
    subprocess.run(("git", *COMMITTER, *arguments), cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one module and one notebook, in a folder of a folder; the root for the time of the test."""
    root = tmp_path / "outer" / "project"
    for name in ("lib/a.py", "lib/data/b.yaml", "notebooks/c.ipynb", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name} 1\n2\n", encoding="utf-8")
    monkeypatch.setattr(provenance, "ROOT", root)
    return root


def commit(folder):
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "start")


def test_fault_17_a_commit_is_that_of_the_projects_own_repository(project, monkeypatch):
    assert provenance.git_state() == (provenance.NO_REPOSITORY, None)
    commit(project.parent)  # the project lies in another repository
    assert provenance.git_state() == (provenance.NO_REPOSITORY, None)
    git(project, "init", "-q")
    assert provenance.git_state() == ("no commit yet", None)
    commit(project)
    sha, dirty = provenance.git_state()
    assert len(sha) == 40 and dirty is False
    monkeypatch.setenv("GIT_DIR", str(project.parent / ".git"))  # as in a hook of the other repository
    assert provenance.git_state() == (sha, False)


@pytest.mark.parametrize("name", ["lib/new.py", "notebooks/new.ipynb", "lib/a.py", "lib/deep/new.py"])
def test_fault_17_code_that_git_does_not_know_is_a_change(project, name):
    commit(project)
    before = tree_hash(project)
    (project / "other.txt").write_text("no code", encoding="utf-8")
    assert provenance.git_state()[1] is False and tree_hash(project) == before
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("changed", encoding="utf-8")
    assert provenance.git_state()[1] is True and tree_hash(project) != before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_fault_17_a_repository_of_another_owner_is_named(project, tmp_path, monkeypatch):
    commit(project)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for path in (project, project / ".git"):
        os.chown(path, 12345, 12345)
    text, dirty = provenance.git_state()
    assert text.startswith("unknown: another user owns the repository") and "safe.directory" in text and dirty is None


def test_without_git_there_is_no_commit(project, monkeypatch):
    commit(project)
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() == (provenance.NO_REPOSITORY, None)


@pytest.mark.parametrize("state", [("a" * 40, True), (provenance.NO_REPOSITORY, None)])
def test_the_line_to_read_says_the_same(state):
    record = {"notebook": "a.ipynb", "git_commit": state[0], "git_dirty": state[1], "code_sha256": "b" * 64, "seed": 0}
    record |= {"device": "CPU", "python": "3", "wall_seconds": 1.0, "packages": {"torch": "2"}}
    text = provenance.provenance_text(record)
    assert ("aaaaaaaaaaaa" in text and "uncommitted" in text) == (state[1] is True)
    assert (provenance.NO_REPOSITORY in text) == (state[1] is None) and "bbbbbbbbbbbb" in text


def test_fault_18_a_clone_with_other_line_ends_is_clean_and_hashes_are_equal(tmp_path):
    """As Windows has them, core.autocrlf: .gitattributes decides, and the hash of the code needs not even that."""
    source = tmp_path / "source"
    for name in ("lib/data.py", "lib/report/claims.yaml", "notebooks/06_report.ipynb", "dvc.yaml", ".gitattributes"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    commit(source)
    git(tmp_path, "clone", "-q", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", "source", "clone")
    clone = tmp_path / "clone"
    for path in (p for p in source.rglob("*") if p.is_file() and ".git" not in p.parts):
        assert (clone / path.relative_to(source)).read_bytes() == path.read_bytes(), path.name
    status = subprocess.run(("git", "status", "--porcelain"), cwd=clone, capture_output=True, check=True).stdout
    assert status == b"" and tree_hash(clone) == tree_hash(source)
    for path in clone.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert tree_hash(clone) == tree_hash(source)
