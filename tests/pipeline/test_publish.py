"""Networks of the repository are those of the committed records: their answers, and what their cards state."""

import numpy as np
import pytest

from lib import pretrained
from lib.data import load_dataset
from lib.diffusion.network import load_facts
from lib.evaluation.matched_attacks import correct_draws
from lib.experiments.diffpure import build_defence
from lib.models import predict_classes
from lib.pipeline import publish
from lib.pretrained import load_classifier, pretrained_folder
from lib.utils.artifacts import load_record
from lib.utils.draws import NO_ATTACK, unpack_draws
from lib.utils.files import read_json

RUN = ("digits", "dp", 20)


@pytest.fixture(scope="module")
def record():
    return load_record(*RUN)


@pytest.fixture(scope="module")
def images(record):
    data = load_dataset("digits")
    rows = record["outcomes"]["images"]
    return data.test.x[rows], data.test.y[rows]


@pytest.mark.parametrize(("name", "defence"), [("natural", "none"), ("trades", "trades")])
def test_a_classifier_answers_as_the_record_says(record, images, name, defence):
    x, y = images
    right = (predict_classes(load_classifier(f"digits/{name}"), x) == y).numpy()
    assert np.array_equal(right, unpack_draws(record["outcomes"]["correct"][defence][NO_ATTACK])[0])
    card = read_json(pretrained_folder(f"digits/{name}") / "card.json")
    assert card["metrics"][defence]["clean"] == pytest.approx(right.mean())
    assert card["metrics"][defence]["accuracy"] == record["metrics"]["defences"][defence]["accuracy"]


@pytest.mark.parametrize("name", ["ddim-1", "clean-1", "adaptive-1", "adaptive-2", "label-1", "label-n0-1"])
def test_a_purifier_answers_as_the_record_says(record, images, name):
    """The same noise, so the same answers, but where another processor rounds differently."""
    x, y = images
    known = unpack_draws(record["outcomes"]["correct"][name][NO_ATTACK])
    defence = build_defence(pretrained_folder("digits/diffusion"), name, load_classifier("digits/natural"))
    right, _ = correct_draws(defence, x, y, len(known), record["seed"], NO_ATTACK)
    assert (right == known).mean() > 0.99
    kind = "teacher" if name.startswith("ddim") else name.rsplit("-", 1)[0]
    metrics = load_facts(pretrained_folder("digits/diffusion") / kind)["about"]["metrics"]
    assert metrics[name]["accuracy"] == record["metrics"]["defences"][name]["accuracy"]


def test_what_was_not_run_here_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"lib.pipeline.publish: .*digits-77|lib.pipeline.publish: .*dp-s77"):
        publish.main(["digits", "77"])
    monkeypatch.setattr(publish, "results_dir", lambda *_: tmp_path)
    with pytest.raises(SystemExit, match="expected a run of this machine, got none: `dvc repro dp@digits-20`"):
        publish.main(["digits", "20"])


def test_a_classifier_of_another_run_is_refused(record):
    data, other = load_dataset("digits"), load_classifier("digits/trades")
    publish.check_answers(other, data, record, "trades")
    with pytest.raises(ValueError, match=r"expected the classifier that digits's record calls 'none', got other answ"):
        publish.check_answers(other, data, record, "none")


def test_published_networks_are_listed():
    assert {"digits/diffusion", "digits/natural", "digits/trades"} <= set(pretrained.pretrained_names())
