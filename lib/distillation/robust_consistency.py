"""Distillation for purification: what a student is asked to make of an attacked image; experiment 5's variants.

A pair is an image u in [-1, 1], a level σ, noise n and T(u + σ n), the end of the teacher's path from there. All
variants begin as one consistency student f and minimise, in as many steps,

    d(f(u + σ n, σ), T(u + σ n)) + w d(f(u + δ + σ* n, σ*), T′),

where the first term has clean pairs of all levels. They differ in δ and T′ (`VARIANTS`): T′ is the teacher's path from
the clean image with the same noise, from the attacked one, or its SDE from the attacked one. The last is random, and
whoever minimises a squared distance to it answers with its mean, the blurry one-step denoiser.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.attacks.common import random_start, step_size
from lib.attacks.pgd import pgd
from lib.data import Split
from lib.diffusion.network import eps_model
from lib.diffusion.schedule import alpha_sigma, sigma_to_t, time_grid, to_model_range, to_pixel_range
from lib.diffusion.solvers import reverse_process
from lib.distillation.adversarial import AdversarialBatch, inner_maximisation
from lib.distillation.consistency import BoundaryScheduler, consistency_fn, image_distance, karras_sigmas
from lib.distillation.few_step import FewStepRecipe, precondition, unwrap
from lib.training import train
from lib.utils import per_image_rng
from lib.utils.device import to_model_device
from lib.utils.random_state import attack_mode, randn_like
from lib.utils.seeds import derive_seed, seeded_generator

VARIANTS = {  # where δ comes from: none, random, grey or adaptive; what T′ is: clean, ode or sde
    "clean": ("none", "clean"),
    "random": ("random", "clean"),
    "grey": ("grey", "clean"),
    "adaptive": ("adaptive", "clean"),
    "match-ode": ("grey", "ode"),
    "match-sde": ("grey", "sde"),
}
PATH_STEPS = 10  # Heun steps of the targets' paths


class TrainingPairs(NamedTuple):
    """What students learn from, one row per image and noise; images in [0, 1], noise and targets as f has them."""

    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]
    sigma: Float[Tensor, " n"]  # of the clean pair
    noise: Float[Tensor, "n c h w"]
    end: Float[Tensor, "n c h w"]  # T(u + σ n), in [-1, 1]
    noise_star: Float[Tensor, "n c h w"]  # of the pair at σ*
    end_star: Float[Tensor, "n c h w"]


@torch.no_grad()
def teacher_endpoints(net: nn.Module, far: Tensor, sigma: Tensor, recipe: FewStepRecipe) -> Tensor:
    """Returns the ends, in [-1, 1], of the teacher's paths from x + σ n (variance-exploding), by Heun's solver."""
    out, predict = torch.empty_like(far), eps_model(net, recipe.target)
    for one in sigma.unique():
        rows, t = (sigma == one).nonzero().squeeze(1), sigma_to_t(one.item())
        for some in rows.split(512):
            out[some] = reverse_process(
                predict, alpha_sigma(t)[0] * far[some], time_grid(max(t, 0.0), PATH_STEPS), "heun"
            )
    return out


def training_pairs(
    split: Split,
    teacher: nn.Module,
    recipe: FewStepRecipe,
    at: BoundaryScheduler,
    seed: int,
    *,
    copies: int,
    levels: int = 8,
) -> TrainingPairs:
    """Returns `copies` rows per image, each with noise of its own at a random one of `levels` levels and at σ*."""
    rng, device = seeded_generator(seed, "pairs"), next(teacher.parameters()).device
    x, y = (t.repeat(copies, *(1,) * (t.ndim - 1)) for t in split)
    sigmas = karras_sigmas(at, levels + 1)[:-1].float()
    sigma = sigmas[torch.randint(0, levels, (len(x),), generator=rng)]
    noise, star = (torch.randn(x.shape, generator=rng) for _ in range(2))
    every = [(noise, sigma), (star, sigmas[:1].expand(len(x)))]
    found = []
    for n, s in every:
        far = (to_model_range(x) + s[:, None, None, None] * n).to(device)
        found.append(teacher_endpoints(teacher, far, s.to(device), recipe).cpu())
    return TrainingPairs(x, y, sigma, noise, found[0], star, found[1])


class StudentAndClassifier(nn.Module):
    """Student and classifier as a function of the image, with the noise of one batch: what an adaptive δ follows."""

    def __init__(self, student: nn.Module, classifier: nn.Module, noise: Tensor, at: BoundaryScheduler) -> None:
        super().__init__()
        self.student, self.classifier, self.noise, self.at = student, classifier, noise, at

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        star = self.at.config.sigma_max
        far = to_model_range(x) + star * self.noise
        return self.classifier(to_pixel_range(consistency_fn(self.student, far, torch.tensor(star), self.at)))


def perturbed_images(
    source: str, pairs: TrainingPairs, classifier: nn.Module, *, eps: float, steps: int, seed: int
) -> Float[Tensor, "n c h w"]:
    """Returns the images with the δ of a source that does not depend on the student ("adaptive": unchanged).

    "random": uniform in the ball; "grey": PGD on the classifier alone.
    """
    x, own = pairs.x, derive_seed(seed, f"disturbed/{source}")
    if source == "random":
        return random_start(x, eps, "Linf", per_image_rng.image_keys(x, own) + torch.arange(len(x)), 0)
    if source == "grey":
        each = zip(x.split(512), pairs.y.split(512), strict=True)
        made = (
            pgd(classifier, *to_model_device(classifier, *part), eps, "Linf", own, steps=4 * steps) for part in each
        )
        return torch.cat([images.cpu() for images in made])
    return x


def robust_consistency_loss(
    at: BoundaryScheduler,
    classifier: nn.Module,
    *,
    source: str,
    weight: float,
    eps: float,
    steps: int,
    measure: Callable[[Tensor, Tensor], Tensor],
) -> Callable:
    """Returns the loss above for `lib.training`, on the tensors of `TrainingPairs` and, last, the disturbed images.

    The weights of both terms sum to 1. An adaptive δ is the last point of `steps` signed steps through the student, as
    it is now, and the classifier, with the noise of the pair.
    """
    star = at.config.sigma_max

    def loss(student: nn.Module, *tensors: Tensor, generator: torch.Generator, epoch: int):
        *columns, x_adv = tensors
        pair = TrainingPairs(*columns)
        if source == "adaptive":
            defended = StudentAndClassifier(student, classifier, pair.noise_star, at)
            with attack_mode(defended, "eval"):
                x_adv = inner_maximisation(
                    AdversarialBatch(defended, None, pair.x, pair.y),
                    "ce",
                    eps=eps,
                    steps=steps,
                    alpha=step_size(eps, steps),
                    start="uniform",
                    generator=generator,
                )
        plain = to_model_range(pair.x) + pair.sigma[:, None, None, None] * pair.noise
        sigma = torch.cat([pair.sigma, torch.full_like(pair.sigma, star)])
        found = consistency_fn(
            student, torch.cat([plain, to_model_range(x_adv) + star * pair.noise_star]), sigma, at
        ).chunk(2)
        clean, hard = (measure(a, b).mean() for a, b in zip(found, (pair.end, pair.end_star), strict=True))
        return (clean + weight * hard) / (1 + weight), {"clean": clean, "disturbed": hard}

    return loss


def check_variant(variant: str, weight: float, eps: float, steps: int) -> tuple[str, str]:
    """Returns source of δ and goal of a variant; ValueError for settings that could only fail later."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if not (weight >= 0 and eps >= 0 and steps >= 1):
        raise ValueError(f"weight {weight}, eps {eps}, steps {steps}: at least 0, 0 and 1 are due")
    return VARIANTS[variant]


def perturbed_targets(
    goal: str,
    pairs: TrainingPairs,
    x_adv: Tensor,
    teacher: nn.Module,
    recipe: FewStepRecipe,
    at: BoundaryScheduler,
    seed: int,
) -> Tensor:
    """Returns T′ for every pair: the end of the teacher's path from the clean image or from the attacked one.

    "clean" and "ode": both with the pair's noise; "sde": one draw of the teacher's SDE from the attacked image.
    """
    if goal == "clean":
        return pairs.end_star
    device, star = next(teacher.parameters()).device, at.config.sigma_max
    far = (to_model_range(x_adv) + star * pairs.noise_star).to(device)
    if goal == "ode":
        return teacher_endpoints(teacher, far, torch.full((len(far),), star, device=device), recipe).cpu()
    noise, predict = randn_like(seeded_generator(seed, "goal/sde", device)), eps_model(teacher, recipe.target)
    with torch.no_grad():
        z = alpha_sigma(recipe.t)[0] * far
        return torch.cat(
            [reverse_process(predict, part, time_grid(recipe.t, 20), "sde", noise) for part in z.split(512)]
        ).cpu()


def train_robust_student(
    variant: str,
    student: nn.Module,
    teacher: nn.Module,
    classifier: nn.Module,
    pairs: TrainingPairs,
    recipe: FewStepRecipe,
    at: BoundaryScheduler,
    seed: int,
    *,
    weight: float,
    eps: float,
    steps: int,
    epochs: int,
    lr: float,
    measure: str = "huber",
    features: Callable | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Returns a copy of `student` trained as the variant says, and its history; the budget is that of all variants.

    `student`, `teacher`: networks of experiment 4; `weight`: w; `eps`, `steps`: of δ, in pixel units; `measure`: d, see
    `lib.distillation.consistency.image_distance`. The last weights, averaged, are the result: nothing is chosen. Raises ValueError.
    """
    source, goal = check_variant(variant, weight, eps, steps)
    classifier = classifier.eval().requires_grad_(False)
    x_adv = perturbed_images(source, pairs, classifier, eps=eps, steps=steps, seed=seed)
    columns = pairs._replace(end_star=perturbed_targets(goal, pairs, x_adv, teacher, recipe, at, seed))
    net = precondition(copy.deepcopy(student).requires_grad_(), at, recipe)
    found = train(
        net,
        robust_consistency_loss(
            at,
            classifier,
            source=source,
            weight=weight,
            eps=eps,
            steps=steps,
            measure=image_distance(measure, features),
        ),
        (*columns, x_adv),
        epochs=epochs,
        batch_size=recipe.batch_size,
        lr=lr,
        ema=recipe.student_ema,
        clip=1.0,
        seed=seed,
        progress=False,
        name=variant,
    )
    return unwrap(net), found.history
