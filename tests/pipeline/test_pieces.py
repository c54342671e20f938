"""Pieces of GPU work: each runs, writes what it says, and is refused before long work where something is missing."""

import itertools
import json

import pytest
import torch

from lib import pretrained
from lib.diffusion.network import load_facts
from lib.experiments import gpu_pieces
from lib.experiments.gpu_pieces import MEASURED_STEPS, epochs_in
from lib.models import build_classifier
from lib.pipeline import pieces
from lib.pretrained import MEASURED, load_classifier
from lib.purify import load_purifier
from lib.training import hard_label_loss
from lib.utils import artifacts

NAMES = [piece.name for piece in pieces.PIECES]


@pytest.fixture
def place(tmp_path, monkeypatch):
    for module in (pretrained, artifacts):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path / "data/pretrained"


def refusal(*arguments):
    with pytest.raises(SystemExit) as stopped:
        pieces.main([*map(str, arguments)])
    return str(stopped.value)


def check_pieces(place, dataset, size, channels):
    """Every piece is there, as its card says; purifier and classifier take an image."""
    for name in NAMES:
        card = pieces.piece_card(dataset, name)
        assert card and set(MEASURED) <= card.keys() and card["commit"] == "abc" and card["minutes"] > 0
        assert json.dumps(card).count("NaN") == 0
    x = torch.rand(1, channels, size, size)
    for name in (name for name in NAMES if "/" not in name):
        assert load_classifier(f"{dataset}/{name}")(x).isfinite().all()
    for name in ("sde-2", "cd-1", "clean-1", "adaptive-1", "label-1", "label-n0-1"):
        assert load_purifier(place / dataset / "diffusion", name)(x).shape == x.shape
    rows = pieces.pieces_table(dataset).splitlines()[2:]
    assert len(rows) == len(NAMES) and all("commit `abc`" in row for row in rows)


def test_every_piece_runs_on_a_small_profile(place, capsys):
    pieces.main(["--profile", "smoke"])
    assert capsys.readouterr().out.count("| no |") == len(NAMES)
    pieces.main(["--profile", "smoke", "--epochs", "1", "--images", "40", "--commit", "abc", *NAMES[:2]])
    pieces.main(["--profile", "smoke", "--epochs", "1", "--images", "40", "--commit", "abc", *NAMES[2:]])
    check_pieces(place, "digits", 8, 1)
    facts = load_facts(place / "digits/diffusion/teacher")
    assert facts["about"]["metrics"]["curve"] == [
        {"minutes": pytest.approx(facts["about"]["minutes"]), "error": -facts["history"][0]["score"]}
    ]
    students, everyone = (pieces.piece_card("digits", f"matched/{part}") for part in ("students", "teacher"))
    assert students["metrics"]["n_test"] == 4 and everyone["metrics"]["n_test"] == 1
    assert students["outcomes"]["images"][:1] == everyone["outcomes"]["images"]
    assert everyone["metrics"]["defences"].keys() - students["metrics"]["defences"].keys() == {"sde-100", "ddim-100"}
    attacked = pieces.piece_card("digits", "autoattack/resnet18-ard")
    assert attacked["metrics"]["robust"] <= attacked["metrics"]["clean"]
    assert attacked["outcomes"]["correct"].keys() == {"resnet18-ard"}
    assert not list((place.parent / "digits/checkpoints").iterdir())
    purified = pieces.piece_card("digits", "diffusion/cd")["metrics"]["purified"]
    assert purified.keys() == {"n", "sde-100", "cd-1"} and purified["n"] == 40
    assert pieces.piece_card("digits", "resnet18")["metrics"].keys() == {"clean", "n", "pgd_20", "n_pgd", "eps"}


@pytest.mark.slow
def test_every_piece_takes_two_steps_at_its_real_size(place, real_mirror, monkeypatch):
    monkeypatch.setenv("DISTILL_DATA_MIRROR", str(real_mirror))
    settings = pieces.compose_profile("cifar10")
    settings["rd"] |= {"steps": 2, "queries": 2, "targets": 1}  # the full attacks are minutes of a GPU
    effort = ("attack_steps", "eot", "last_steps", "last_eot", "first_draws", "finalists", "second_draws")
    settings["dp"] |= dict.fromkeys(effort, 1) | {
        "queries": 2,
        "test_points": 4,
        "fresh_draws": 10,
        "teacher": "sde-12",
    }
    monkeypatch.setattr(pieces, "compose_profile", lambda _: settings)
    pieces.main(["--epochs", "2", "--images", "10", "--commit", "abc", *NAMES])
    check_pieces(place, "cifar10", 32, 3)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    assert size < 250e6  # of seven classifiers and six diffusion networks, half precision


def test_what_cannot_run_is_refused_before_any_work(place, monkeypatch):
    monkeypatch.setattr(pieces, "load_dataset", lambda *_, **__: pytest.fail("begins"))
    assert "expected pieces among resnet18, diffusion/teacher" in refusal("resnet19")
    assert "expected resnet18, diffusion/teacher before diffusion/cd: name it too" in refusal("diffusion/cd")
    assert "expected resnet18, diffusion/cd before diffusion/label" in refusal("diffusion/label")
    assert "expected --epochs above 0, got 0" in refusal("resnet18", "--epochs", 0)
    assert "expected --minutes above 0, got -1.0" in refusal("resnet18", "--minutes", "-1")
    assert "cifar11" in refusal("--profile", "cifar11")


def test_pieces_run_in_the_order_of_the_table(place):
    assert [p.name for p in pieces.choose_pieces("digits", NAMES[::-1])] == NAMES


def test_epochs_are_what_fits_and_the_network_is_as_it_was(monkeypatch):
    """A clock of 1 s a look: each short training takes 1 s, and so does a validation."""
    ticks = itertools.count()
    monkeypatch.setattr(gpu_pieces.time, "perf_counter", lambda: next(ticks))
    net = build_classifier("cnn", width=4, seed=0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = torch.rand(2000, 1, 8, 8), torch.randint(0, 10, (2000,))
    few = MEASURED_STEPS * 5  # 100 of 2,000 images: an epoch takes 20 s and its validation 1 s
    assert few == 100 and epochs_in(2.1, net, hard_label_loss, (x, y), lambda _: 0.0, 5) == 6
    assert epochs_in(2.09, net, hard_label_loss, (x, y), lambda _: 0.0, 5) == 5
    assert epochs_in(0.01, net, hard_label_loss, (x, y), lambda _: 0.0, 5) == 1
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
