"""The student trained for the label: its loss against the definition, its noise share, and what it learns."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from lib.data import Split
from lib.diffusion.network import load_network, save_network
from lib.diffusion.schedule import add_noise
from lib.distillation import few_step
from lib.distillation.consistency import consistency_fn
from lib.distillation.label_purifier import LabelPurifierRecipe, label_purifier_loss, train_label_purifier
from lib.purify import PurifiedClassifier, load_purifier
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator

RECIPE = LabelPurifierRecipe(noise=0.5, label_weight=0.3, eps=0.1, steps=2, epochs=1, lr=2e-3)


@pytest.fixture
def student(models):
    recipe, _ = few_step.load_config(models)
    net, scalings = few_step.load_consistency_student(models, "cd")
    return few_step.precondition(net, scalings, recipe), scalings, recipe, net


def test_without_a_ball_the_loss_is_the_distance_and_the_labels_of_the_noisy_image(student, cnn, digits):
    net, scalings, *_ = student
    x, y = (t[:10] for t in digits)
    own = LabelPurifierRecipe(noise=0.5, label_weight=0.3, eps=0.0, steps=1, epochs=1, lr=1e-3)
    rng = torch.Generator().manual_seed(0)
    value, parts = label_purifier_loss(scalings, cnn, own)(net, x, y, generator=rng, epoch=0)
    noise = torch.randn(x.shape, generator=rng.manual_seed(0))
    u = 2 * x - 1
    end = consistency_fn(net, u + scalings.sigma_max * 0.5 * noise, scalings.sigma_max, scalings)
    distance, label = (end - u).square().mean(), F.cross_entropy(cnn((end + 1) / 2), y)
    torch.testing.assert_close(value, distance + 0.3 * label)
    torch.testing.assert_close([parts["distance"], parts["label"]], [distance, label])


def test_delta_is_found_through_student_and_classifier(student, cnn, digits):
    net, scalings, *_ = student
    x, y = (t[:30] for t in digits)
    still = LabelPurifierRecipe(noise=0.5, label_weight=1.0, eps=0.0, steps=4, epochs=1, lr=1e-3)
    moved = LabelPurifierRecipe(noise=0.5, label_weight=1.0, eps=0.3, steps=4, epochs=1, lr=1e-3)
    losses = [
        label_purifier_loss(scalings, cnn, own)(net, x, y, generator=torch.Generator().manual_seed(1), epoch=0)[1]
        for own in (still, moved)
    ]
    assert losses[1]["label"] > 1.2 * losses[0]["label"]


def test_training_lowers_the_label_loss_and_leaves_student_and_classifier_as_they_were(student, cnn, digits):
    _, scalings, recipe, net = student
    before = [p.clone() for p in (*net.parameters(), *cnn.parameters())]
    own = LabelPurifierRecipe(noise=0.0, label_weight=1.0, eps=0.05, steps=1, epochs=4, lr=4e-3)
    split = Split(*(t[:200] for t in digits))
    trained, history = train_label_purifier(net, cnn, split, recipe, scalings, own, 0)
    assert history[-1]["label"] < history[0]["label"] and history[-1]["distance"] < history[0]["distance"]
    assert all(torch.equal(a, b) for a, b in zip(before, (*net.parameters(), *cnn.parameters()), strict=True))
    assert trained is not net
    cnn.requires_grad_(True)


def test_the_share_of_the_noise_is_saved_with_the_network_and_used(models, cnn, digits, tmp_path):
    work = shutil.copytree(models, tmp_path / "work")
    for share in (0.0, 0.25):
        name = f"label-n{100 * share:.0f}"
        save_network(load_network(work / "cd"), work / name, {"history": [], "skip": True, "noise_share": share})
        few_step.save_config(work, *few_step.load_config(work))
        purifier = load_purifier(work, f"{name}-1", clamp=False)
        x, recipe = digits[0][:5], few_step.load_config(work)[0]
        noise = share * randn_like(seeded_generator(0, "n"))(x)
        z = add_noise(x, recipe.t, lambda like, noise=noise: noise)
        expected = purifier.sampler(z, randn_like(seeded_generator(0, "n")))
        torch.testing.assert_close(purifier(x, randn_like(seeded_generator(0, "n"))), expected)
        assert PurifiedClassifier(purifier, cnn).random == (share > 0)
    assert PurifiedClassifier(load_purifier(work, "cd-1"), cnn).random


@pytest.mark.parametrize(
    "wrong", [{"noise": 1.5}, {"noise": -0.1}, {"label_weight": float("nan")}, {"steps": 0}, {"lr": 0}]
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    settings = {"noise": 0.5, "label_weight": 0.3, "eps": 0.1, "steps": 2, "epochs": 1, "lr": 2e-3} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LabelPurifierRecipe(**settings)
