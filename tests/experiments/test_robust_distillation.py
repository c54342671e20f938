"""Experiment 3's parts: equal budgets, choice by validation, controls, and work side by side that changes nothing."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from lib.attacks.transfer import train_surrogate
from lib.data import Split, load_dataset
from lib.distillation.adversarial import METHODS
from lib.experiments import robust_distillation, robust_runs
from lib.models import build_classifier, predict_classes
from lib.pipeline import benchmark
from lib.utils import parallel
from lib.utils.draws import unpack_draws
from lib.utils.intervals import wilson

RECIPE = robust_distillation.AdversarialRecipe("cnn", width=4, epochs=2, batch_size=64, lr=1e-2, eps=0.1, steps=2)


class Constant(nn.Module):
    """Predicts one class to every image, with a logit of `size` where the others have 0."""

    def __init__(self, label: int, size: float = 5.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(10))
        self.bias.data[label] = size

    def forward(self, x):
        return self.bias + 0.0 * x.flatten(1).sum(1, keepdim=True)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", n_labels=200)


def test_work_side_by_side_is_the_same_work():
    inputs = [(k, 40) for k in (3, 0, 40, 7)]
    one, two = (parallel.parallel_map(wilson, inputs, jobs, progress=False) for jobs in (1, 2))
    assert one == two == [wilson(*a) for a in inputs]
    with pytest.raises(ValueError, match="jobs: expected at least 1 process, got 0"):
        parallel.parallel_map(wilson, inputs, 0)


def test_processes_side_by_side_share_the_threads():
    """Each with all of them, two processes on two cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        result = {
            jobs: parallel.parallel_map(torch.get_num_threads, [(), ()], jobs, progress=False) for jobs in (1, 2, 8)
        }
    finally:
        torch.set_num_threads(before)
    assert result == {1: [4, 4], 2: [2, 2], 8: [1, 1]}


def test_trainings_side_by_side_have_equal_weights(data):
    runs, longer = (
        {
            "a": robust_runs.TrainingRun("pgd-at"),
            "b": robust_runs.TrainingRun("rslad", "t", {"clean": 0.5}),
        },
        replace(RECIPE, epochs=3),
    )
    groups = [({name: runs[name]}, recipe) for name, recipe in (("a", RECIPE), ("b", longer))]
    teachers = {"t": build_classifier("cnn", width=8, seed=9)}
    one, two = (robust_distillation.train_runs(groups, teachers, data, "digits", 3, jobs) for jobs in (1, 2))
    for name in runs:
        assert one[name]["history"] == two[name]["history"]
        assert all(torch.equal(v, two[name]["best"][k]) for k, v in one[name]["best"].items())
    assert [len(one[name]["history"]) for name in runs] == [RECIPE.epochs, longer.epochs]
    start = build_classifier("cnn", width=4, seed=3).state_dict()
    assert all(any(not torch.equal(fit["last"][k], start[k]) for k in start) for fit in one.values())


def test_fewer_images_take_as_many_steps(data):
    fit = robust_distillation.train_run(robust_runs.TrainingRun("natural", labels=60), None, data, "digits", RECIPE, 0)
    assert len(fit["history"]) == 8  # 200 images are four batches, 60 are one
    shorter = robust_distillation.train_run(robust_runs.TrainingRun("natural"), None, data, "digits", RECIPE, 0)
    assert len(shorter["history"]) == 2
    half = robust_distillation.train_run(
        robust_runs.TrainingRun("natural", length=0.5), None, data, "digits", RECIPE, 0
    )
    assert len(half["history"]) == 1


def test_unlabelled_images_get_the_classes_of_the_teacher_and_labelled_ones_keep_theirs(data):
    x, y = robust_distillation.training_set(
        data, robust_runs.TrainingRun("trades", "t", labels=50, transfer=True), Constant(3), "digits", 0
    )
    some = load_dataset("digits", n_labels=50, seed=0).train
    assert len(x) == len(data.train.x) == 200 and torch.equal(x[:50], some.x) and torch.equal(y[:50], some.y)
    assert (y[50:] == 3).all()
    images = {image.numpy().tobytes() for image in data.train.x}
    assert {image.numpy().tobytes() for image in x} == images
    alone = robust_distillation.training_set(data, robust_runs.TrainingRun("trades", labels=50), None, "digits", 0)
    assert torch.equal(alone[0], some.x)


def test_a_teacher_whose_answers_are_not_finite_labels_nothing(data):
    run = robust_runs.TrainingRun("trades", "t", labels=50, transfer=True)
    with pytest.raises(ValueError, match="the teacher answers with NaN or infinity"):
        robust_distillation.training_set(data, run, Constant(3, torch.nan), "digits", 0)


def test_every_method_gets_as_many_trials_and_the_first_best_score_wins():
    assert {len(trials) for trials in robust_runs.TRIALS.values()} == {3} and set(robust_runs.TRIALS) == set(METHODS)
    for name, trials in robust_runs.TRIALS.items():
        assert all(set(t) - {"lr"} <= set(METHODS[name].options()) for t in trials), name
        assert len({str(t) for t in trials}) == 3
    runs = robust_runs.grid_runs(2, sorted(robust_runs.COMPARED))
    assert len(runs) == 2 * len(robust_runs.COMPARED) and runs["ard/1"] == robust_runs.TrainingRun(
        "ard", "trades", {"tau": 4.0}
    )
    fits = {name: {"score": 0.5} for name in runs} | {"ard/1": {"score": 0.6}}
    chosen = robust_runs.choose_trials(fits, runs)
    assert chosen["ard"] == "ard/1" and chosen["trades"] == "trades/0"
    for arguments, words in (
        ((2, ["tradse"]), r"expected methods among natural, .*, got tradse"),
        ((2, ["ard"]), "expected methods to include guided, kd"),
        ((4,), "expected 1 to 3 trials of each method, got 4"),
    ):
        with pytest.raises(ValueError, match=words):
            robust_runs.grid_runs(*arguments)
    with pytest.raises(ValueError, match=r"expected teachers among natural, .*, got strong"):
        robust_runs.teacher_runs(["strong"])
    assert list(robust_runs.teacher_runs(["middle", "natural"])) == ["natural", "middle", "trades"]


def test_follow_ups_keep_the_chosen_trial():
    chosen = {
        name: robust_runs.TrainingRun(name, "trades" if METHODS[name].teacher else "", robust_runs.TRIALS[name][1])
        for name in robust_runs.COMPARED
    }
    runs = robust_runs.ablation_runs(chosen, ["natural", "trades", "pgd-at"], 250, [30.0])
    assert runs["teacher/guided/natural"] == robust_runs.TrainingRun(
        "guided", "natural", robust_runs.TRIALS["guided"][1]
    )
    assert runs["tau/30"].trial == {"tau": 30.0} and runs["few/pgd-at"].labels == 250
    assert runs["transfer/trades"] == robust_runs.TrainingRun(
        "trades", "trades", robust_runs.TRIALS["trades"][1], labels=250, transfer=True
    )
    assert not any("pgd-at" in n or "/trades" in n for n in runs if n.startswith("teacher"))
    assert "transfer/pgd-at" not in runs
    assert not robust_runs.ablation_runs(chosen, [], 0, [])


def test_scores_are_of_attacked_images(data):
    x, y = data.val
    share = (y == 4).double().mean().item()
    assert robust_distillation.robust_score(Constant(4), x, y, eps=0.1, steps=2) == pytest.approx(share)
    model = build_classifier("cnn", width=4, seed=3)
    fit = robust_distillation.train_run(robust_runs.TrainingRun("natural"), None, data, "digits", RECIPE, 3)
    model.load_state_dict(fit["best"])
    clean = robust_distillation.robust_score(model, x, y, eps=0.0, steps=1)
    assert fit["score"] == pytest.approx(clean)  # no adversarial examples in training: chosen by clean accuracy
    attacked = robust_distillation.train_run(robust_runs.TrainingRun("pgd-at"), None, data, "digits", RECIPE, 3)
    model.load_state_dict(attacked["best"])
    assert attacked["score"] == pytest.approx(robust_distillation.robust_score(model, x, y, eps=0.1, steps=2))
    assert robust_distillation.robust_score(model, x, y, eps=0.1, steps=2) < robust_distillation.robust_score(
        model, x, y, eps=0.0, steps=1
    )


def test_softness_and_transfer_of_networks_whose_predictions_are_known(data):
    split = Split(*(t[:60] for t in data.val))
    vague, sure = (
        robust_distillation.teacher_softness(Constant(2, size), split, eps=0.1, steps=1) for size in (0.0, 100.0)
    )
    assert vague["entropy_clean"] == vague["entropy_attacked"] == pytest.approx(math.log(10))
    assert vague["label_clean"] == pytest.approx(0.1) and sure["entropy_clean"] == pytest.approx(0, abs=1e-6)
    assert sure["label_attacked"] == pytest.approx((split.y == 2).double().mean().item())
    student = robust_distillation.load_student(
        robust_distillation.train_run(robust_runs.TrainingRun("natural"), None, data, "digits", RECIPE, 0)["best"],
        data,
        RECIPE,
    )
    own = robust_distillation.transfer_accuracy(student, student, split, eps=0.1, steps=4)
    other = robust_distillation.transfer_accuracy(student, Constant(2), split, eps=0.1, steps=4)
    assert own < robust_distillation.accuracy(student, *split) and other == pytest.approx(
        (split.y == 2).double().mean().item()
    )


def test_examined_models_are_hurt_by_more_attacks_and_larger_balls(data):
    split = Split(*(t[:40] for t in data.val))
    model = robust_distillation.load_student(
        robust_distillation.train_run(robust_runs.TrainingRun("trades"), None, data, "digits", RECIPE, 0)["best"],
        data,
        RECIPE,
    )
    full = robust_distillation.evaluate_robustness(model, split, 0, 0.1, robust_distillation.autoattack_set(3, 5, 2))
    assert set(full["attacks"]) == {"apgd-ce", "apgd-t", "fab-t", "square"}
    assert full["robust"] <= min(full["attacks"].values()) <= full["clean"]
    assert set(robust_distillation.apgd_set(3, 2)) == {"apgd-ce", "apgd-t"}
    curves, outcomes = robust_distillation.accuracy_curves({"a": model}, split, 0, [0.0, 0.05, 0.5], 3)
    curve = curves["a"]
    assert [unpack_draws(bits).mean() for bits in outcomes["a"].values()] == pytest.approx(curve)
    assert list(outcomes["a"]) == ["pgd@0", "pgd@0.05", "pgd@0.5"]
    assert curve[0] == pytest.approx(full["clean"]) and curve[0] > curve[1] > curve[2]


def test_the_summary_holds_paired_differences():
    robust = {"natural": 0.1, "kd": 0.2, "pgd-at": 0.6, "trades": 0.7, "trades-at": 0.73, "teach": 0.65, "guided": 0.74}
    methods = {
        m: {"robust": v, "quick": v + 0.01, "clean": 0.9, "score": 0.5, "overfit": 0.02} for m, v in robust.items()
    }
    methods |= {"ard": {"robust": 0.5, "score": 0.7}, "rslad": {"robust": 0.9, "score": 0.6}}
    result = robust_distillation.robust_distillation_summary(methods, {"trades": {"robust": 0.8}}, {})
    assert result["guided_minus_trades"] == pytest.approx(0.04) and result["guided_minus_trades-at"] == pytest.approx(
        0.01
    )
    assert result["published_minus_trades"] == pytest.approx(-0.2)  # validation chose ARD
    assert result["kd_minus_natural"] == pytest.approx(0.1) and result["teacher_minus_trades"] == pytest.approx(0.09)
    assert "natural_rslad_minus_pgd-at" not in result and "few_guided_minus_trades" not in result
    few = {f"few/{m}": {"robust": 0.5} for m in robust_runs.FEW_LABEL_METHODS} | {
        f"transfer/{m}": {"robust": 0.6} for m in robust_runs.FEW_LABEL_METHODS
    }
    few |= {f"teacher/{m}/natural": {"robust": 0.3} for m in robust_runs.TEACHER_ABLATION}
    result = robust_distillation.robust_distillation_summary(methods, {"trades": {"robust": 0.8}}, few)
    assert result["transfer_guided_minus_few_trades"] == pytest.approx(0.1) and result["few_teach_minus_trades"] == 0
    assert result["natural_kd_minus_natural"] == pytest.approx(0.3 - 0.11)


def test_passes_are_counted_as_the_losses_imply():
    params = {"data": {"dataset": "digits"}}
    params |= {"rd": {"batch_size": 8, "student": "cnn", "student_width": 4, "teacher": "cnn", "teacher_width": 4}}
    params["rd"] |= {"eps": 0.1, "attack_steps": 5}
    table = benchmark.rd_cost(params, rounds=1, repeats=1)
    keys = "student, forward", "student, backward", "teacher, forward", "teacher, backward"
    passes = {name: [row[key] for key in keys] for name, row in table.items()}
    assert passes["natural"] == [1, 1, 0, 0] and passes["kd"] == [1, 1, 1, 0]
    assert passes["pgd-at"] == [6, 6, 0, 0] and passes["ard"] == [6, 6, 1, 0]
    assert passes["trades"] == [8, 7, 0, 0] and passes["guided"] == passes["teach"] == [8, 7, 1, 0]
    assert passes["mart"] == passes["rslad"][:2] + [0, 0] == [7, 7, 0, 0] and passes["iad"] == [7, 7, 2, 0]
    assert passes["adaad"] == [6, 6, 6, 5] and passes["igdm"] == [7, 7, 7, 5]
    assert table["pgd-at"]["× PGD-AT"] == 1


def test_a_training_in_bf16_leaves_the_next_one_alone(data):
    """A surrogate in float32 is trained in the process of the students."""
    run = robust_runs.TrainingRun("pgd-at")
    low = robust_distillation.train_run(run, None, data, "digits", replace(RECIPE, precision="bf16"), 0)
    start = build_classifier("cnn", width=4, seed=1)
    predict = partial(predict_classes, Constant(3))
    surrogate = train_surrogate(predict, data.train.x, start, epochs=2, progress=False)
    assert surrogate(data.test.x).dtype == torch.float32
    high = robust_distillation.train_run(run, None, data, "digits", RECIPE, 0)
    assert high["history"] != low["history"]
    assert high["history"] == robust_distillation.train_run(run, None, data, "digits", RECIPE, 0)["history"]
