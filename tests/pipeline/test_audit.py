"""The audit: both budgets on the same points."""

import pytest

from lib.data import load_dataset
from lib.models import build_classifier
from lib.pipeline import audit

PARAMS = {"teacher": "sde-4", "eps": 0.1, "draws": 3, "queries": 2}
PARAMS |= {"sweep_steps": 1, "sweep_eot": 1, "pgd_steps": 3, "eot": 2}


def test_the_teacher_meets_both_budgets_on_the_same_points(models):
    judge, data = build_classifier("cnn", width=4, seed=0).eval().requires_grad_(False), load_dataset("digits")
    found = audit.attack_teacher(PARAMS, data, models, judge, 0, 5)
    assert found["teacher"] == "sde-4" and found["n_test"] == found["sweep"]["n"] == found["full"]["n"] == 5
    assert found["sweep"]["clean"] == found["full"]["clean"]
    assert [(found[k]["budget"]["steps"], found[k]["budget"]["eot"]) for k in ("sweep", "full")] == [(1, 1), (3, 2)]
    assert found == audit.attack_teacher(PARAMS, data, models, judge, 0, 5)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        audit.main(["speed"])
    assert "invalid choice: 'speed' (choose from 'attack', 'diagnosis')" in capsys.readouterr().err
