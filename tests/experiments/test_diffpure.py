"""Experiment 5: which students and defences, the matched set on each, and the numbers of the claims."""

import shutil
from dataclasses import replace

import pytest
import torch

from lib import purify
from lib.data import Split, load_dataset
from lib.diffusion.network import load_network
from lib.diffusion.schedule import add_noise
from lib.distillation import few_step, robust_consistency
from lib.evaluation import certify
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws
from lib.experiments import diffpure, diffpure_metrics, diffpure_residual, diffpure_students
from lib.models import build_classifier
from lib.utils.checkpoints import save_checkpoint
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator

ROBUST = {"eps": 0.1, "steps": 1, "epochs": 1, "lr": 1e-3, "weight": 0.5, "measure": "huber"}
LABEL = {"label_weight": 0.2, "eps": 0.1, "steps": 1, "epochs": 1, "lr": 1e-3}


@pytest.fixture(scope="module")
def classifier():
    return build_classifier("cnn", width=4, seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def some():
    test = load_dataset("digits").test
    return Split(test.x[:4], test.y[:4])


def test_students_are_planned_by_their_names():
    plans = diffpure_students.plan_students(
        [
            "clean",
            "adaptive",
            "noskip-adaptive",
            "match-sde@l2",
            "undistilled-grey",
            "trades-adaptive",
            "label",
            "label-n25",
        ],
        [3.0],
        ROBUST,
        LABEL,
    )
    assert {name: plan.begin for name, plan in plans.items()} == {
        "clean": "cd",
        "adaptive": "cd",
        "noskip-adaptive": "noskip",
        "match-sde@l2": "cd",
        "undistilled-grey": "teacher",
        "trades-adaptive": "cd",
        "label": "cd",
        "label-n25": "cd",
        "adaptive@3": "cd",
    }
    assert [name for name, plan in plans.items() if plan.classifier != "natural"] == ["trades-adaptive"]
    assert plans["adaptive@3"].recipe == replace(plans["adaptive"].recipe, weight=3.0)
    assert plans["match-sde@l2"].recipe.measure == "l2" and plans["clean"].recipe.measure == "huber"
    assert [plans[name].recipe.noise for name in ("label", "label-n25")] == [1.0, 0.25]
    assert plans["undistilled-grey"].recipe == replace(plans["clean"].recipe, variant="grey")


@pytest.mark.parametrize(
    "variants, weights, message",
    [
        (["clean"], [], "variants lacks adaptive"),
        (["clean", "adaptive"], [0.5], "must differ"),
        (["clean", "adaptive", "clean@lpips"], [], "'clean@lpips' has the distance 'lpips': choose one of l2, huber"),
        (["clean", "adaptive", "clean@2"], [], "give it in `weights`"),
        (["clean", "adaptive", "label-n5x"], [], "expected a variant among"),
    ],
)
def test_students_that_could_only_fail_later_are_refused(variants, weights, message):
    with pytest.raises(ValueError, match=message):
        diffpure_students.plan_students(variants, weights, ROBUST, LABEL)


def test_purifiers_to_evaluate_are_those_that_exist(models):
    names = diffpure_students.purifiers_to_evaluate(models, ["pd", "grey"], 3)
    assert names == ["pd-1", "pd-4", "grey-1", "grey-3"]  # no PD student of 3 steps


def test_every_defence_and_baseline_is_in_the_plan():
    plan = diffpure.defence_plan("sde-100", 2, ["grey", "trades-adaptive", "label-n0"], ["pgd-at", "trades"])
    assert [str(defence) for defence in plan] == [
        "none",
        "sde-100",
        "ddim-100",
        "ddim-1",
        "ddim-4",
        "clean-1",
        "clean-2",
        "adaptive-1",
        "adaptive-2",
        "grey-1",
        "label-n0-1",
        "pgd-at",
        "trades",
        "adaptive-1 + trades",
        "trades-adaptive-1 + trades",
    ]
    assert "adaptive-1 + trades" not in map(str, diffpure.defence_plan("sde-100", 1, [], ["pgd-at"]))
    costs = [diffpure.network_evaluations(defence) for defence in plan]
    assert max(costs) == costs[1] > 10 * costs[5]
    for bad, message in (({"steps": 0}, "steps 0"), ({"teacher": "cd-1"}, "teacher 'cd-1'")):
        with pytest.raises(ValueError, match=message):
            diffpure.defence_plan(**{"teacher": "sde-100", "steps": 2, "students": [], "classifiers": []} | bad)


def test_long_purifiers_alone_are_climbed_in_few_steps_first():
    names = ["sde-100", "ddim-100", "ddim-4", "cd-1", diffpure.NO_PURIFIER, "sde-10"]
    assert [diffpure.coarse_name(name) for name in names] == ["sde-5", "ddim-5", None, None, None, None]


PLAN = [diffpure.Defence(name) for name in (diffpure.NO_PURIFIER, "sde-12", "cd-1")]
PLAN += [diffpure.Defence(diffpure.NO_PURIFIER, "trades"), diffpure.Defence("cd-1", "trades")]
RUN = {"eps": 0.2, "effort": AttackEffort(2, 2, 3, 2, 2), "draws": MeasuringDraws(2, 2, 2, 12), "seed": 0}


def run_set(work, classifiers, some, **changes):
    return diffpure.run_matched_set(PLAN, work, classifiers, some, **RUN | changes)


def test_every_defence_meets_its_own_attacks_and_the_images_of_all_others(models, classifier, some, tmp_path):
    work = shutil.copytree(models, tmp_path / "work")
    other = build_classifier("cnn", width=4, seed=1).eval().requires_grad_(False)
    results = run_set(work, {"natural": classifier, "trades": other}, some)
    own = {"exact-ce", "exact-margin", "apgd", "bpda", "grey", "fixed", "square"}
    measured = {"clean", "matched", "outside"}
    for defence in PLAN:
        result = results[str(defence)]
        others = {f"from {d}" for d in PLAN if d != defence}
        random = defence.purifier != diffpure.NO_PURIFIER
        assert set(result["correct"]) == measured | own | others | ({"exact-ten"} if random else set())
        draws = {label: packed["draws"] for label, packed in result["correct"].items()}
        assert {draws[label] for label in measured} == {12 if random else 1} and result["random"] == random
        assert 0 <= result["last_climb"] <= len(some.y)
        assert sum(result["chosen"].values()) == len(some.y)
    metrics = diffpure_metrics.defence_metrics(PLAN, results)
    for row in metrics.values():
        assert row["loss"] == pytest.approx(row["clean"] - row["accuracy"])
        assert row["worst_loss"] == pytest.approx(row["control"] - row["worst_of_10"])
        assert row["worst_of_10"] <= row["accuracy"] + 1e-9 and row["control"] <= row["clean"] + 1e-9
    none, trades = metrics["none"], metrics["trades"]
    x, y = some
    assert none["clean"] == (classifier(x).argmax(1) == y).float().mean().item()
    assert trades["clean"] == (other(x).argmax(1) == y).float().mean().item()
    assert none["accuracy"] <= min(none["attacks"].values()) + 1e-9  # deterministic: the worst per image of all
    assert metrics["cd-1"]["multiply_adds"] > none["multiply_adds"] > 0
    assert metrics["sde-12"]["multiply_adds"] - none["multiply_adds"] == pytest.approx(
        12 * (metrics["cd-1"]["multiply_adds"] - none["multiply_adds"])
    )
    table = diffpure_metrics.defence_table(metrics)
    assert table.loc["none", "loss"] == round(100 * none["loss"], 1) and table.loc["sde-12", "evaluations"] == 12


def test_an_interrupted_run_goes_on_with_what_it_has(models, some, tmp_path, monkeypatch):
    """With the classifiers that it began with, too: a GPU trains no two alike."""
    work = shutil.copytree(models, tmp_path / "work")
    first, second, *again = (build_classifier("cnn", width=4, seed=s).eval().requires_grad_(False) for s in range(4))
    results = run_set(work, {"natural": first, "trades": second}, some)
    monkeypatch.setattr(diffpure.matched_attacks, "matched_attacks", lambda *_: pytest.fail("attacks again"))
    (work / "evaluations" / "scores cd-1.pt").unlink()
    assert run_set(work, {"natural": again[0], "trades": again[1]}, some) == results
    assert torch.equal(again[0](some.x), first(some.x)) and torch.equal(again[1](some.x), second(some.x))


def test_a_run_has_a_folder_of_its_own_and_is_published_without_its_evaluations(models, tmp_path):
    work = diffpure_students.diffpure_work_dir("scratch", models, 0, str(tmp_path))
    try:
        assert (work / "cd").exists() and not (work / "sampler").exists()
        assert diffpure_students.diffpure_work_dir("scratch", models, 0, str(tmp_path)) == work
        assert diffpure_students.diffpure_work_dir("scratch", models, 1, "other") != work
        save_checkpoint(work / "evaluations" / "scores cd-1.pt", {"saved": 1})
        target = diffpure_students.publish_run(work, tmp_path / "done")
        assert purify.purifier_kinds(target) == purify.purifier_kinds(models) and not (target / "evaluations").exists()
        assert diffpure_students.publish_run(target, target) == target
    finally:
        for folder in (work.parent).glob("dp-s[01]-*"):
            shutil.rmtree(folder)


def test_an_exact_gradient_that_a_simpler_attack_beats_is_named():
    row = {"no_gradient": {}, "attacks": {"exact-ce": 0.8, "exact-margin": 0.79, "apgd": 0.6, "grey": 0.786}}
    assert diffpure_metrics.weak_attack_warnings({"a": row}) == []  # to half a point; apgd is no simpler one
    row["attacks"] |= {"square": 0.78, "from b": 0.5}
    row["no_gradient"] = {"bpda": 3}
    assert diffpure_metrics.weak_attack_warnings({"a": row}) == [
        "a: exact-margin leaves 79.0%, square only 78.0%",
        "a: exact-margin leaves 79.0%, from b only 50.0%",
        "a: bpda got no gradient on 3 images",
    ]


def test_the_summary_pairs_what_belongs_together():
    residuals = {"sde-100": {"projection": 0.3}, "clean-1": {"projection": 0.5}, "clean-2": {"projection": 0.45}}
    residuals |= {f"adaptive-{n}": {"projection": 0.4} for n in (1, 2)}
    out = diffpure_metrics.diffpure_summary(residuals, "sde-100", 2)
    assert out == pytest.approx(
        {
            "inherited_clean_one_minus_teacher": 0.2,
            "inherited_adaptive_one_minus_clean": -0.1,
            "inherited_clean_few_minus_teacher": 0.15,
            "inherited_adaptive_few_minus_clean": -0.05,
        }
    )
    residuals["noskip-clean-1"] = {"projection": 0.1}
    residuals |= {
        "match-sde-1": {"projection": 0, "to_denoiser": 1.0},
        "match-ode-1": {"projection": 0, "to_denoiser": 3.0},
    }
    more = diffpure_metrics.diffpure_summary(residuals, "sde-100", 2)
    assert more["inherited_noskip_minus_skip"] == pytest.approx(-0.4)
    assert more["match_sde_minus_ode_to_denoiser"] == -2.0


def test_students_without_c_skip_are_trained_saved_and_loaded_as_such(models, classifier, tmp_path, monkeypatch):
    """Where the skip connection is left out must be known to whoever loads the network: it is another function."""
    work, data = tmp_path / "work", load_dataset("digits", n_labels=40)
    shutil.copytree(models, work)
    recipe, scalings = few_step.load_config(work)
    few_step.save_config(work, replace(recipe, cd_epochs=1, batch_size=32), scalings)
    names = ["clean", "adaptive", "noskip-adaptive", "match-sde@features", "undistilled-clean", "label-n0"]
    settings = diffpure_students.plan_students(names, [], ROBUST, LABEL)

    def train_all():
        return diffpure_students.train_students(settings, work, data, {"natural": classifier}, 0, copies=1, jobs=1)

    results = train_all()
    assert set(results) == {"noskip", *settings} and all(history[-1]["loss"] > 0 for history in results.values())
    assert not (work / "noskip.pt").exists() and {"noskip", "noskip-adaptive"} <= set(purify.purifier_kinds(work))
    shutil.rmtree(work / "adaptive")  # it alone is trained again, to the same end; then nothing, which needs no pairs
    assert train_all() == results
    monkeypatch.delattr(robust_consistency, "training_pairs")
    assert train_all() == results
    x, z = data.test.x[:4], seeded_generator(0, "z")
    recipe, scalings = few_step.load_config(work)
    no_skip = replace(scalings, skip=False)
    for name in ("noskip", "noskip-adaptive"):
        net = load_network(work / name)
        expected = few_step.consistency_sampler(net, no_skip, 1, recipe)(
            add_noise(x, 99.0, randn_like(z.manual_seed(1))), randn_like(z)
        )
        got = purify.load_purifier(work, f"{name}-1", clamp=False)(x, randn_like(z.manual_seed(1)))
        torch.testing.assert_close(got, expected)
    assert purify.load_purifier(work, "label-n0-1").deterministic
    with_skip = few_step.consistency_sampler(load_network(work / "clean"), scalings, 1, recipe)
    expected = with_skip(add_noise(x, 99.0, randn_like(z.manual_seed(1))), randn_like(z))
    torch.testing.assert_close(
        purify.load_purifier(work, "clean-1", clamp=False)(x, randn_like(z.manual_seed(1))), expected
    )


def test_features_are_the_classifiers_last_hidden_layer_of_images_in_pixels(classifier, some):
    u = (2 * some.x - 1).requires_grad_()
    features = diffpure_students.hidden_features(classifier)(u)
    torch.testing.assert_close(classifier[-1](features), classifier(some.x))
    assert torch.autograd.grad(features.sum(), u)[0].abs().sum() > 0


def test_one_step_from_t_star_is_what_the_purifiers_do(models, some):
    recipe, scalings = few_step.load_config(models)
    z = add_noise(some.x, recipe.t, randn_like(seeded_generator(0, "z")))
    sigma = scalings.sigma_max / 2
    for net, name in (("teacher", diffpure.DENOISER), ("cd", "cd-1")):
        expected = purify.load_purifier(models, name).sampler(z, randn_like(seeded_generator(0, "r")))
        torch.testing.assert_close(
            certify.one_step_denoiser(models, net, sigma)(z, randn_like(seeded_generator(0, "r"))), expected
        )


def test_the_residual_perturbation_is_measured_for_every_purifier_and_of_students_through_themselves(
    models, classifier, some
):
    results = diffpure_residual.residual_perturbations(["sde-6", "cd-1"], models, classifier, some, 0, eps=0.1, steps=2)
    assert results["sde-6"]["damage_before"] == results["cd-1"]["damage_before"]
    assert (
        diffpure_residual.residual_perturbations([diffpure.DENOISER], models, classifier, some, 0, eps=0.1, steps=2)[
            diffpure.DENOISER
        ]["to_denoiser"]
        == 0
    )
    assert results["cd-1"]["to_denoiser"] > 0
    assert "own" not in results["sde-6"] and results["cd-1"]["own"]["projection"] != results["cd-1"]["projection"]
