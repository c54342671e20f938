"""The cross-check of the attacks runs once per change of them: `tests.crosscheck.run` decides by a hash."""

import subprocess

import pytest

from lib.pipeline import environment
from lib.utils.files import ROOT
from tests.crosscheck import run

SUMMARY = "cross-check: 3 comparisons, largest disadvantage 0 images of 128, median distance at most 0.0 % above"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A project with one attack that passed the cross-check, and the commands that `run.main` starts there."""
    for folder in ("lib/attacks", "tests/crosscheck"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lib/attacks/pgd.py").write_text("alpha = 1\n")
    (tmp_path / "tests/crosscheck/check_attacks.py").write_text("tolerance = 2\n")
    (tmp_path / "tests/crosscheck/requirements.txt").write_text("foolbox==3.3.4\n")
    (tmp_path / run.PASSED).write_text(f"{run.attacks_hash(tmp_path)}\npgd Linf: ours leaves 1/128\n{SUMMARY}\n")
    calls = []
    monkeypatch.setattr("sys.argv", ["run"])
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: calls.append(command) or subprocess.CompletedProcess(command, 3)
    )
    return calls


def test_unchanged_attacks_print_the_stored_result(calls, tmp_path, capsys):
    (tmp_path / "lib/attacks/pgd.py").write_text('"""PGD."""\n\nalpha = 1  # a comment\n')
    run.main(tmp_path)
    assert capsys.readouterr().out == f"{SUMMARY} (cached: attacks unchanged)\n"
    assert calls == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("lib/attacks/pgd.py", "alpha = 2\n"),
        ("lib/attacks/new.py", "alpha = 1\n"),
        ("tests/crosscheck/check_attacks.py", "tolerance = 3\n"),
        ("tests/crosscheck/requirements.txt", "foolbox==3.3.5\n"),
        ("tests/crosscheck/passed.txt", ""),
    ],
)
def test_a_change_runs_the_comparison_and_its_exit_status_counts(path, text, calls, tmp_path):
    (tmp_path / path).write_text(text)
    with pytest.raises(SystemExit) as stop:
        run.main(tmp_path)
    assert stop.value.code == 3
    assert [command[-1] for command in calls] == ["crosscheck"]


def test_the_report_counts_comparisons_and_names_the_worst():
    report = run.Report()
    report.properties = [("line", "pgd"), ("images", -4), ("images", 1), ("images", 0), ("distance", 0.045)]
    report.properties.append(("uncounted", "jsma-z L0 4"))
    assert report.summary() == (
        "cross-check: 3 comparisons, largest disadvantage 1 image of 128, median distance at most 4.5 % above; "
        "not counted: jsma-z L0 4"
    )


def test_the_environment_of_the_cross_check_shares_its_versions_with_the_main_one():
    locks = [environment.read_pins(ROOT / path) for path in ("requirements.txt", "tests/crosscheck/requirements.txt")]
    assert {name for name in locks[0].keys() & locks[1].keys() if locks[0][name] != locks[1][name]} == set()
    assert locks[1].keys() - locks[0].keys() == {
        "adv-lib",
        "adversarial-robustness-toolbox",
        "eagerpy",
        "foolbox",
    }
