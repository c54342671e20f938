"""The audit: both budgets on the same points."""

import pytest

from lib.data import load_dataset
from lib.models import build_classifier
from lib.pipeline import audit

PARAMS = {"teacher": "sde-4", "eps": 0.1, "draws": 3, "queries": 2}
PARAMS |= {"sweep_steps": 1, "sweep_eot": 1, "pgd_steps": 3, "eot": 2}


def test_the_teacher_meets_both_budgets_on_the_same_images(models):
    classifier, data = build_classifier("cnn", width=4, seed=0).eval().requires_grad_(False), load_dataset("digits")
    results = audit.attack_teacher(PARAMS, data, models, classifier, 0, 5)
    assert results["teacher"] == "sde-4" and results["n_test"] == results["sweep"]["n"] == results["full"]["n"] == 5
    assert results["sweep"]["clean"] == results["full"]["clean"]
    assert [(results[k]["budget"]["steps"], results[k]["budget"]["eot"]) for k in ("sweep", "full")] == [(1, 1), (3, 2)]
    assert results == audit.attack_teacher(PARAMS, data, models, classifier, 0, 5)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        audit.main(["speed"])
    assert "invalid choice: 'speed' (choose from 'attack', 'diagnosis')" in capsys.readouterr().err
