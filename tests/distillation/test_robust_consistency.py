"""Robust consistency distillation: targets against closed forms, δ inside its ball, and students that learn."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lib.data import Split, load_dataset
from lib.diffusion.network import build_unet
from lib.diffusion.schedule import alpha_sigma, sigma_to_t, t_to_sigma
from lib.distillation import robust_consistency
from lib.distillation.consistency import ConsistencyScalings, image_distance, karras_sigmas
from lib.distillation.few_step import precondition
from lib.distillation.robust_consistency import VARIANTS, RobustConsistencyRecipe
from lib.models import build_classifier
from lib.utils.seeds import seeded_generator
from tests.recipes import small_recipe

RECIPE = small_recipe(batch_size=32)
SCALINGS = ConsistencyScalings(t_to_sigma(RECIPE.t), 0.6)
GREY = RobustConsistencyRecipe("grey", weight=1.0, eps=0.1, steps=2, epochs=2, lr=1e-3)
S = 0.5  # standard deviation of Gaussian data


class Gaussian(nn.Module):
    """The exact network, of target v, for data N(0, S²): its paths are straight lines through 0, known to the end."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(()))

    def forward(self, z, t):
        alpha, s = alpha_sigma(t)
        x = alpha * S**2 / (alpha**2 * S**2 + s**2) * z
        eps = (z - alpha * x) / s

        class Out:
            sample = alpha * eps - s * x

        return Out


@pytest.fixture(scope="module")
def few():
    data = load_dataset("digits").train
    return Split(data.x[:40], data.y[:40])


@pytest.fixture(scope="module")
def nets():
    return [build_unet(1, 8, (8, 8), seed=seed).eval() for seed in (0, 1)]


@pytest.fixture(scope="module")
def classifier():
    return build_classifier("cnn", width=4, seed=0).eval()


def test_targets_are_the_ends_of_the_teachers_paths(few):
    """For Gaussian data the path from x at level σ ends at x S / √(S² + σ²)."""
    pairs = robust_consistency.training_pairs(few, Gaussian(), RECIPE, SCALINGS, 0, copies=3)
    assert len(pairs.x) == 120 and torch.equal(pairs.x[40:80], few.x) and torch.equal(pairs.y[80:], few.y)
    assert (
        set(pairs.sigma.tolist()) <= set(karras_sigmas(SCALINGS, 9)[:-1].float().tolist())
        and len(pairs.sigma.unique()) > 4
    )
    star = torch.full_like(pairs.sigma, SCALINGS.sigma_max)
    for noise, sigma, end in ((pairs.noise, pairs.sigma, pairs.end), (pairs.noise_star, star, pairs.end_star)):
        sigma = sigma[:, None, None, None]
        far = 2 * pairs.x - 1 + sigma * noise
        torch.testing.assert_close(end, far * S / (S**2 + sigma**2).sqrt(), rtol=5e-3, atol=1e-4)
    assert not torch.equal(pairs.noise[:40], pairs.noise[40:80])
    again = robust_consistency.training_pairs(few, Gaussian(), RECIPE, SCALINGS, 0, copies=3)
    assert all(torch.equal(a, b) for a, b in zip(pairs, again, strict=True))


def test_targets_of_a_variant_start_from_its_images(few):
    teacher = Gaussian()
    pairs = robust_consistency.training_pairs(few, teacher, RECIPE, SCALINGS, 0, copies=2)
    x_adv, star = (pairs.x + 0.1).clamp(0, 1), SCALINGS.sigma_max
    targets = lambda goal: robust_consistency.perturbed_targets(goal, pairs, x_adv, teacher, RECIPE, SCALINGS, 0)  # noqa: E731
    assert torch.equal(targets("clean"), pairs.end_star)
    far = 2 * x_adv - 1 + star * pairs.noise_star
    torch.testing.assert_close(targets("ode"), far * S / (S**2 + star**2) ** 0.5, rtol=5e-3, atol=1e-4)
    draws = torch.stack(
        [
            robust_consistency.perturbed_targets("sde", pairs, x_adv, teacher, RECIPE, SCALINGS, seed)
            for seed in range(60)
        ]
    )
    mean = far * S**2 / (S**2 + star**2)  # the posterior's, which an L2 loss asks for; its variance is known too
    torch.testing.assert_close(draws.mean(0).mean(), mean.mean(), rtol=0, atol=0.02)
    assert (draws.mean(0) - mean).abs().mean() < 0.08
    assert draws.var(0).mean().item() == pytest.approx(S**2 * star**2 / (S**2 + star**2), rel=0.1)


def test_delta_stays_in_its_ball_and_hurts_as_its_source_says(few, nets, cnn):
    pairs = robust_consistency.training_pairs(few, nets[0], RECIPE, SCALINGS, 0, copies=2)
    loss = {}
    for source in ("none", "random", "grey"):
        x_adv = robust_consistency.perturbed_images(source, pairs, cnn, eps=0.1, steps=3, seed=0)
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - pairs.x).abs().max() <= 0.1 + 1e-6
        loss[source] = nn.functional.cross_entropy(cnn(x_adv), pairs.y).item()
    assert loss["none"] <= loss["random"] < loss["grey"] - 0.3
    x_adv = robust_consistency.perturbed_images("random", pairs, cnn, eps=0.1, steps=3, seed=0)
    assert not torch.equal(x_adv[:40] - few.x, x_adv[40:] - few.x)  # every row has a δ of its own


def test_the_loss_is_the_weighted_mean_of_its_two_terms(few, nets, classifier):
    pairs = robust_consistency.training_pairs(few, nets[0], RECIPE, SCALINGS, 0, copies=1)
    net, x_adv = precondition(nets[1], SCALINGS, RECIPE).eval(), (pairs.x + 0.05).clamp(0, 1)
    results = {}
    for weight in (0.0, 0.5, 3.0):
        fit = robust_consistency.robust_consistency_loss(
            SCALINGS, classifier, replace(GREY, weight=weight), image_distance("l2")
        )
        value, logs = fit(net, *pairs, x_adv, generator=seeded_generator(0, "loss"), epoch=0)
        torch.testing.assert_close(value, (logs["clean"] + weight * logs["disturbed"]) / (1 + weight))
        results[weight] = value, logs
    assert results[0.0][1] == results[3.0][1] and results[0.0][0] != results[3.0][0]
    star = SCALINGS.sigma_max
    far = torch.cat(
        [2 * pairs.x - 1 + pairs.sigma[:, None, None, None] * pairs.noise, 2 * x_adv - 1 + star * pairs.noise_star]
    )
    sigma = torch.cat([pairs.sigma, torch.full_like(pairs.sigma, star)])
    skip, out = SCALINGS.c_skip_out(sigma[:, None, None, None])
    c_in = (sigma**2 + 0.6**2).rsqrt()[:, None, None, None]
    f = skip * far + out * net(c_in * far, 250 * sigma.log()).sample
    each = (f - torch.cat([pairs.end, pairs.end_star])).square().mean((1, 2, 3))
    torch.testing.assert_close(results[0.0][1]["clean"], each[:40].mean())
    torch.testing.assert_close(results[0.0][1]["disturbed"], each[40:].mean())


def test_an_adaptive_delta_follows_student_and_classifier(few, nets, cnn):
    pairs = robust_consistency.training_pairs(few, nets[0], RECIPE, SCALINGS, 0, copies=1)
    net = precondition(nets[1], SCALINGS, RECIPE).train()
    seen = []

    def watch(a, b):
        seen.append(a.detach())
        return image_distance("l2")(a, b)

    def outputs(source, x_adv):
        seen.clear()
        fit = robust_consistency.robust_consistency_loss(SCALINGS, cnn, replace(GREY, variant=source, steps=3), watch)
        fit(net, *pairs, x_adv, generator=seeded_generator(0, "loss"), epoch=0)
        return seen[1]

    def loss(output):
        return nn.functional.cross_entropy(cnn((output + 1) / 2), pairs.y).item()

    random = robust_consistency.perturbed_images("random", pairs, cnn, eps=0.1, steps=3, seed=0)
    adaptive = loss(outputs("adaptive", pairs.x))
    assert adaptive > loss(outputs("random", random)) + 0.01 > loss(outputs("clean", pairs.x)) - 0.1
    assert net.training and all(p.grad is None for p in cnn.parameters())


def test_every_variant_trains_a_copy_as_long_as_the_others(few, nets, classifier):
    pairs = robust_consistency.training_pairs(few, nets[0], RECIPE, SCALINGS, 0, copies=2)
    before = {k: v.clone() for k, v in nets[1].state_dict().items()}
    results = {}
    for name in VARIANTS:
        net, history = robust_consistency.train_robust_student(
            nets[1], nets[0], classifier, pairs, RECIPE, SCALINGS, replace(GREY, variant=name), 0
        )
        assert [row["epoch"] for row in history] == [0, 1] and type(net) is type(nets[1])
        results[name] = torch.cat([p.flatten() for p in net.parameters()])
    assert all(torch.equal(v, before[k]) for k, v in nets[1].state_dict().items())
    values = list(results.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    longer = robust_consistency.train_robust_student(
        nets[1],
        nets[0],
        classifier,
        pairs,
        RECIPE,
        SCALINGS,
        replace(GREY, variant="clean", epochs=12, lr=5e-3),
        0,
    )[1]
    assert longer[-1]["clean"] < 0.7 * longer[0]["clean"]


def test_bad_settings_are_refused():
    for arguments, words in (
        (("robust", 1.0, 0.1, 3), "expected a variant among clean, random.* got 'robust'"),
        (("grey", -1.0, 0.1, 3), "got weight -1"),
        (("grey", 1.0, 0.1, 0), "got .* steps 0"),
        (("grey", float("nan"), 0.1, 3), "got weight nan"),
    ):
        with pytest.raises(ValueError, match=words):
            robust_consistency.check_variant(*arguments)
    assert robust_consistency.check_variant("match-sde", 0.0, 0.1, 1) == ("grey", "sde")
    assert sigma_to_t(SCALINGS.sigma_max) == pytest.approx(RECIPE.t)
