"""Names that become files and folders are plain, whoever gives them: also notebooks run by hand."""

import pytest
from torch import nn

from lib.report import claims, figures
from lib.utils import artifacts


@pytest.mark.parametrize("name", ["", "../../trav", "a/b", "/abs", "..", ".a", "-a", "a" * 65, "a\n", "a b", "é"])
def test_fault_40_names_that_become_paths_are_plain(name, tmp_path, monkeypatch):
    for module in (artifacts, claims, figures):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    calls = [
        lambda: artifacts.results_dir(name, "metrics"),
        lambda: artifacts.save_record(name, "kd", 0, metrics={}, arrays={}),
        lambda: artifacts.save_record("p", name, 0, metrics={}, arrays={}),
        lambda: artifacts.load_record("p", name, 0),
        lambda: artifacts.save_model(nn.Linear(1, 1), name, "m"),
        lambda: artifacts.save_model(nn.Linear(1, 1), "p", name if name != "a/b" else "a//b"),
        lambda: artifacts.load_model(nn.Linear(1, 1), name, "m"),
        lambda: claims.load_results(name),
        lambda: figures.save_figure(figures.plt.figure(), name, "f"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="to be a name of up to 64 letters"):
            call()
    figures.plt.close("all")
    assert not list(tmp_path.iterdir())


def test_models_may_stand_in_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    path = artifacts.save_model(nn.Linear(1, 1), "p", "diff-s0/classifier")
    assert path == tmp_path / "data/p/models/diff-s0/classifier.safetensors" and path.exists()


def test_a_record_has_outcomes_where_it_is_given_some_and_older_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    outcomes = {"images": [3, 1], "correct": {"a": {"clean": {"draws": 1, "n": 2, "correct": "gA=="}}}}
    new = artifacts.save_record("p", "kd", 0, metrics={"n_test": 2}, arrays={}, outcomes=outcomes)
    old = artifacts.save_record("p", "kd", 1, metrics={"n_test": 2}, arrays={})
    assert artifacts.load_records("p", "kd", [0, 1]) == [new, old]
    assert new["outcomes"] == outcomes and "outcomes" not in old
    assert "outcomes" not in (tmp_path / "data/p/metrics/kd-s0.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["", '{"a": 1', "\ufeff{}", '{"a": NaN'])
def test_a_record_that_was_half_written_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    path = tmp_path / "data/p/records/kd-s0.json"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected JSON in .*kd-s0.json, got .*: restore it"):
        artifacts.load_record("p", "kd", 0)
