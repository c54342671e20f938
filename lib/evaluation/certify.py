"""Randomised smoothing behind a one-step denoiser: certified accuracy against the L2 radius (Carlini et al. 2023)."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from lib.data import Split, check_images
from lib.diffusion.network import eps_model, load_network
from lib.diffusion.schedule import CLEAN, add_noise, sigma_to_t, to_pixel_range
from lib.diffusion.solvers import reverse_process
from lib.distillation.consistency import consistency_fn
from lib.distillation.few_step import Sampler, load_config, load_consistency_student, precondition
from lib.utils import parallel
from lib.utils.device import default_device, to_model_device
from lib.utils.intervals import clopper_pearson
from lib.utils.progress import tqdm
from lib.utils.random_state import RandnLike, randn_like, seeded_noise
from lib.utils.seeds import derive_seed
from lib.utils.validation import Integer, Number, Positive, PositiveInt, check_value

ABSTAIN = -1
Probability = Annotated[Number, Field(gt=0, lt=1)]


class CertificateWarning(UserWarning):
    """What a certificate met that its classes and radii alone do not show."""


def lower_bound(k: int, n: int, failure_probability: float) -> float:
    """Return the one-sided Clopper–Pearson bound on p after k successes of n (Cohen et al. 2019, LowerConfBound).

    Args:
        k: successes.
        n: draws.
        failure_probability: that the bound is above p.

    Returns:
        A probability that p exceeds with probability 1 − `failure_probability`.
    """
    return clopper_pearson(k, n, 1 - 2 * failure_probability)[0]


@torch.no_grad()
def class_counts(
    sampler: Sampler,
    classifier: Callable,
    image: Float[Tensor, "c h w"],
    sigma: float,
    n: int,
    randn_like: RandnLike,
    batch_size: int = 500,
) -> Int[Tensor, " k"]:
    """Count the classes that are predicted for one image under noise (Cohen et al. 2019, SampleUnderNoise).

    Args:
        sampler: from z at the level whose σ is 2 `sigma`, since the networks' pixels go from -1 to 1.
        classifier: in eval mode.
        image: in [0, 1].
        sigma: of the noise, in pixel units.
        n: draws of the noise.
        randn_like: all noise.
        batch_size: draws per batch.

    Returns:
        Predictions per class; they sum to `n`, less the answers that are not finite, which are of no class.
    """
    t, counts = sigma_to_t(2 * sigma), []
    for k in range(0, n, batch_size):
        x = image.expand(min(batch_size, n - k), *image.shape)
        z = classifier(sampler(add_noise(x, t, randn_like), randn_like))
        counts.append(torch.bincount(z[z.isfinite().all(1)].argmax(1), minlength=z.shape[1]))
    return torch.stack(counts).sum(0)


def _check_pairing(sampler: Sampler, sigma: float) -> None:
    """Raise ValueError for a sampler whose own `sigma`, if it has one, is another than that of the noise."""
    own = getattr(sampler, "sigma", None)
    if own is not None and not math.isclose(check_value("the sampler's sigma", own, Positive), sigma, rel_tol=1e-6):
        raise ValueError(f"expected a sampler for sigma {sigma:g}, got one for {own:g}: load it for that sigma")


def certify(
    sampler: Sampler,
    classifier: Callable,
    x: Tensor,
    sigma: Any,
    *,
    n: Any = 10_000,
    n0: Any = 100,
    failure_probability: Any = 0.001,
    seed: Any = 0,
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Certify the smoothed classifier's predictions (Cohen et al. 2019, Certify; Carlini et al. 2023).

    `n0` draws choose the class, `n` others bound its probability from below by p; the radius is σ Φ⁻¹(p), and where
    p ≤ 1/2 it abstains. An image's result depends on its place and `seed` alone. Answers with NaN or infinity are of no
    class: they count against every one, and a CertificateWarning says how many there were.

    Args:
        sampler: the one-step denoiser, see `one_step_denoiser`. One that has an attribute `sigma`, in pixel units, must
            be for this noise; one without is taken to be: it gets z at the level whose σ is 2 `sigma`.
        classifier: in eval mode, where its networks are put for the call.
        x: images (m, c, h, w) in [0, 1].
        sigma: of the noise, a number in pixel units, above 0.
        n: draws that bound the probability, at least 1.
        n0: draws that choose the class, at least 1.
        failure_probability: of each image's certificate, in (0, 1).
        seed: of the noise, an integer.

    Returns:
        Classes (m,), ABSTAIN = -1 among them, and L2 radii (m,) in pixel units, 0 where it abstains.

    Raises:
        ValueError: for a setting of another type or out of its range, for images outside [0, 1], and for a sampler of
            another sigma.
    """
    sigma, n, n0 = (
        check_value("sigma", sigma, Positive),
        check_value("n", n, PositiveInt),
        check_value("n0", n0, PositiveInt),
    )
    failure_probability = check_value("failure_probability", failure_probability, Probability)
    seed = check_value("seed", seed, Integer)
    _check_pairing(sampler, sigma)
    check_images(x)
    (x,) = to_model_device(classifier, x)
    classes, radii, bad_answers = np.full(len(x), ABSTAIN), np.zeros(len(x)), 0
    with seeded_noise((sampler, classifier), derive_seed(seed, "certify"), x.device):
        for i, image in enumerate(tqdm(x, desc="certify", unit="image")):
            noise = randn_like(torch.Generator(x.device).manual_seed(derive_seed(seed, f"certify/{i}")))
            first, counts = (class_counts(sampler, classifier, image, sigma, draws, noise) for draws in (n0, n))
            bad_answers += n0 + n - int(first.sum() + counts.sum())
            top = int(first.argmax())
            p = lower_bound(int(counts[top]), n, failure_probability)
            if p > 0.5:
                classes[i], radii[i] = top, sigma * scipy.stats.norm.ppf(p)
    if bad_answers:
        message = (
            f"answers were not finite in {bad_answers} of {len(x) * (n0 + n)} draws: they count against every class"
        )
        warnings.warn(CertificateWarning(message), stacklevel=2)
    return classes, radii


def largest_radius(sigma: float, n: int, failure_probability: float = 0.001) -> float:
    """Return the largest L2 radius that `n` draws can certify, however sure the defence: all of them agree.

    Args:
        sigma: of the noise, in pixel units.
        n: draws that bound the probability.
        failure_probability: of each image's certificate, in (0, 1).

    Returns:
        σ Φ⁻¹(failure_probability^(1/n)), in pixel units.
    """
    return float(sigma * scipy.stats.norm.ppf(lower_bound(n, n, failure_probability)))


def certified_accuracy(classes: np.ndarray, radii: np.ndarray, y: Tensor, at: Sequence[float]) -> list[float]:
    """Return the certified accuracy, in [0, 1], at L2 radii.

    Args:
        classes: predictions of `certify` (m,), integers.
        radii: its radii (m,), finite or infinite, at least 0.
        y: labels (m,), integers.
        at: radii at which the accuracy is wanted, at least 0.

    Returns:
        For each of `at` the share of images whose prediction is correct at no smaller radius.

    Raises:
        ValueError: for arrays of other lengths, for no images, and for radii that are NaN or below 0.
    """
    truth = y.detach().cpu().numpy()
    if classes.ndim != 1 or not len(classes) or not classes.shape == radii.shape == truth.shape:
        got = f"{classes.shape}, {radii.shape} and {truth.shape}"
        raise ValueError(f"expected classes, radii and labels (m,) of one length m >= 1, got {got}: give one per image")
    for name, values in (("radii", radii), ("radii `at`", np.asarray(at, dtype=float))):
        if not (values >= 0).all():
            raise ValueError(f"expected {name} of at least 0, got {values.min()}: give those of `certify`")
    correct = classes == truth
    return [float((correct & (radii >= radius)).mean()) for radius in at]


@dataclass(frozen=True)
class OneStepDenoiser:
    """A sampler of one evaluation for noise of one `sigma`, in pixel units: z at the level whose σ is 2 `sigma`."""

    sigma: float
    denoise: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor, randn_like: RandnLike | None = None) -> Tensor:
        return self.denoise(z)


def one_step_denoiser(models: Path, name: str, sigma: Any) -> OneStepDenoiser:
    """Load a denoiser of one evaluation, as randomised smoothing needs it.

    Args:
        models: folder of networks, e.g. data/digits/models/dp-s0.
        name: a consistency student's network, or "teacher" for the undistilled denoiser.
        sigma: of the noise, a number in pixel units, above 0.

    Returns:
        A sampler from z at the level whose σ is 2 `sigma` to images in [0, 1], not clamped. `certify` refuses it for
        noise of another `sigma`.

    Raises:
        FileNotFoundError: without the network or its configuration.
        ValueError: for a `sigma` that is no number above 0.
    """
    sigma = check_value("sigma", sigma, Positive)
    recipe, _ = load_config(models)
    if name == "teacher":
        net = load_network(models / name, target=recipe.target, foreign=True).to(default_device()).requires_grad_(False)
        model, times = eps_model(net, recipe.target), [sigma_to_t(2 * sigma), CLEAN]
        return OneStepDenoiser(sigma, lambda z: to_pixel_range(reverse_process(model, z, times, "ddim")))
    net, scalings = load_consistency_student(models, name)
    f = precondition(net.to(default_device()).requires_grad_(False), scalings, recipe)
    alpha_t = (1 + (2 * sigma) ** 2) ** -0.5
    return OneStepDenoiser(sigma, lambda z: to_pixel_range(consistency_fn(f, z / alpha_t, 2 * sigma, scalings)))


def denoiser_certificates(
    name: str, models: Path, classifier: nn.Module, test: Split, sigma: float, radii: Sequence[float], n: int, seed: int
) -> list[float]:
    """Certify the classifier behind one denoiser at one noise level.

    Args:
        name: of the denoiser, see `one_step_denoiser`.
        models: folder of networks.
        classifier: in eval mode.
        test: images (m, c, h, w) in [0, 1] and labels.
        sigma: of the noise, in pixel units.
        radii: L2, in pixel units.
        n: draws per image.
        seed: of the noise.

    Returns:
        Certified accuracies at `radii`, in [0, 1].
    """
    (x,) = to_model_device(classifier, test.x)
    classes, certified = certify(one_step_denoiser(models, name, sigma), classifier, x, sigma, n=n, seed=seed)
    return certified_accuracy(classes, certified, test.y, radii)


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
    """Certify the classifier behind the undistilled network and behind two students, at every noise level.

    Args:
        models: folder of networks.
        classifier: in eval mode.
        test: images (m, c, h, w) in [0, 1] and labels.
        sigmas: of the noise, in pixel units.
        radii: L2, in pixel units.
        n: draws per image.
        seed: of the noise.
        jobs: processes.

    Returns:
        Certified accuracies at `radii`, by "<network>/<sigma>".
    """
    pairs = [(net, sigma) for net in ("teacher", "cd", "adaptive") for sigma in sigmas]
    tasks = [(net, models, classifier, test, sigma, radii, n, seed) for net, sigma in pairs]
    results = parallel.parallel_map(denoiser_certificates, tasks, jobs, "certificates")
    return {f"{net}/{sigma:g}": accuracy for (net, sigma), accuracy in zip(pairs, results, strict=True)}
