"""Predictions for clean and attacked images, and an attack's row of the table."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.attacks.checks import outside_ball
from lib.attacks.common import margin
from lib.attacks.gate import ModelGate
from lib.evaluation.adversarial_images import AttackedImages, batch_purpose
from lib.evaluation.attack_plan import NORMS, EvaluationSettings
from lib.evaluation.noise_control import noise_margins
from lib.evaluation.outcomes import outcome_shares, outcomes, passes_per_batch, repeated_logits
from lib.models import most_likely
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed

SAMPLE = 16  # surviving images of a batch that are passed with noise


class Predictions(NamedTuple):
    """Predicted classes (draws, k) of some images, and their logit margins (k,) in the first draw.

    `noisy`: margins (k,) at a random point of each clean image's ball, NaN where they were not needed.
    """

    votes: Int[np.ndarray, "draws k"]
    margins: Float[Tensor, " k"]
    noisy: Float[Tensor, " k"]


class Subject(NamedTuple):
    """What is evaluated: the model, the gate that its passes go through, images and labels."""

    model: Callable
    gate: ModelGate
    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]


def predict_batches(
    subject: Subject,
    label: str,
    images: Float[Tensor, "n c h w"],
    batches: Sequence[Tensor],
    draws: int,
    at: EvaluationSettings,
    *,
    noise: bool = False,
) -> Predictions:
    """Classify images several times, with new noise.

    Args:
        subject: the model.
        label: of the attack, which decides the noise.
        images: clean or attacked (n, c, h, w).
        batches: numbers of the images wanted, batch by batch.
        draws: passes of each image.
        at: ball, seed and mode.
        noise: whether to pass noise of the same radius, too, for the first images that some draw classifies correctly.

    Returns:
        Predictions, in the order of the batches.
    """
    model, gate, x, y = subject
    at_once = passes_per_batch(model, x, at.draws, graph=False)
    votes, margins, noisy = [y.new_empty(draws, 0)], [x.new_empty(0)], [x.new_empty(0)]
    for rows in filter(len, batches):
        purpose = f"draws/{batch_purpose(label, rows)}"
        with seeded_noise(model, derive_seed(at.seed, purpose), x.device, at.mode):
            z = repeated_logits(gate, images[rows], draws, at_once)
            votes.append(most_likely(z))
            margins.append(margin(z[0], y[rows]).to(x.dtype))
            noisy.append(torch.full_like(margins[-1], torch.nan))
            if noise:
                left = (votes[-1] == y[rows]).any(0).nonzero().squeeze(1)[:SAMPLE]
                noisy[-1][left] = noise_margins(gate, x[rows[left]], y[rows[left]], at) if len(left) else torch.nan
    return Predictions(torch.cat(votes, 1).cpu().numpy(), torch.cat(margins), torch.cat(noisy))


def distance_summary(x_adv: Tensor, x: Tensor) -> dict[str, dict[str, float] | None]:
    """Return mean and median distance by norm, None without images; L0 counts pixels, not channels."""
    out: dict[str, dict[str, float] | None] = {}
    for name in NORMS:
        moved = (x_adv != x).any(1, keepdim=True) if name == "L0" else x_adv - x
        far = torch.linalg.vector_norm(moved.double().flatten(1), float(name[1:]), dim=1).cpu().numpy()
        out[name] = {"mean": float(far.mean()), "median": float(np.median(far))} if len(far) else None
    return out


def score_attack(
    attacked: AttackedImages,
    votes: Int[np.ndarray, "draws k"],
    clean_votes: Int[np.ndarray, "draws n"],
    rows: Int[Tensor, " k"],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    at: EvaluationSettings,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Score the predictions for an attack's images.

    Args:
        attacked: what `adversarial_images` returned.
        votes: predicted classes of the attacked examples.
        clean_votes: predicted classes of all clean images.
        rows: the attacked examples, by number, as in `votes`.
        x: the clean images (n, c, h, w).
        y: labels (n,).
        at: the ball.

    Returns:
        The outcomes of all examples (`lib.evaluation.outcomes.outcomes`), in which the clean image replaces one outside
        the ball, and the attack's row of the table, in which distances are of successes.
    """
    images, truth, index = attacked.images[rows], y.cpu().numpy(), rows.cpu().numpy()
    outside = outside_ball(images, x[rows], at.eps, at.norm).cpu().numpy()
    final = clean_votes.copy()
    final[:, index[~outside]] = votes[:, ~outside]
    outcome = outcomes(final, truth)
    broken = outcomes(votes, truth[index])["majority"] == 0
    successes = torch.from_numpy(broken).to(x.device)
    row = outcome_shares(outcome, at.draws)
    row |= {"attacked": len(rows), "failures": int((~broken).sum()), "outside_ball": int((broken & outside).sum())}
    row["success_rate"] = float(broken.mean()) if len(rows) else None
    row["distance"] = distance_summary(images[successes], x[rows][successes])
    row["no_gradient"] = attacked.no_gradient if attacked.requested else None
    return outcome, row | {"forward": attacked.forward, "backward": attacked.backward}
