"""Randomised smoothing behind a one-step denoiser: certified accuracy against the L2 radius (Carlini et al. 2023)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.data import Split
from lib.diffusion.network import eps_model, load_network
from lib.diffusion.schedule import NoisyImages, add_noise, sigma_to_t, to_pixel_range
from lib.diffusion.solvers import reverse_process
from lib.distillation.consistency import consistency_fn
from lib.distillation.few_step import Sampler, load_config, precondition
from lib.utils import parallel
from lib.utils.device import default_device, to_model_device
from lib.utils.intervals import clopper_pearson
from lib.utils.progress import tqdm
from lib.utils.random_state import RandnLike, randn_like
from lib.utils.seeds import derive_seed

ABSTAIN = -1


def lower_bound(k: int, n: int, alpha: float) -> float:
    """Returns the one-sided Clopper–Pearson bound: p is at least this with probability 1 − alpha, after k of n."""
    return clopper_pearson(k, n, 1 - 2 * alpha)[0]


@torch.no_grad()
def class_counts(
    restore: Sampler,
    classifier: nn.Module,
    image: Float[Tensor, "c h w"],
    sigma: float,
    n: int,
    randn_like: RandnLike,
    batch_size: int = 500,
) -> Int[Tensor, " k"]:
    """Returns how often each class is the answer to one image in [0, 1] with `n` draws of noise of `sigma` pixel units.

    `restore`: from z at the level whose σ is 2 `sigma`, since the networks' pixels go from -1 to 1.
    """
    t, total = sigma_to_t(2 * sigma), 0
    for k in range(0, n, batch_size):
        x = image.expand(min(batch_size, n - k), *image.shape)
        z = classifier(restore(add_noise(x, t, randn_like), randn_like))
        total = total + torch.bincount(z.argmax(1), minlength=z.shape[1])
    return total


def certify(
    restore: Sampler,
    classifier: nn.Module,
    x: NoisyImages,
    sigma: float,
    *,
    n: int = 10_000,
    n0: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Returns for each image the smoothed classifier's class and the L2 radius, in pixel units, in which it is certain.

    `n0` draws choose the class, `n` others bound its probability from below by p, with confidence 1 − `alpha` for each
    image; the radius is σ Φ⁻¹(p), and where p ≤ 1/2 it abstains: class -1, radius 0 (Cohen et al. 2019, Certify). An
    image's answer depends on its place and `seed` alone. Raises ValueError for unusable settings.
    """
    if not sigma > 0 or n < 1 or n0 < 1 or not 0 < alpha < 1:
        raise ValueError(f"sigma {sigma}, n {n}, n0 {n0}, alpha {alpha}: above 0, at least 1 and 1, in (0, 1) are due")
    classes, radii = np.full(len(x), ABSTAIN), np.zeros(len(x))
    for i, image in enumerate(tqdm(x, desc="certify", unit="image")):
        noise = randn_like(torch.Generator(x.device).manual_seed(derive_seed(seed, f"certify/{i}")))
        guess = int(class_counts(restore, classifier, image, sigma, n0, noise).argmax())
        p = lower_bound(int(class_counts(restore, classifier, image, sigma, n, noise)[guess]), n, alpha)
        if p > 0.5:
            classes[i], radii[i] = guess, sigma * scipy.stats.norm.ppf(p)
    return classes, radii


def certified_accuracy(
    classes: Int[np.ndarray, " m"], radii: Float[np.ndarray, " m"], y: Int[Tensor, " m"], at: Sequence[float]
) -> list[float]:
    """Returns the share in [0, 1] of images with the right class at a radius of at least each of `at` (0: right)."""
    right = classes == y.numpy()
    return [float((right & (radii >= radius)).mean()) for radius in at]


def one_step_denoiser(models: Path, name: str, sigma: float) -> Sampler:
    """Returns the way back in one evaluation from a level of `sigma` pixel units: what randomised smoothing needs.

    `name`: a consistency student's network, or "teacher" for the undistilled denoiser.
    """
    recipe, at = load_config(models)
    net, t = load_network(models / name).to(default_device()).requires_grad_(False), sigma_to_t(2 * sigma)
    if name == "teacher":
        predict = eps_model(net, recipe.target)
        return lambda z, randn_like: to_pixel_range(reverse_process(predict, z, [t, -1.0], "ddim"))
    wrapped = precondition(net, at, recipe)
    alpha = (1 + (2 * sigma) ** 2) ** -0.5
    return lambda z, randn_like: to_pixel_range(consistency_fn(wrapped, z / alpha, torch.tensor(2 * sigma), at))


def denoiser_certificates(
    name: str, models: Path, classifier: nn.Module, test: Split, sigma: float, radii: Sequence[float], n: int, seed: int
) -> list[float]:
    """Returns the certified accuracy at each L2 radius (pixel units) of one denoiser at one noise level."""
    (x,) = to_model_device(classifier, test.x)
    classes, far = certify(one_step_denoiser(models, name, sigma), classifier, x, sigma, n=n, seed=seed)
    return certified_accuracy(classes, far, test.y, radii)


def certify_denoisers(
    models: Path,
    classifier: nn.Module,
    test: Split,
    sigmas: Sequence[float],
    radii: Sequence[float],
    n: int,
    seed: int,
    jobs: int,
) -> dict[str, list[float]]:
    """Returns `denoiser_certificates` of the undistilled network and of two students at every noise level, "<net>/<sigma>"."""
    pairs = [(net, sigma) for net in ("teacher", "cd", "adaptive") for sigma in sigmas]
    asked = [(net, models, classifier, test, sigma, radii, n, seed) for net, sigma in pairs]
    found = parallel.parallel_map(denoiser_certificates, asked, jobs, "certificates")
    return {f"{net}/{sigma:g}": row for (net, sigma), row in zip(pairs, found, strict=True)}
