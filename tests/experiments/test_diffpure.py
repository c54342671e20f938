"""Experiment 5: which images, students and evaluations, what the strongest attack is, and the numbers of the claims."""

import shutil
from dataclasses import replace

import pytest
import torch

from lib import purify
from lib.data import Split, load_dataset
from lib.diffusion.network import load_network
from lib.diffusion.schedule import add_noise
from lib.distillation import few_step, robust_consistency
from lib.evaluation import certify, threat_models
from lib.evaluation.threat_models import AttackBudget
from lib.experiments import diffpure, diffpure_residual, diffpure_students
from lib.models import build_classifier
from lib.utils.checkpoints import save_checkpoint
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator

FULL, SMALL = AttackBudget(100, 16), AttackBudget(20, 4)
OPTIONS = {"eps": 0.1, "full": FULL, "small": SMALL, "unseen": {"L2": (0.5, "L2")}}


@pytest.fixture(scope="module")
def classifier():
    return build_classifier("cnn", width=4, seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def some():
    test = load_dataset("digits").test
    return Split(test.x[:4], test.y[:4])


def test_images_are_drawn_once_and_the_few_are_among_the_many():
    data = load_dataset("digits")
    (few, _), (many, _) = (diffpure.evaluation_images(data, n, 3) for n in (8, 40))
    assert torch.equal(few.x, many.x[:8]) and torch.equal(few.y, many.y[:8])
    others, _ = diffpure.evaluation_images(data, 8, 4)
    assert not torch.equal(few.x, others.x) and len(many.x.flatten(1).unique(dim=0)) == 40


def test_students_and_variants_are_named_by_what_they_are(models):
    results = diffpure_students.variant_settings(["clean", "adaptive", "grey"], 0.5, [3.0])
    assert results["adaptive@3"] == {"begin": "cd", "variant": "adaptive", "weight": 3.0, "measure": "huber"}
    assert {name: given["weight"] for name, given in results.items()} == {
        "clean": 0.5,
        "adaptive": 0.5,
        "grey": 0.5,
        "adaptive@3": 3.0,
    }
    assert diffpure_students.purifiers_to_evaluate(models, ["pd", "grey"], 3) == [
        "pd-1",
        "pd-4",
        "grey-1",
        "grey-3",
    ]  # no PD student of 3 steps
    with pytest.raises(ValueError, match="variants lacks adaptive"):
        diffpure_students.variant_settings(["clean"], 1.0, [])
    more = diffpure_students.variant_settings(["clean", "adaptive", "noskip-adaptive", "match-sde@l2"], 0.5, [])
    assert more["noskip-adaptive"] == {"begin": "noskip", "variant": "adaptive", "weight": 0.5, "measure": "huber"}
    assert more["match-sde@l2"] == {"begin": "cd", "variant": "match-sde", "weight": 0.5, "measure": "l2"}
    with pytest.raises(ValueError, match="'clean@lpips' has the distance 'lpips': choose one of l2, huber"):
        diffpure_students.variant_settings(["clean", "adaptive", "clean@lpips"], 0.5, [])
    with pytest.raises(ValueError, match="must differ"):
        diffpure_students.variant_settings(["clean", "adaptive"], 1.0, [1.0])


@pytest.mark.parametrize("steps", [1, 2])
def test_claims_rest_on_the_full_budget_and_comparisons_on_equal_ones(steps):
    evaluations = diffpure.evaluation_protocol("sde-100", steps, names=["grey-1", f"grey-{steps}"], **OPTIONS)
    for n in {1, steps}:
        for kind in ("clean", "adaptive"):
            assert evaluations[f"{kind}-{n}/exact"].budget == FULL and evaluations[f"{kind}-{n}/many"].many
    best = f"adaptive-{steps}"
    same = [evaluations[key].budget for key in ("sde-100/sweep", "sde-100/bpda", f"{best}/sweep", "grey-1/sweep")]
    assert same == [SMALL] * 4
    for key in ("sde-100/sweep", f"{best}/exact", f"{best}/sweep"):
        assert evaluations[key].others == ((best, f"clean-{steps}") if key.startswith("sde") else ("sde-100",))
    assert {row.threat for row in evaluations.values()} == {*threat_models.THREAT_MODELS}
    assert (
        diffpure.evaluation_cost(evaluations["sde-100/sweep"])
        > 5 * diffpure.evaluation_cost(evaluations[f"{best}/sweep"])
        > 0
    )
    for bad, message in (({"steps": 0}, "steps 0"), ({"teacher": "cd-1"}, "teacher 'cd-1'")):
        with pytest.raises(ValueError, match=message):
            diffpure.evaluation_protocol(**{"teacher": "sde-100", "steps": 2} | bad, names=[], **OPTIONS)


def result(average: float, **others: float) -> dict:
    """A row as `lib.evaluation.threat_models.evaluate_under_attack` returns it."""
    measures = {"clean": 0.98, "average": average, "worst": average / 2, "majority": average, "control": 0.9}
    return measures | {"others": {name: result(value) for name, value in others.items()}}


@pytest.fixture
def results():
    evaluations = {
        f"sde-100/{threat}": result(value) for threat, value in (("none", 0.97), ("grey", 0.85), ("bpda", 0.8))
    }
    evaluations["sde-100/sweep"] = result(0.79, **{"adaptive-2": 0.86, "clean-2": 0.7})
    evaluations["adaptive-2/sweep"] = result(0.9, **{"sde-100": 0.81})
    evaluations["adaptive-2/exact"] = result(0.87, **{"sde-100": 0.77})
    evaluations["adaptive-2/fixed"] = evaluations["adaptive-2/L2"] = evaluations["adaptive-2/other"] = result(0.1)
    evaluations |= {f"{n}/none": result(0.97) for n in ("clean-1", "clean-2", "adaptive-1", "adaptive-2", "ddim-1")}
    evaluations |= {"clean-1/exact": result(0.72), "clean-2/exact": result(0.74), "adaptive-1/exact": result(0.8)}
    evaluations |= {f"{kind}-{n}/many": result(v) for kind, n, v in (("clean", 1, 0.7), ("clean", 2, 0.75))}
    evaluations |= {f"adaptive-{n}/many": result(0.8) for n in (1, 2)}
    return evaluations | {"ddim-1/exact": result(0.73), "clean-2/grey": result(0.8), "adaptive-2/grey": result(0.9)}


def test_the_strongest_attack_is_the_least_of_own_and_transferred_ones_in_the_ball(results):
    assert diffpure.strongest_attack(results, "sde-100") == 0.77  # the images made for the student
    assert (
        diffpure.strongest_attack(results, "adaptive-2") == 0.86
    )  # those made for the teacher; no fixed noise, L2, other classifier
    assert diffpure.strongest_attack(results, "clean-2", "worst") == 0.35
    every = diffpure.strongest_attacks(results, "sde-100")
    assert every["sde-100"] == {"average": 0.77, "worst": 0.385, "majority": 0.77, "clean": 0.98, "control": 0.9}
    assert set(every) == {"sde-100", "clean-1", "clean-2", "adaptive-1", "adaptive-2", "ddim-1"}


def test_an_exact_gradient_that_a_simpler_attack_beats_is_named(results):
    assert diffpure.weak_attack_warnings(results) == [
        "sde-100: sweep leaves 79.0%, images for adaptive-2/exact only 77.0%",
        "adaptive-2: exact leaves 87.0%, images for sde-100/sweep only 86.0%",
        "clean-2: exact leaves 74.0%, images for sde-100/sweep only 70.0%",
    ]
    within = {"a/apgd": result(0.5), "a/exact": result(0.6), "a/grey": result(0.499), "b/square": result(0.1)}
    assert (
        diffpure.weak_attack_warnings(within) == []
    )  # the best of the exact ones counts, to 0.2 points; b has none to compare with
    assert diffpure.weak_attack_warnings(within | {"a/none": result(0.49)}) == ["a: apgd leaves 50.0%, none only 49.0%"]


def test_the_summary_pairs_what_belongs_together(results):
    residuals = {"sde-100": {"projection": 0.3}, "clean-1": {"projection": 0.5}, "clean-2": {"projection": 0.45}}
    residuals |= {f"adaptive-{n}": {"projection": 0.4} for n in (1, 2)}
    out = diffpure.diffpure_summary(results, diffpure.strongest_attacks(results, "sde-100"), residuals, "sde-100", 2)
    expected = {
        "clean_one_minus_teacher_average": 0.72 - 0.77,
        "adaptive_few_minus_teacher_average": 0.86 - 0.77,
        "adaptive_few_minus_teacher_worst": 0.43 - 0.385,
        "adaptive_minus_clean_few_average": 0.86 - 0.7,
        "adaptive_minus_clean_one_many_average": 0.1,
        "inherited_clean_one_minus_teacher": 0.2,
        "inherited_adaptive_few_minus_clean": -0.05,
        "grey_adaptive_minus_clean": 0.1,
        "clean_one_minus_denoiser": -0.01,
        "teacher_exact_minus_bpda": -0.01,
        "teacher_exact_minus_surrogate": -0.02,
    }
    assert {name: out[name] for name in expected} == pytest.approx(expected)


def test_an_evaluation_is_run_once_and_read_again(models, classifier, some, tmp_path):
    work = diffpure_students.diffpure_work_dir("scratch", models, 0, str(tmp_path))
    try:
        assert (work / "cd").exists() and not (work / "sampler").exists()
        assert diffpure_students.diffpure_work_dir("scratch", models, 0, str(tmp_path)) == work
        assert diffpure_students.diffpure_work_dir("scratch", models, 1, "other") != work
        tiny = AttackBudget(1, 1, draws=2, queries=2)
        evaluations = {"none-0/exact": diffpure.Evaluation(diffpure.NO_PURIFIER, "exact", tiny, 0.1)}
        evaluations["cd-1/exact"] = diffpure.Evaluation(
            "cd-1", "exact", tiny, 0.1, others=("pd-1",), classifier=1, extra=0.1, votes=2
        )
        evaluations["cd-1/many"] = diffpure.Evaluation("cd-1", "none", tiny, 0.1, many=True)
        many = Split(some.x.repeat(2, 1, 1, 1), some.y.repeat(2))
        first = diffpure.run_evaluations(evaluations, work, [classifier, classifier], some, many, 0)
        assert list(first) == list(evaluations) and [first[key]["n"] for key in evaluations] == [4, 4, 8]
        assert set(first["cd-1/exact"]["others"]) == {"pd-1"}
        saved = work / "evaluations" / "cd-1 many.pt"
        save_checkpoint(saved, {"saved": 1})
        assert diffpure.run_evaluations(evaluations, work, [classifier, classifier], some, many, 0) == first | {
            "cd-1/many": {"saved": 1}
        }
        target = diffpure_students.publish_run(work, tmp_path / "done")
        assert purify.purifier_kinds(target) == purify.purifier_kinds(models) and not (target / "evaluations").exists()
        assert diffpure_students.publish_run(target, target) == target
    finally:
        for folder in (work.parent).glob("dp-s[01]-*"):
            diffpure_students.shutil.rmtree(folder)


def test_an_interrupted_run_goes_on_with_the_classifiers_that_it_began_with(models, some, tmp_path):
    """A GPU trains no two alike: the students and evaluations that are there are about the first ones."""
    work, data = tmp_path / "work", load_dataset("digits", n_labels=20)
    shutil.copytree(models, work)
    first, second, third, *again = (
        build_classifier("cnn", width=4, seed=s).eval().requires_grad_(False) for s in range(1, 6)
    )
    settings = {"clean": diffpure_students.variant_settings(["clean", "adaptive"], 1.0, [])["clean"]}
    settings = {name: given | {"eps": 0.1, "steps": 1, "epochs": 1, "lr": 1e-3} for name, given in settings.items()}
    diffpure_students.train_variants(settings, work, data, first, 0, copies=1, jobs=1)
    evaluations = {"none-0/exact": diffpure.Evaluation(diffpure.NO_PURIFIER, "exact", AttackBudget(1, 1, draws=2), 0.1)}
    results = diffpure.run_evaluations(evaluations, work, [second, third], some, some, 0)
    assert torch.equal(second(some.x), first(some.x)) and not torch.equal(third(some.x), first(some.x))
    (work / "evaluations" / "none-0 exact.pt").unlink()
    assert diffpure.run_evaluations(evaluations, work, again, some, some, 0) == results
    assert torch.equal(again[1](some.x), third(some.x))


def test_a_table_says_what_was_left_of_how_many_with_intervals():
    row = {"clean": 1.0, "average": 0.8, "worst": 0.5, "majority": 0.75, "control": 0.95, "n": 20}
    row |= {"intervals": {name: [value - 0.1, min(1.0, value + 0.1)] for name, value in row.items() if name != "n"}}
    table = diffpure.evaluation_table({"cd-1/exact": row})
    assert table.loc["cd-1/exact", "average"] == "80.0 [70, 90]" and table.loc["cd-1/exact", "images"] == 20


def test_students_without_c_skip_are_trained_saved_and_loaded_as_such(models, classifier, tmp_path, monkeypatch):
    """Where the skip connection is left out must be known to whoever loads the network: it is another function."""
    work, data = tmp_path / "work", load_dataset("digits", n_labels=40)
    shutil.copytree(models, work)
    recipe, scalings = few_step.load_config(work)
    few_step.save_config(work, replace(recipe, cd_epochs=1, batch_size=32), scalings)
    settings = diffpure_students.variant_settings(
        ["clean", "adaptive", "noskip-adaptive", "match-sde@features"], 1.0, []
    )
    settings = {name: given | {"eps": 0.1, "steps": 1, "epochs": 1, "lr": 1e-3} for name, given in settings.items()}
    results = diffpure_students.train_variants(settings, work, data, classifier, 0, copies=1, jobs=1)
    assert list(results) == ["noskip", *settings] and all(history[-1]["loss"] > 0 for history in results.values())
    assert not (work / "noskip.pt").exists() and {"noskip", "noskip-adaptive"} <= set(purify.purifier_kinds(work))
    shutil.rmtree(work / "adaptive")  # it alone is trained again, to the same end; then nothing, which needs no pairs
    assert diffpure_students.train_variants(settings, work, data, classifier, 0, copies=1, jobs=1) == results
    monkeypatch.delattr(robust_consistency, "training_pairs")
    assert diffpure_students.train_variants(settings, work, data, classifier, 0, copies=1, jobs=1) == results
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
