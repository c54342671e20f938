"""Runs of the commands as a visitor types them, with tiny budgets."""

import sys

import pytest

from lib import __main__ as commands
from lib.commands.arguments import EFFORTS, Effort
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws

TINY = Effort(AttackEffort(2, 1, 4, 1, 1), MeasuringDraws(1, 1, 1, 10), 2, 2, 4, 2)

MODULE = """
import torch
from lib.pretrained import load_classifier
from tests.controls import detached_input, nan_off_grid, random_output

plain = lambda: load_classifier("digits/natural")
masked = lambda: detached_input(plain())
broken = lambda: nan_off_grid(plain())
noisy = lambda: random_output(plain(), torch.default_generator)
network = plain()
number = 3
nothing = lambda: None
"""


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command with tiny budgets; returns exit status, what it printed, and what it said on leaving."""
    monkeypatch.setitem(EFFORTS, "standard", TINY)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lib", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            commands.main()
        code = left.value.code
        return code if isinstance(code, int) else 1, capsys.readouterr().out, "" if isinstance(code, int) else code

    return run


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A visitor's folder with models of his own in `mine.py`."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path
