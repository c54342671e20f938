"""The audit: both budgets on the same points, and what an unfinished run has found."""

import pytest

from lib import audit, dp
from lib.data import load
from lib.models import build
from lib.paths import write_json
from lib.threats import Budget

PARAMS = {"teacher": "sde-4", "eps": 0.1, "draws": 3, "queries": 2}
PARAMS |= {"sweep_steps": 1, "sweep_eot": 1, "pgd_steps": 3, "eot": 2}


def test_the_teacher_meets_both_budgets_on_the_same_points(models):
    judge, data = build("cnn", width=4, seed=0).eval().requires_grad_(False), load("digits")
    found = audit.attack(PARAMS, data, models, judge, 0, 5)
    assert found["teacher"] == "sde-4" and found["n_test"] == found["sweep"]["n"] == found["full"]["n"] == 5
    assert found["sweep"]["clean"] == found["full"]["clean"]
    assert [(found[k]["budget"]["steps"], found[k]["budget"]["eot"]) for k in ("sweep", "full")] == [(1, 1), (3, 2)]
    assert found == audit.attack(PARAMS, data, models, judge, 0, 5)


def test_rows_of_an_unfinished_run_are_kept_if_all_are_there(tmp_path):
    budgets = {"full": Budget(3, 2, draws=3, queries=2), "sweep": Budget(1, 1, draws=3, queries=2)}
    unseen = {"ε 0.05": (0.05, "Linf"), "L2 0.5": (0.5, "L2")}
    due = dp.protocol("sde-4", 2, eps=0.1, names=["cd-1", "grey-1"], unseen=unseen, **budgets)
    half = {k: 0.5 for k in ("average", "worst", "majority", "clean", "control")}
    for key, row in due.items():
        left = half | {"others": {name: half for name in row.others}, "n": 4}
        write_json(tmp_path / "dp-s1-ab" / "rows" / f"{key.replace('/', ' ')}.json", left)
    found = audit.rows(PARAMS | {"steps": 2}, 1, tmp_path)
    assert found["threats"].keys() == due.keys() and found["strongest"]["clean-2"]["average"] == 0.5
    assert found["beaten"] == [] and (found["full"]["steps"], found["sweep"]["eot"]) == (3, 1)
    (tmp_path / "dp-s1-ab" / "rows" / "clean-2 exact.json").unlink()
    with pytest.raises(KeyError, match="clean-2/exact"):
        audit.rows(PARAMS | {"steps": 2}, 1, tmp_path)
    with pytest.raises(FileNotFoundError, match="0 unfinished runs of seed 2"):
        audit.rows(PARAMS | {"steps": 2}, 2, tmp_path)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        audit.main(["speed"])
    assert "invalid choice: 'speed' (choose from 'attack', 'diagnosis', 'rows')" in capsys.readouterr().err
