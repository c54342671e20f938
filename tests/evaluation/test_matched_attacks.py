"""The matched set of attacks: its members, the worst image per example, and draws that no choice has touched."""

import numpy as np
import pytest
import torch
from torch import nn

from lib.evaluation import matched_attacks
from lib.evaluation.adversarial_images import adversarial_images
from lib.evaluation.attack_plan import EvaluationSettings, attack_plan
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws, correct_draws, worst_images
from lib.purify import IdentityPurifier, PurifiedClassifier, load_purifier

EFFORT = AttackEffort(steps=4, eot=2, queries=6)
N = 400


class CoinPurifier(nn.Module):
    """A purifier whose images are of class 0 with the probability of the image's pixel."""

    evaluations, independent_noise = 1, True

    def forward(self, x, randn_like=None):
        return (torch.rand(len(x), 1, 1, 1) < x).to(x.dtype)


class PixelClassifier(nn.Module):
    """Class 0 where the pixel is 1, class 1 where it is 0."""

    def forward(self, x):
        p = x.flatten(1)[:, :1]
        return torch.cat([20 * p, 20 * (1 - p)], 1)


@pytest.fixture
def coin():
    return PurifiedClassifier(CoinPurifier(), PixelClassifier())


def constant(p):
    return torch.full((N, 1, 1, 1), p)


def test_the_worst_candidate_is_chosen_and_measured_without_the_bias_of_the_choice(coin):
    """All candidates are equal here: a measure on the draws that chose would be far below 0.5."""
    y, draws = torch.zeros(N, dtype=torch.int64), MeasuringDraws(first=2, finalists=3, second=4, fresh=40)
    equal = {f"attack {k}": constant(0.5) for k in range(8)}
    worst = worst_images(coin, equal, y, draws, 0)
    fresh, _ = correct_draws(coin, worst.images, y, draws.fresh, 0, "matched")
    assert abs(fresh.mean() - 0.5) < 0.02
    noise = [torch.full((N, 1, 1, 1), 0.5) for _ in equal]  # the same images, and not the same noise
    independent = [correct_draws(coin, some, y, 2, k, "first")[0].mean(0) for k, some in enumerate(noise)]
    assert np.min(independent, 0).mean() < 0.25
    assert all(np.array_equal(bits, worst.draws["attack 0"]) for bits in worst.draws.values())
    assert all(abs(bits.mean() - 0.5) < 0.06 and bits.shape == (2, N) for bits in worst.draws.values())


def test_a_candidate_that_is_worse_for_some_examples_is_taken_for_these(coin):
    y = torch.zeros(N, dtype=torch.int64)
    mixed = {"left": constant(0.9), "right": constant(0.9), "none": constant(0.95)}
    mixed["left"][: N // 2], mixed["right"][N // 2 :] = 0.1, 0.1
    worst = worst_images(coin, mixed, y, MeasuringDraws(4, 2, 12, 10), 0)
    assert np.mean([label == ("left" if i < N // 2 else "right") for i, label in enumerate(worst.labels)]) > 0.99
    assert worst.images.flatten().lt(0.2).float().mean() > 0.99
    counts = matched_attacks.count_labels(worst.labels)
    assert set(list(counts)[:2]) == {"left", "right"} and sum(counts.values()) == N


def test_a_deterministic_defence_is_asked_once(cnn, digits):
    x, y = (t[1297:1317] for t in digits)
    model = PurifiedClassifier(IdentityPurifier(), cnn)
    right, label = correct_draws(model, x, y, 30, 0, "clean")
    assert not model.random and right.shape == (1, 20)
    assert np.array_equal(right[0], (cnn(x).argmax(1) == y).numpy())
    assert np.allclose(label, cnn(x).softmax(1)[torch.arange(20), y].detach())
    wrong = x.flip(0)
    worst = worst_images(model, {"clean": x, "flipped": wrong}, y, MeasuringDraws(), 0)
    assert (~correct_draws(model, worst.images, y, 1, 0, "")[0]).sum() >= (cnn(wrong).argmax(1) != y).sum()


def test_an_answer_that_is_not_finite_is_wrong():
    class Nan(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), torch.nan)

    right, label = correct_draws(
        PurifiedClassifier(IdentityPurifier(), Nan()), constant(0.5), torch.zeros(N, dtype=torch.int64), 1, 0, ""
    )
    assert not right.any() and (label == 0).all()


@pytest.mark.parametrize("name", ["cd-1", "sde-12", "none"])
def test_every_attack_stays_in_the_ball_and_has_the_same_number_of_gradients(models, cnn, digits, name):
    x, y = (t[1297:1303] for t in digits)
    coarse, classifier = None, cnn
    purifier = IdentityPurifier() if name == "none" else load_purifier(models, name, clamp=False)
    model = PurifiedClassifier(purifier, classifier)
    if name == "sde-12":
        coarse = PurifiedClassifier(load_purifier(models, "sde-5", clamp=False), classifier)
    at = EvaluationSettings(eps=0.1, seed=0, batch_size=6)
    entries = attack_plan(matched_attacks.matched_attacks(model, EFFORT, 0, coarse), at)
    names = ["exact-ce", "exact-margin", "exact-ten", "apgd", "bpda", "grey", "fixed", "square"]
    assert list(entries) == [k for k in names if model.random or k != "exact-ten"]
    crafted = adversarial_images(model, entries, x, y, [torch.arange(6)], at, progress=False)
    for label, attacked in crafted.items():
        assert (attacked.images - x).abs().max() <= 0.1 + 1e-6 and not torch.equal(attacked.images, x), label
        assert attacked.images.min() >= 0 and attacked.images.max() <= 1
    gradients = {label: attacked.backward / len(x) for label, attacked in crafted.items()}
    budget = EFFORT.steps * EFFORT.eot
    assert {gradients[k] for k in matched_attacks.EXACT if k in gradients} == {budget}
    assert [gradients[k] for k in ("bpda", "grey", "fixed")] == [budget] * 3
    assert 0 < gradients["apgd"] <= 1.5 * budget  # it rests at its first success
    assert gradients["square"] == 0


def test_few_steps_and_a_last_exact_climb_are_no_weaker(models, cnn, digits):
    """Against the exact gradient all the way, at half of its evaluations of the long purifier."""
    x, y = (t[1297:1327] for t in digits)
    long, short = (PurifiedClassifier(load_purifier(models, f"sde-{n}", clamp=False), cnn) for n in (12, 5))
    left = {}
    at, effort = EvaluationSettings(eps=0.3, seed=0, batch_size=30), AttackEffort(16, 2, 2, 4, 4)

    def craft(entry):
        entries = attack_plan({"a": entry}, at)
        return adversarial_images(long, entries, x, y, [torch.arange(30)], at, progress=False)["a"].images

    climb = {"name": matched_attacks.annealed_attack, "steps": 16, "eot": 2}
    first = craft(climb | {"model": short})
    last = matched_attacks.last_climb(long, first, effort, long=True)
    assert (last["steps"], last["eot"]) == (1, 2)
    for label, images in (("few", craft(last | {"steps": 4, "eot": 4})), ("exact", craft(climb))):
        left[label] = correct_draws(long, images, y, 20, 0, "")[1].mean()
    assert left["few"] <= left["exact"] + 0.03


def test_the_last_climb_goes_on_from_the_worst_image_with_more_draws(models, cnn, digits):
    x, y = (t[1297:1307] for t in digits)
    model = PurifiedClassifier(load_purifier(models, "cd-1", clamp=False), cnn)
    at = EvaluationSettings(eps=0.2, seed=0, batch_size=10)
    start = (x + 0.2 * torch.randn_like(x).sign()).clamp(0, 1)
    effort = AttackEffort(steps=4, eot=2, queries=6, last_steps=3, last_eot=5)
    entry = matched_attacks.last_climb(model, start, effort)
    climbed = adversarial_images(model, attack_plan({"last": entry}, at), x, y, [torch.arange(10)], at, progress=False)
    result = climbed["last"]
    assert (result.images - x).abs().max() <= 0.2 + 1e-6 and result.backward == 10 * 3 * 5
    assert (result.images - start).abs().max() <= 0.2 * (0.2 + 0.11 + 0.02) + 1e-6  # three small steps away
    before, after = (correct_draws(model, images, y, 40, 0, "")[1].mean() for images in (start, result.images))
    assert after < before


def test_the_attack_outside_the_ball_is_wider_and_smooth(models, cnn, digits):
    x, y = (t[1297:1307] for t in digits)
    model = PurifiedClassifier(load_purifier(models, "cd-1", clamp=False), cnn)
    at = EvaluationSettings(eps=0.1, seed=0, batch_size=10)
    entry = matched_attacks.outside_attack(model, EFFORT, 0.1)
    result = adversarial_images(model, attack_plan({"o": entry}, at), x, y, [torch.arange(10)], at, progress=False)["o"]
    assert 0.11 < (result.images - x).abs().max() <= 0.2 + 1e-6
    assert result.backward == 10 * EFFORT.steps * EFFORT.eot
