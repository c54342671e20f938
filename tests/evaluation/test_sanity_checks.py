"""Sanity checks: every fake is caught by its flags, the adversarially trained model raises none."""

import pytest
import torch
from torch import nn

from lib.attacks.bpda import bpda
from lib.data import load_dataset
from lib.distillation import defensive
from lib.evaluation.sanity_checks import (
    BUDGETS,
    CHECKS,
    ModelUnderTest,
    attack_comparisons,
    optimisation_checks,
    sanity_checks,
    sanity_checks_all,
)
from lib.models import accuracy, build_classifier
from lib.report.figures.sanity_checks import check_matrix
from tests import controls

EPS, OPTIONS = 0.1, {"lr": 1e-2, "batch_size": 64, "progress": False}
GOOD = "adversarially trained"
ALL = (*controls.EXPECTED, GOOD)
TWO = ("defensive distillation", GOOD)  # much that is red, and nothing


@pytest.fixture(scope="session")
def images():
    """60 test images and their labels."""
    test = load_dataset("digits").test
    return test.x[:60], test.y[:60]


@pytest.fixture(scope="session")
def models(shared_cnn):
    """The shipped controls, by name: two are trained here, in about ten seconds."""
    train, new = tuple(load_dataset("digits").train), build_classifier("cnn", width=8, seed=0)
    return {
        "scaled logits": controls.scaled_logits(shared_cnn),
        "quantised input": controls.quantised_input(shared_cnn),
        "shattered gradient": controls.shattered_gradient(shared_cnn),
        "random output": controls.random_output(shared_cnn, torch.Generator()),
        "softmax output": controls.softmax_output(shared_cnn),
        "defensive distillation": defensive.defensive_distillation(new, train, epochs=30, **OPTIONS),
        GOOD: controls.adversarially_trained(new, train, eps=EPS, steps=5, epochs=20, **OPTIONS),
    }


@pytest.fixture(scope="session")
def tables(models, images, shared_cnn):
    """The table of a control by its name, once it is needed; the standard CNN is the surrogate."""

    class Tables(dict):
        def __missing__(self, name):
            self[name] = sanity_checks(models[name], *images, eps=EPS, surrogate=shared_cnn)
            return self[name]

    return Tables()


def red(table):
    return set(table.check[table.flag])


@pytest.mark.parametrize("name", controls.EXPECTED)
def test_every_fake_is_caught_by_its_flags(tables, name):
    assert set(controls.EXPECTED[name]) <= red(tables[name]), tables[name].to_string()


def test_the_adversarially_trained_model_raises_none_and_is_robust(tables, models, images, cnn):
    table = tables[GOOD]
    assert not red(table), table[table.flag].to_string()
    assert table.measured.notna().all()  # none is green for want of a measurement
    assert accuracy(models[GOOD], *images) > 0.9


def test_the_standard_model_hides_nothing_and_what_is_not_measured_is_not_red(cnn, images):
    table = sanity_checks(cnn, *images, eps=EPS)
    assert not red(table)
    assert list(table.check[table.measured.isna()]) == ["white-box vs transfer"]


def test_l2_ball_and_other_seed_raise_none_either(models, images):
    assert not red(sanity_checks(models[GOOD], *images, eps=0.5, norm="L2", seed=1))


@pytest.mark.parametrize("name", ALL)
def test_the_table_has_every_check_and_flags_what_is_above_its_threshold(tables, name):
    table = tables[name]
    assert list(table.columns) == ["check", "measured", "threshold", "flag", "source", "advice"]
    assert list(table.check) == list(CHECKS)
    assert (table.flag == (table.measured > table.threshold)).all()
    assert set().union(*controls.EXPECTED.values()) <= set(CHECKS)


def test_it_is_repeatable_and_leaves_no_trace(cnn, images):
    noise = torch.Generator().manual_seed(5)
    model = controls.random_output(cnn, noise)
    model.training = True  # the root's flag alone: the shared CNN stays as it is
    state, held = torch.get_rng_state(), noise.get_state()
    first, second = (sanity_checks(model, *(t[:12] for t in images), eps=EPS) for _ in range(2))
    assert first.equals(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise.get_state(), held)
    assert model.training and not cnn.training
    assert all(p.grad is None for p in cnn.parameters())


def test_bpda_as_target_takes_the_mask_off(cnn, images):
    """BPDA through the quantiser (Athalye et al. 2018): gradients are back, and Square finds no more than they do."""
    fake = controls.quantised_input(cnn)
    target = nn.Sequential(bpda(fake.before), cnn)
    flags = red(sanity_checks(fake, *images, eps=EPS, target=target))
    assert not flags & {"zero gradients", "white-box vs Square", "accuracy at grey eps", "unbounded attack"}


def test_a_target_that_is_another_function_is_a_transfer_failure(models, images, cnn):
    measured = dict(
        attack_comparisons(ModelUnderTest(models[GOOD], cnn, *images, EPS, "Linf", 0, BUDGETS["quick"], {}), None)
    )
    assert measured["transfer failure"] > CHECKS["transfer failure"].threshold


@pytest.mark.parametrize("steps, fires", [(20, True), (100, False)])
def test_too_few_steps_are_incomplete_optimisation(models, images, steps, fires):
    x, y = images
    budget = BUDGETS["quick"]._replace(path=steps)
    measured = dict(optimisation_checks(ModelUnderTest(models[GOOD], models[GOOD], x, y, EPS, "Linf", 0, budget, {})))
    assert (measured["incomplete optimisation"] > CHECKS["incomplete optimisation"].threshold) == fires


def test_a_success_on_the_way_that_is_lost_at_the_end_is_silent():
    """One pixel, class 1 only between 0.52 and 0.58: PGD from 0.5 passes through, ends at 0.6 and looks harmless."""

    class Window(nn.Module):
        def forward(self, x):
            v = x.flatten(1)[:, 0]
            inside = ((v > 0.52) & (v < 0.58)).float()
            return torch.stack([2 - v, v + 2 * inside], 1)

    x, y = torch.full((4, 1, 1, 1), 0.5), torch.zeros(4, dtype=torch.int64)
    budget = BUDGETS["quick"]._replace(path=20)
    assert (
        dict(optimisation_checks(ModelUnderTest(Window(), Window(), x, y, EPS, "Linf", 0, budget, {})))[
            "silent success"
        ]
        == 1
    )


@pytest.mark.parametrize("gate, missed", [(0.599, True), (0.55, False)])
def test_a_single_step_that_no_path_of_pgd_can_take_is_red(gate, missed):
    """One pixel at 0.5: the loss falls between 0.51 and the gate, beyond which, where FGSM jumps to, is class 1."""

    class Ditch(nn.Module):
        def forward(self, x):
            v = x.flatten(1)[:, 0]
            slope = torch.where(v < 0.51, v, 1.02 - v)
            return torch.stack([1 + 0 * v, torch.where(v > gate, 1 + v, slope)], 1)

    x, y = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.int64)
    budget = BUDGETS["quick"]._replace(queries=10)
    measured = dict(attack_comparisons(ModelUnderTest(Ditch(), Ditch(), x, y, EPS, "Linf", 0, budget, {}), None))
    assert (measured["one-step vs iterative"] > CHECKS["one-step vs iterative"].threshold) == missed
    assert measured["white-box vs Square"] == measured["white-box vs noise"] == 0  # FGSM is white-box, too


def test_more_restarts_go_on_where_fewer_ended(images, cnn):
    """The gain is that of an attack with twice the restarts, run as one, over one with half of them."""
    x, y = (t[:40] for t in images)
    at = ModelUnderTest(cnn, cnn, x, y, EPS, "Linf", 0, BUDGETS["quick"]._replace(steps=3, queries=10), {})
    whole = [at.broken("pgd", steps=3, restarts=r).double().mean().item() for r in (3, 6)]
    assert 0 < whole[0] < 1
    assert dict(attack_comparisons(at, None))["more restarts"] == pytest.approx(whole[1] - whole[0])


def test_images_that_several_checks_need_are_made_once(images, cnn):
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return cnn(x)

    x, y = (t[:10] for t in images)
    at = ModelUnderTest(cnn, Watched(), x, y, EPS, "Linf", 0, BUDGETS["quick"], {})
    first, calls = at.points("pgd", steps=4), len(seen)
    assert calls > 4
    assert torch.equal(at.points("pgd", EPS, steps=4), first) and len(seen) == calls
    assert not torch.equal(at.points("pgd", EPS / 2, steps=4), first)


def test_all_are_checked_as_each_alone(images, cnn):
    few = [t[:4] for t in images]
    tables = sanity_checks_all({"a": cnn}, *few, eps=EPS, seed=1, surrogate=cnn)
    alone = sanity_checks(cnn, *few, eps=EPS, seed=1, surrogate=cnn)
    assert tables.keys() == {"a"} and tables["a"].equals(alone[["check", "measured", "threshold", "flag"]])
    assert sanity_checks_all({"a": cnn}, *(t[:0] for t in images), eps=EPS) == {}
    assert check_matrix({}).axes[0].get_title() == "no sanity checks in this profile"


def test_the_matrix_shows_every_flag_by_colour_and_symbol(tables):
    tables = {name: tables[TWO[i % 2]] for i, name in enumerate(ALL)}  # what it draws may be anybody's
    ax = check_matrix({name: [table] for name, table in tables.items()}).axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert len(texts) == len(CHECKS) * len(tables)
    assert sum("✗" in text for text in texts) == sum(table.flag.sum() for table in tables.values())
    heads = [label.get_text() for label in ax.get_xticklabels()]
    assert [head.replace("\n", " ") for head in heads] == list(tables)
    assert max(len(line) for head in heads for line in head.splitlines()) <= 16 < max(map(len, tables))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"eps": 0.0}, "eps"),
        ({"norm": "L7"}, "L7"),
        ({"budget": "huge"}, "huge"),
        ({"x": torch.full((2, 1, 8, 8), 1.5)}, "pixels"),
        ({"y": torch.tensor([3, 99])}, "0..9"),
    ],
)
def test_bad_input_is_refused(cnn, change, words):
    call = {"x": torch.rand(2, 1, 8, 8), "y": torch.tensor([3, 4]), "eps": EPS} | change
    with pytest.raises(ValueError, match=words):
        sanity_checks(cnn, **call)
