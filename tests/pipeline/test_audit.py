"""The audit: the teacher under experiment 5's attack and under many exact gradients, on the same images."""

import pytest

from lib.data import load_dataset
from lib.models import build_classifier
from lib.pipeline import audit

PARAMS = {"teacher": "sde-12", "eps": 0.1, "attack_steps": 8, "eot": 1, "queries": 2, "last_steps": 4, "last_eot": 2}
PARAMS |= {"first_draws": 2, "finalists": 2, "second_draws": 2, "fresh_draws": 10}


def test_the_teacher_meets_both_attacks_on_the_same_images(models, monkeypatch):
    monkeypatch.setattr(audit, "FULL_STEPS", 3)
    monkeypatch.setattr(audit, "FULL_DRAWS", 10)
    classifier, data = build_classifier("cnn", width=4, seed=0).eval().requires_grad_(False), load_dataset("digits")
    results = audit.attack_teacher(PARAMS, data, models, classifier, 0, 5)
    assert results["teacher"] == "sde-12" and results["n_test"] == 5
    assert results["effort"]["full"] == {"steps": 3, "eot": 4} and results["effort"]["matched"]["last_eot"] == 2
    assert all(0 <= results[k]["worst_of_10"] <= results[k]["accuracy"] <= 1 for k in ("matched", "full"))
    assert results == audit.attack_teacher(PARAMS, data, models, classifier, 0, 5)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        audit.main(["speed"])
    assert "invalid choice: 'speed' (choose from 'attack', 'diagnosis')" in capsys.readouterr().err
