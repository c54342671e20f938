"""The matched set is as strong as a loop written apart from it, in plain torch, of many times as many gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from lib.data import Split, load_dataset
from lib.evaluation.attack_plan import EvaluationSettings
from lib.evaluation.matched_attacks import EXACT, AttackEffort, MeasuringDraws, correct_draws
from lib.experiments import diffpure, diffpure_metrics, diffpure_students
from lib.experiments.diffpure import Defence
from lib.pipeline.profile import compose_profile
from lib.utils import artifacts
from lib.utils.parallel import parallel_map

IMAGES, STEPS, EOT, RESTARTS = 64, 200, 32, 5
CHOOSING, FRESH = 200, 1000  # draws per image
DEFENCES = [Defence("adaptive-1"), Defence("label-1")]


def independent_path(model, x, y, eps, restart):
    """Returns the last point of momentum PGD, its steps on a cosine, by cross-entropy or, every other time, margin."""
    point, momentum = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1), torch.zeros_like(x)
    labels = y.repeat(EOT)
    for step in range(STEPS):
        point.requires_grad_()
        z = model(point.repeat(EOT, 1, 1, 1))
        if restart % 2 == 0:
            loss = F.cross_entropy(z, labels, reduction="sum")
        else:
            own = F.one_hot(labels, z.shape[1]).bool()
            loss = (z.masked_fill(own, -math.inf).amax(1) - z[own]).sum()
        (grad,) = torch.autograd.grad(loss, point)
        momentum = 0.75 * momentum + grad / grad.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-20)
        size = eps * (0.005 + 0.125 * (1 + math.cos(math.pi * step / STEPS)))
        point = point.detach() + size * momentum.sign()
        point = (x + (point - x).clamp(-eps, eps)).clamp(0, 1)
    return point


def independent_images(defence, models, classifiers, sample, eps):
    """Returns the worst of all restarts for each image, chosen by draws of its own."""
    x, y = sample
    model = diffpure.build_defence(models, defence.purifier, classifiers[defence.classifier])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ends = torch.stack([independent_path(model, x, y, eps, restart) for restart in range(RESTARTS)])
        with torch.no_grad():
            answers = [model(end.repeat(CHOOSING, 1, 1, 1)).argmax(1).view(CHOOSING, -1) for end in ends]
    worst = torch.stack([(answer == y).float().mean(0) for answer in answers]).argmin(0)
    return ends[worst, torch.arange(len(y))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The profile's settings, a folder of small real networks of digits with two students, the classifier, images."""
    settings, data = compose_profile("digits")["dp"], load_dataset("digits")
    budget = {"eps": settings["eps"], "steps": settings["delta_steps"]}
    robust = budget | {"epochs": settings["variant_epochs"], "lr": settings["variant_lr"], "weight": 1.0}
    robust |= {"measure": settings["measure"]}
    label = budget | {k: settings[f"label_{k}"] for k in ("epochs", "lr")} | {"label_weight": settings["label_weight"]}
    recipe = {k: settings[f"classifier_{k}"] for k in ("width", "epochs", "lr")}
    classifiers = {"natural": diffpure.train_defended(data, 0, **recipe)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "ROOT", tmp_path_factory.mktemp("results"))
        models = diffpure_students.few_step_networks(artifacts.SCRATCH, "digits", data, 0)
    plans = {name: diffpure_students.plan_student(name, robust, label) for name in ("adaptive", "label")}
    diffpure_students.train_students(plans, models, data, classifiers, 0, copies=settings["copies"], jobs=2)
    return settings, models, classifiers, Split(data.val.x[:IMAGES], data.val.y[:IMAGES])


@pytest.mark.slow
def test_no_defence_is_attacked_more_weakly_than_by_a_long_independent_loop(trained):
    settings, models, classifiers, sample = trained
    x, y = sample
    eps, common = settings["eps"], (models, classifiers, sample)
    effort = AttackEffort(*(settings[k] for k in ("attack_steps", "eot", "queries", "last_steps", "last_eot")))
    draws = MeasuringDraws(*(settings[k] for k in ("first_draws", "finalists", "second_draws", "fresh_draws")))
    tasks = [(defence, *common, eps, effort, 0) for defence in DEFENCES]
    crafted = [result["images"] for result in parallel_map(diffpure.attack_defence, tasks, 2, progress=False)]
    tasks = [(defence, *common, eps) for defence in DEFENCES]
    long = parallel_map(independent_images, tasks, 2, progress=False)
    left = {}
    for defence, own, other, theirs in zip(DEFENCES, crafted, reversed(crafted), long, strict=True):
        model = diffpure.build_defence(models, defence.purifier, classifiers[defence.classifier], pixels=x.numel())
        candidates = own | {f"from the other, {label}": other[label] for label in EXACT}
        assert all((images - x).abs().max() <= eps + 1e-6 for images in (*candidates.values(), theirs))
        at = EvaluationSettings(eps=eps, seed=0, batch_size=len(x))
        ours = diffpure.worst_of_set(model, False, candidates, sample, at, effort, draws)[1].images
        assert (ours - x).abs().max() <= eps + 1e-6
        left[str(defence)] = [
            float(correct_draws(model, images, y, FRESH, 0, "strength")[0].mean()) for images in (ours, theirs)
        ]
    print({name: f"ours {a:.2%}, independent {b:.2%}" for name, (a, b) in left.items()})
    assert all(a <= b + diffpure_metrics.WEAKER_BY for a, b in left.values()), left
