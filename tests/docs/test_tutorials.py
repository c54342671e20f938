"""The tutorials run as they stand: their Python in one process, their commands in the same folder."""

import re
import runpy
import shlex
import sys
import warnings
from unittest import mock

import pytest

from lib.utils.files import ROOT

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"(?ms)^```(\w+)\n(.*?)^```$")


def run_command(line):
    """Run a command of Python in this process; returns its exit status."""
    command = shlex.split(line, comments=True)
    assert command[:2] == ["python", "-m"], f"expected a command of Python, got {line}"
    with mock.patch.object(sys, "argv", command[2:]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'lib[.\\w]*' found in sys.modules", RuntimeWarning)  # imported already
        try:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code or 0
    return 0


def run_page(text, folder):
    """Run the blocks of a page in a folder, in order; returns how many there were of each language.

    A block that begins with the comment `# name.py` is written to that file, to be imported later.
    """
    blocks, values = BLOCK.findall(text), {"__name__": "tutorial"}
    for language, code in blocks:
        if language == "sh":
            for line in code.strip().splitlines():
                assert run_command(line) == 0, line
        elif language == "python":
            name = re.match(r"# (\w+\.py)\n", code)
            if name:
                (folder / name[1]).write_text(code, encoding="utf-8")
                sys.modules.pop(name[1].removesuffix(".py"), None)  # of another test
            else:
                exec(compile(code, f"tutorial, line {text[: text.index(code)].count(chr(10)) + 1}", "exec"), values)
    languages = [language for language, _ in blocks]
    return {language: languages.count(language) for language in sorted(set(languages))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the tutorial is read: modules are imported from it, and forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs_as_it_stands(path, folder):
    assert run_page(path.read_text(encoding="utf-8"), folder)["python"] >= 3


def test_a_tutorial_that_has_gone_stale_fails(folder):
    with pytest.raises(ImportError):
        run_page("```python\nfrom lib.training import no_such_name\n```\n", folder)
    with pytest.raises(AssertionError, match="no-such-command"):
        run_page("```sh\npython -m lib no-such-command\n```\n", folder)
    text = "```python\n# part.py\nvalue = 3\n```\n\n```python\nfrom part import value\n\nassert value == 3\n```\n"
    assert run_page(text, folder) == {"python": 2}


def test_pages_for_users_have_code_that_compiles():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for language, code in BLOCK.findall(path.read_text(encoding="utf-8")):
            if language == "python":
                compile(code, str(path), "exec")
