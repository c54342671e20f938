"""Robust consistency distillation: consistency students that purify attacked images; experiment 5's variants.

A pair is an image u in [-1, 1], a level σ, noise n and T(u + σ n), the end of the teacher's path from there. All
variants begin as one consistency student f and minimise, in as many steps,

    d(f(u + σ n, σ), T(u + σ n)) + w d(f(u + δ + σ* n, σ*), T′),

where the first term has clean pairs of all levels. They differ in δ and T′ (`VARIANTS`): T′ is the end of the teacher's
path from the clean image with the same noise, of that from the attacked one, or a draw of its SDE from the attacked
one. The last is random: the squared distance to it is least for its mean, the blurry one-step denoiser.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
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
from lib.distillation.consistency import ConsistencyScalings, consistency_fn, image_distance, karras_sigmas
from lib.distillation.few_step import FewStepRecipe, precondition, unwrap
from lib.training import train
from lib.utils import per_image_rng
from lib.utils.device import to_model_device
from lib.utils.random_state import attack_mode, randn_like
from lib.utils.seeds import derive_seed, seeded_generator

VARIANTS = {  # source of δ: none, random, grey or adaptive; goal T′: clean, ode or sde
    "clean": ("none", "clean"),
    "random": ("random", "clean"),
    "grey": ("grey", "clean"),
    "adaptive": ("adaptive", "clean"),
    "match-ode": ("grey", "ode"),
    "match-sde": ("grey", "sde"),
}
PATH_STEPS = 10  # Heun steps of the teacher's paths


class TrainingPairs(NamedTuple):
    """What students learn from, one row per image and noise; images in [0, 1], noise and targets as f has them."""

    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]
    sigma: Float[Tensor, " n"]  # of the clean pair
    noise: Float[Tensor, "n c h w"]
    end: Float[Tensor, "n c h w"]  # T(u + σ n), in [-1, 1]
    noise_star: Float[Tensor, "n c h w"]  # of the pair at σ*
    end_star: Float[Tensor, "n c h w"]


def check_variant(variant: str, weight: float, eps: float, steps: int) -> tuple[str, str]:
    """Check a variant and its settings before any training.

    Args:
        variant: one of `VARIANTS`.
        weight: w, at least 0.
        eps: radius of δ, at least 0.
        steps: of the search for δ, at least 1.

    Returns:
        The variant's source of δ and its goal T′.

    Raises:
        ValueError: for settings that could only fail later.
    """
    if variant not in VARIANTS:
        raise ValueError(f"expected a variant among {', '.join(VARIANTS)}, got {variant!r}")
    if not (weight >= 0 and eps >= 0 and steps >= 1):
        raise ValueError(
            f"expected weight >= 0, eps >= 0 and steps >= 1, got weight {weight}, eps {eps}, steps {steps}"
        )
    return VARIANTS[variant]


@dataclass(frozen=True)
class RobustConsistencyRecipe:
    """How one student is trained: its variant, δ and the budget; checked by `check_variant`."""

    variant: str  # one of `VARIANTS`
    weight: float  # w
    eps: float  # radius of the Linf ball of δ, in pixel units
    steps: int  # of the search for δ
    epochs: int
    lr: float
    measure: str = "huber"  # d, one of `lib.distillation.consistency.DISTANCES`

    def __post_init__(self) -> None:
        check_variant(self.variant, self.weight, self.eps, self.steps)


@torch.no_grad()
def teacher_endpoints(net: nn.Module, x: Tensor, sigma: Tensor, recipe: FewStepRecipe) -> Tensor:
    """Return T(x), the ends of the teacher's paths, by Heun's solver.

    Args:
        net: the teacher.
        x: noisy images (n, c, h, w) = u + σ n.
        sigma: the level of each (n,).
        recipe: of the teacher.

    Returns:
        Images (n, c, h, w) in [-1, 1], not clamped.
    """
    end, model = torch.empty_like(x), eps_model(net, recipe.target)
    for level in sigma.unique().tolist():
        rows, t = (sigma == level).nonzero().squeeze(1), sigma_to_t(level)
        times = time_grid(max(t, 0.0), PATH_STEPS)
        for part in rows.split(512):
            end[part] = reverse_process(model, alpha_sigma(t)[0] * x[part], times, "heun")
    return end


def training_pairs(
    split: Split,
    teacher: nn.Module,
    recipe: FewStepRecipe,
    scalings: ConsistencyScalings,
    seed: int,
    *,
    copies: int,
    levels: int = 8,
) -> TrainingPairs:
    """Draw noise for training images and compute the teacher's targets.

    Args:
        split: images (m, c, h, w) in [0, 1] and labels.
        teacher: a diffusion network.
        recipe: of the teacher.
        scalings: of the students.
        seed: of the noise.
        copies: rows per image, each with its own noise.
        levels: number of levels of the clean pairs, of which each row has a random one.

    Returns:
        `copies` m rows, on the CPU.
    """
    rng, device = seeded_generator(seed, "pairs"), next(teacher.parameters()).device
    x, y = (t.repeat(copies, *(1,) * (t.ndim - 1)) for t in split)
    sigmas = karras_sigmas(scalings, levels + 1)[:-1].float()
    sigma = sigmas[torch.randint(0, levels, (len(x),), generator=rng)]
    noise, noise_star = (torch.randn(x.shape, generator=rng) for _ in range(2))

    def endpoints(noise: Tensor, sigma: Tensor) -> Tensor:
        noisy = (to_model_range(x) + sigma[:, None, None, None] * noise).to(device)
        return teacher_endpoints(teacher, noisy, sigma.to(device), recipe).cpu()

    end, end_star = endpoints(noise, sigma), endpoints(noise_star, sigmas[:1].expand(len(x)))
    return TrainingPairs(x, y, sigma, noise, end, noise_star, end_star)


class StudentAndClassifier(nn.Module):
    """Student and classifier as a function of the image, with the noise of one batch: what an adaptive δ attacks."""

    def __init__(self, student: nn.Module, classifier: nn.Module, noise: Tensor, scalings: ConsistencyScalings) -> None:
        super().__init__()
        self.student, self.classifier, self.noise, self.scalings = student, classifier, noise, scalings

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        sigma_star = self.scalings.sigma_max
        noisy = to_model_range(x) + sigma_star * self.noise
        return self.classifier(to_pixel_range(consistency_fn(self.student, noisy, sigma_star, self.scalings)))


def perturbed_images(
    source: str, pairs: TrainingPairs, classifier: nn.Module, *, eps: float, steps: int, seed: int
) -> Float[Tensor, "n c h w"]:
    """Return the images with the δ of a source that does not depend on the student.

    Args:
        source: "random": uniform in the ball; "grey": PGD on the classifier alone; others: δ = 0.
        pairs: images and labels.
        classifier: in eval mode.
        eps: radius of the Linf ball, in pixel units.
        steps: a quarter of those of PGD.
        seed: of δ.

    Returns:
        Images (n, c, h, w) in the ball and in [0, 1], on the CPU.
    """
    x, own_seed = pairs.x, derive_seed(seed, f"disturbed/{source}")
    if source == "random":
        return random_start(x, eps, "Linf", per_image_rng.image_keys(x, own_seed) + torch.arange(len(x)), 0)
    if source == "grey":
        attacked = []
        for batch in zip(x.split(512), pairs.y.split(512), strict=True):
            images, labels = to_model_device(classifier, *batch)
            attacked.append(pgd(classifier, images, labels, eps, "Linf", own_seed, steps=4 * steps).cpu())
        return torch.cat(attacked)
    return x


def robust_consistency_loss(
    scalings: ConsistencyScalings,
    classifier: nn.Module,
    robust: RobustConsistencyRecipe,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Callable:
    """Return the loss of the module's docstring, divided by 1 + w so that the weights of its terms sum to 1.

    Args:
        scalings: of the student.
        classifier: of the adaptive δ, found through it and the student as it is now, with the noise of the pair.
        robust: variant, w, and budget of δ.
        distance: d.

    Returns:
        A loss for `lib.training.train` on the tensors of `TrainingPairs` and, last, the perturbed images.
    """
    sigma_star, (source, _) = scalings.sigma_max, VARIANTS[robust.variant]

    def loss(student: nn.Module, *tensors: Tensor, generator: torch.Generator, epoch: int):
        *columns, x_adv = tensors
        pair = TrainingPairs(*columns)
        if source == "adaptive":
            defended = StudentAndClassifier(student, classifier, pair.noise_star, scalings)
            with attack_mode(defended, "eval"):
                x_adv = inner_maximisation(
                    AdversarialBatch(defended, None, pair.x, pair.y),
                    "ce",
                    eps=robust.eps,
                    steps=robust.steps,
                    alpha=step_size(robust.eps, robust.steps),
                    start="uniform",
                    generator=generator,
                )
        clean = to_model_range(pair.x) + pair.sigma[:, None, None, None] * pair.noise
        attacked = to_model_range(x_adv) + sigma_star * pair.noise_star
        sigma = torch.cat([pair.sigma, torch.full_like(pair.sigma, sigma_star)])
        ends = consistency_fn(student, torch.cat([clean, attacked]), sigma, scalings).chunk(2)
        on_clean, on_attacked = (distance(a, b).mean() for a, b in zip(ends, (pair.end, pair.end_star), strict=True))
        value = (on_clean + robust.weight * on_attacked) / (1 + robust.weight)
        return value, {"clean": on_clean, "disturbed": on_attacked}

    return loss


def perturbed_targets(
    goal: str,
    pairs: TrainingPairs,
    x_adv: Tensor,
    teacher: nn.Module,
    recipe: FewStepRecipe,
    scalings: ConsistencyScalings,
    seed: int,
) -> Tensor:
    """Return T′ for every pair.

    Args:
        goal: "clean": the end of the teacher's path from the clean image, "ode": of that from the attacked one, both
            with the pair's noise; "sde": one draw of the teacher's SDE from the attacked image.
        pairs: noise, and targets for "clean".
        x_adv: attacked images (n, c, h, w) in [0, 1].
        teacher: a diffusion network.
        recipe: of the teacher.
        scalings: of the students.
        seed: of the SDE.

    Returns:
        Images (n, c, h, w) in [-1, 1], on the CPU.
    """
    if goal == "clean":
        return pairs.end_star
    device, sigma_star = next(teacher.parameters()).device, scalings.sigma_max
    noisy = (to_model_range(x_adv) + sigma_star * pairs.noise_star).to(device)
    if goal == "ode":
        return teacher_endpoints(teacher, noisy, torch.full((len(noisy),), sigma_star, device=device), recipe).cpu()
    noise, model = randn_like(seeded_generator(seed, "goal/sde", device)), eps_model(teacher, recipe.target)
    times, z = time_grid(recipe.t, 20), alpha_sigma(recipe.t)[0] * noisy
    with torch.no_grad():
        return torch.cat([reverse_process(model, part, times, "sde", noise) for part in z.split(512)]).cpu()


def train_robust_student(
    student: nn.Module,
    teacher: nn.Module,
    classifier: nn.Module,
    pairs: TrainingPairs,
    recipe: FewStepRecipe,
    scalings: ConsistencyScalings,
    robust: RobustConsistencyRecipe,
    seed: int,
    features: Callable[[Tensor], Tensor] | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train a copy of a consistency student on pairs, as a variant says; the last weights, averaged, are the result.

    Args:
        student: network of a consistency student.
        teacher: its diffusion network.
        classifier: of the grey and adaptive δ; frozen here.
        pairs: clean pairs of the teacher.
        recipe: of teacher and student.
        scalings: of the student, with its own `skip`, see `lib.distillation.few_step.load_consistency_student`.
        robust: variant, δ and budget.
        seed: of δ, batches and noise.
        features: for the distance "features", see `lib.distillation.consistency.image_distance`.

    Returns:
        The trained network and its history, one dict per epoch.

    Raises:
        ValueError: for the distance "features" without the function.
    """
    source, goal = VARIANTS[robust.variant]
    distance, classifier = image_distance(robust.measure, features), classifier.eval().requires_grad_(False)
    x_adv = perturbed_images(source, pairs, classifier, eps=robust.eps, steps=robust.steps, seed=seed)
    columns = pairs._replace(end_star=perturbed_targets(goal, pairs, x_adv, teacher, recipe, scalings, seed))
    net = precondition(copy.deepcopy(student).requires_grad_(), scalings, recipe)
    trained = train(
        net,
        robust_consistency_loss(scalings, classifier, robust, distance),
        (*columns, x_adv),
        epochs=robust.epochs,
        batch_size=recipe.batch_size,
        lr=robust.lr,
        ema=recipe.student_ema,
        clip=1.0,
        seed=seed,
        progress=False,
        name=robust.variant,
    )
    return unwrap(net), trained.history
