"""Pieces of GPU work: each runs, writes what it says, and is refused before long work where something is missing."""

import itertools
import json

import numpy as np
import pytest
import torch

from lib import pretrained
from lib.data import Split, load_dataset
from lib.diffusion.network import load_facts
from lib.distillation import few_step_training
from lib.distillation.few_step import few_step_recipe
from lib.experiments import gpu_diffusion, gpu_distillation, gpu_pieces, kd
from lib.experiments.gpu_pieces import MEASURED_STEPS, epochs_in
from lib.models import accuracy, build_classifier
from lib.pipeline import pieces
from lib.pretrained import MEASURED, load_classifier
from lib.purify import load_purifier
from lib.training import hard_label_loss
from lib.utils import artifacts
from lib.utils.draws import unpack_draws

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
    for name in ("sde-2", "cd-1", "pd-4", "pd-2", "pd-1", "clean-1", "adaptive-1", "label-1", "label-n0-1"):
        assert load_purifier(place / dataset / "diffusion", name)(x).shape == x.shape
    rows = pieces.pieces_table(dataset).splitlines()[2:]
    assert len(rows) == len(NAMES) and all("commit `abc`" in row for row in rows)


def outcomes_of(dataset, name):
    """Return which images each network of a piece classifies correctly: network → condition → bits."""
    correct = pieces.piece_card(dataset, name)["outcomes"]["correct"]
    return {net: {k: unpack_draws(bits)[0] for k, bits in each.items()} for net, each in correct.items()}


def check_distillations(dataset, counts):
    """Metrics of classic and defensive distillation are those of their outcomes; no attack leaves less than all."""
    card, correct = pieces.piece_card(dataset, "kd/labels"), outcomes_of(dataset, "kd/labels")
    students = card["metrics"]["students"]
    assert list(students) == sorted(counts) and card["recipe"]["teacher"] == "resnet18"
    names = {f"{kind}/{n}/s{seed}" for kind in ("hard", "soft") for n in counts for seed in range(3)}
    assert correct.keys() == {"teacher"} | names
    assert card["metrics"]["teacher"] == correct["teacher"]["clean"].mean()
    for n, row in students.items():
        for kind in ("hard", "soft"):
            assert row[kind] == [correct[f"{kind}/{n}/s{seed}"]["clean"].mean() for seed in range(3)]
        assert row["gain"] == pytest.approx(np.mean(row["soft"]) - np.mean(row["hard"]))
    card, correct = pieces.piece_card(dataset, "dd/temperatures"), outcomes_of(dataset, "dd/temperatures")
    assert card["recipe"]["network"]["arch"] == "cnn" and card["recipe"]["effort"]["eps"].keys() == {"small", "large"}
    for name, row in card["metrics"]["models"].items():
        bits = correct[name]
        for ball in ("small", "large"):
            worst, fgsm = (bits[f"{attack}@{row[ball]['eps']:g}"] for attack in ("worst", "fgsm"))
            assert (worst <= fgsm).all() and (fgsm <= bits["clean"]).all()
            assert (row[ball]["worst"], row[ball]["fgsm"], row["clean"]) == (
                worst.mean(),
                fgsm.mean(),
                bits["clean"].mean(),
            )
            unmasked = [k for k in bits if k.endswith(f"@{row[ball]['eps']:g}")]
            assert {f"{k}@{row[ball]['eps']:g}" for k in ("fgsm/T", "apgd-t", "square", "transfer")} < set(unmasked)
    return card


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
    assert {"cd-1", "cd-1 + purified", "pd-1", "adaptive-1 + trades"} < students["metrics"]["defences"].keys()
    assert check_distillations("digits", ["100", "200", "all"])["metrics"]["models"].keys() == {"T1", "T100"}
    progressive = pieces.piece_card("digits", "diffusion/pd")
    assert progressive["metrics"].keys() == {"purified", *(f"pd-{k}_to_ode_100" for k in (1, 2, 4))}
    assert progressive["metrics"]["purified"].keys() == {"n", "pd-1"} and progressive["recipe"]["round_epochs"] == 1
    check_fine_tuned(pieces.piece_card("digits", "resnet18-purified"))
    assert pieces.piece_card("digits", "resnet18")["metrics"].keys() == {"clean", "n", "pgd_20", "n_pgd", "eps"}


def check_fine_tuned(card):
    """The network is another than the one that it began as; its card says of both what they are on the same images."""
    tuned, plain = (load_classifier(f"digits/{name}") for name in ("resnet18-purified", "resnet18"))
    before = plain.state_dict()
    assert not any(torch.equal(v, before[k]) for k, v in tuned.state_dict().items() if k.endswith("0.weight"))
    few = Split(*(t[:40] for t in load_dataset("digits").val))
    metrics = card["metrics"]
    assert metrics["n"] == metrics["plain"]["n"] == 40 and card["recipe"]["images purified by"] == "cd-1"
    assert metrics["clean"] == accuracy(tuned, *few) and metrics["plain"]["clean"] == accuracy(plain, *few)
    assert metrics.keys() >= {"cd-1"} and metrics["plain"].keys() == {"n", "clean", "cd-1"}


@pytest.mark.slow
def test_every_piece_takes_two_steps_at_its_real_size(place, real_mirror, monkeypatch):
    monkeypatch.setenv("DISTILL_DATA_MIRROR", str(real_mirror))
    settings = pieces.compose_profile("cifar10")
    settings["rd"] |= {"steps": 2, "queries": 2, "targets": 1}  # the full attacks are minutes of a GPU
    effort = ("attack_steps", "eot", "last_steps", "last_eot", "first_draws", "finalists", "second_draws")
    settings["dp"] |= dict.fromkeys(effort, 1) | {
        "queries": 2,
        "test_points": 2,
        "fresh_draws": 10,
        "teacher": "sde-12",
    }
    settings["diff"] |= {"first": 8}
    short = ("steps", "queries", "cw_steps", "cw_searches")
    settings["dd"] |= dict.fromkeys(short, 1) | {"temperatures": [1.0, 100.0], "test_points": 4}
    monkeypatch.setattr(few_step_training, "REFERENCE_STEPS", 4)
    monkeypatch.setattr(pieces, "compose_profile", lambda _: settings)
    pieces.main(["--epochs", "2", "--images", "10", "--commit", "abc", *NAMES])
    check_pieces(place, "cifar10", 32, 3)
    check_distillations("cifar10", ["1000", "5000", "all"])
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    assert size < 300e6  # of eight classifiers and nine diffusion networks, half precision


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


@pytest.fixture
def teacher(place):
    """An untrained natural classifier where the piece `resnet18` leaves it."""
    network = {"arch": "cnn", "width": 4}
    about = dict.fromkeys(MEASURED, "none")
    pretrained.save_classifier("digits/resnet18", build_classifier(**network, seed=0), network, about)


def test_both_sides_of_classic_distillation_share_weights_images_and_steps(teacher, monkeypatch):
    trainings = []

    def watch(model, loss, tensors, *, epochs, **options):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        trainings.append((weights, *tensors[:2], epochs * -(-len(tensors[0]) // options["batch_size"]), options))

    monkeypatch.setattr(kd, "train", watch)
    settings = pieces.compose_profile("digits")["kd"]
    gpu_distillation.measure_label_counts(load_dataset("digits"), settings, gpu_pieces.PieceBudget(1), {})
    assert len(trainings) == 3 * 3 * 2
    for hard, soft in zip(trainings[::2], trainings[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(hard[:3], soft[:3], strict=True)) and hard[3:] == soft[3:]
        assert hard[3] == pytest.approx(settings["student_steps"], rel=0.1)
    assert [len(images) for _, images, *_ in trainings[::6]] == [100, 200, 1047]
    first, second = trainings[0], trainings[2]  # of two seeds
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_fewer_labels_are_those_of_the_data_set():
    data = load_dataset("digits")
    few = load_dataset("digits", n_labels=100, seed=2).train
    assert torch.equal(data.train.x[gpu_distillation.labelled_rows(data.train.y, 100, 2)], few.x)
    assert len(gpu_distillation.labelled_rows(data.train.y, 0, 2)) == len(data.train.y)
    assert len(gpu_distillation.labelled_rows(few.y, 200, 2)) == 100


def test_fine_tuning_sees_purified_images_with_fresh_noise_and_their_labels():
    seen = []

    class Noisy(torch.nn.Module):
        evaluations = 1

        def forward(self, x, randn_like):
            return (x + 0.1 * randn_like(x)).clamp(0, 1)

    class Blind(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 10, requires_grad=True)

    recipe = pieces.robust_recipe(pieces.compose_profile("digits")["rd"], "resnet18")
    loss = gpu_diffusion.purified_images_loss(Noisy(), recipe)
    x, y, generator = torch.full((4, 1, 8, 8), 0.5), torch.arange(4), torch.Generator().manual_seed(0)
    for _ in range(2):
        value, _ = loss(Blind(), x, y, generator=generator, epoch=0)
        assert value.item() == pytest.approx(np.log(10))
    assert not torch.equal(seen[0], seen[1]) and not any(torch.equal(images, x) for images in seen)


def test_progressive_students_need_enough_steps_to_begin_with(place):
    recipe = few_step_recipe(pieces.compose_profile("smoke")["diff"] | {"first": 4})
    with pytest.raises(ValueError, match="expected first to be at least 8 steps, got first 4"):
        gpu_diffusion.make_progressive(load_dataset("digits"), recipe, gpu_pieces.PieceBudget(1), {})
