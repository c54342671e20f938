"""Where experiment 5 takes experiment 4's networks from: the pipeline's stage `diff`, or by hand, small ones."""

import shutil

import pytest

from lib.data import load_dataset
from lib.experiments import diffpure_students
from lib.utils import artifacts


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Results go to a folder of their own, and training fails the test."""
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    monkeypatch.setattr(diffpure_students, "ROOT", tmp_path, raising=False)
    monkeypatch.setattr(diffpure_students, "train_once", lambda *_, **__: pytest.fail("trains"))
    return tmp_path


@pytest.mark.parametrize("profile", ["smoke", "digits", "cifar10"])
def test_fault_38_a_stage_never_makes_its_own_input(places, models, profile):
    """Nor takes another profile's: `diff` was not run, or its outputs are gone."""
    shutil.copytree(models, places / "data/other/models/diff-s0")
    with pytest.raises(
        FileNotFoundError, match=rf"data/{profile}/models/diff-s0, got none: run `dvc repro diff@{profile}-0`"
    ):
        diffpure_students.few_step_networks(profile, "other", load_dataset("digits"), 0)
    assert not (places / "data" / profile).exists()


def test_by_hand_networks_are_those_of_the_data_sets_profile_or_small_ones(places, models, monkeypatch):
    digits = load_dataset("digits")
    monkeypatch.setattr(diffpure_students, "train_once", lambda folder, _: shutil.copytree(models / "cd", folder))
    monkeypatch.setattr(diffpure_students, "load_network", lambda folder: None)
    folder = diffpure_students.few_step_networks(artifacts.SCRATCH, "digits", digits, 0)
    assert folder == places / "data/scratch/models/diff-s0" and (folder / "recipe.json").exists()
    other = shutil.copytree(models, places / "data/digits/models/diff-s1")
    assert diffpure_students.few_step_networks(artifacts.SCRATCH, "digits", digits, 1) == other
    own = shutil.copytree(models, places / "data/smoke/models/diff-s1")
    assert diffpure_students.few_step_networks("smoke", "digits", digits, 1) == own
