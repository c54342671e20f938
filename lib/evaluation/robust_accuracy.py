"""Robust accuracy: the worst case over attacks for each example, with intervals, distances and costs.

An attack is given the examples whose clean prediction is correct and returns images. These are checked against ball and
box and classified anew: nothing an attack says of its own success is believed. Examples that were misclassified without
an attack count as broken.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.attacks.checks import check_labels, checked_logits
from lib.data import check_images
from lib.evaluation.adversarial_images import (
    NORMS,
    AttackedImages,
    EvaluationSettings,
    adversarial_images,
    attack_ball,
    attack_plan,
    batch_purpose,
    outside_ball,
)
from lib.evaluation.outcomes import outcome_shares, outcomes, pack_bits, passes_per_batch, repeated_predictions
from lib.utils.content_hash import content_id
from lib.utils.files import to_jsonable
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed

WEAK = ("noise", "fgsm", "square")  # what an iterative attack that follows gradients ought to beat
TOLERANCE = 0.002  # of accuracy: AutoAttack's flag for Square (Croce and Hein 2020, flags_doc.md)


def _predict_batches(
    model: Callable,
    label: str,
    x: Float[Tensor, "n c h w"],
    batches: Sequence[Tensor],
    draws: int,
    at: EvaluationSettings,
) -> Int[np.ndarray, "draws k"]:
    """Classify images `draws` times, with new noise; columns are in the order of the batches."""
    at_once, votes = passes_per_batch(model, x, at.draws, graph=False), []
    for rows in batches:
        purpose = f"draws/{batch_purpose(label, rows)}"
        with seeded_noise(model, derive_seed(at.seed, purpose), x.device, at.mode):
            empty = rows.new_empty(draws, 0)
            votes.append(repeated_predictions(model, x[rows], draws, at_once) if len(rows) else empty)
    return torch.cat(votes, 1).cpu().numpy()


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
    return outcome, row | {"forward": attacked.forward, "backward": attacked.backward}


def option_text(value: Any) -> Any:
    """Return an option as the record shows it: plain values as they are, other objects by name and content hash."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{getattr(value, '__qualname__', type(value).__qualname__)} {content_id(value, 12)}"


def weak_attacks(table: dict[str, dict]) -> list[str]:
    """Return a sentence for each attack that leaves over 0.2 points more than a simpler one (Carlini et al. 2019).

    Each iterative gradient attack in the evaluation's ball is compared with noise and FGSM, the best one with Square.
    """
    in_ball = {label: row for label, row in table.items() if not row["own_ball"]}
    strong = {label: row["accuracy"] for label, row in in_ball.items() if row["name"] not in (*WEAK, "transfer")}
    out: list[str] = []
    for label, row in in_ball.items():
        if row["name"] not in WEAK:
            continue
        for rival in sorted(strong, key=strong.__getitem__)[: 1 if row["name"] == "square" else None]:
            if strong[rival] > row["accuracy"] + TOLERANCE:
                out.append(f"{rival} leaves {strong[rival]:.2%}, {label} only {row['accuracy']:.2%}")
    return out


def _answers_vary(model: Callable, x: Tensor, y: Tensor, at: EvaluationSettings) -> bool:
    """Say whether two answers to the same images differ, after checking images, labels and logits."""
    check_images(x)
    if not len(x):
        raise ValueError("expected at least 1 image, got 0")
    with seeded_noise(model, derive_seed(at.seed, "probe"), x.device, at.mode):
        z, again = (checked_logits(model, x[:16], at.batch_size) for _ in range(2))
    check_labels("y", y, x, z.shape[1])
    return not torch.allclose(z, again, rtol=0, atol=1e-4 * z.abs().max().item())


def evaluate_attacks(
    model: Callable,
    attacks: list[str] | dict[str, dict],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    at: EvaluationSettings,
    *,
    resume_dir: Path | str | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Float[Tensor, "n c h w"]]]:
    """Evaluate a model as `robust_accuracy` does, and hand back the images, to score other models on.

    Args:
        model: answers logits for images in [0, 1].
        attacks: see `lib.evaluation.adversarial_images.attack_plan`.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        at: ball, seed, batch size, draws and mode.
        resume_dir: where the images of finished batches are saved.
        progress: whether to show a bar.

    Returns:
        The record of `robust_accuracy`, and the images (n, c, h, w) by attack; misclassified ones are as they were.

    Raises:
        ValueError: if images, labels or logits are unusable.
        TypeError: if an attack has no such option.
        RuntimeError: if an attack leaves ball or box.
    """
    entries, truth = attack_plan(attacks), y.cpu().numpy()
    varying, draws = _answers_vary(model, x, y, at), at.draws
    batches = torch.arange(len(x), device=x.device).split(at.batch_size)
    control_draws = draws * max(len(entries), 1) if draws > 1 else 1
    began = time.perf_counter()
    clean_votes = _predict_batches(model, "clean", x, batches, control_draws, at)
    clean = outcomes(clean_votes[:draws], truth)
    timing = {"clean": time.perf_counter() - began}
    correct = torch.from_numpy(clean["accuracy"] > 0).to(x.device)
    batches = [rows[correct[rows]] for rows in batches]
    attacked = adversarial_images(model, entries, x, y, batches, at, resume_dir=resume_dir, progress=progress)
    table, results = {}, {}
    for label, entry in entries.items():
        began = time.perf_counter()
        votes = _predict_batches(model, label, attacked[label].images, batches, draws, at)
        results[label], row = score_attack(attacked[label], votes, clean_votes[:draws], torch.cat(batches), x, y, at)
        options = {k: option_text(v) for k, v in entry.items() if k != "name"}
        own_ball = attack_ball(entry, at) != (at.eps, at.norm)
        table[label] = {"name": option_text(entry["name"]), "own_ball": own_ball, "options": options} | row
        timing[label] = attacked[label].seconds + time.perf_counter() - began
    worst = {k: np.min([result[k] for result in results.values()] or [clean[k]], axis=0) for k in clean}
    robust, warnings = outcome_shares(worst, draws), weak_attacks(table)
    if draws > 1:
        robust["control_worst_of_n"] = outcome_shares(outcomes(clean_votes, truth), draws)["worst_of_n"]
    elif varying:
        warnings.append("the model's answers are random: evaluate with draws > 1 and attack with eot")
    settings = asdict(at) | {"at_once": passes_per_batch(model, x, draws, graph=False)}
    broken = {label: pack_bits(1 - result["majority"]) for label, result in results.items()}
    record = {
        "settings": settings,
        "model": content_id(model),
        "data": content_id([x, y]),
        "n": len(x),
        "clean": outcome_shares(clean, draws),
        "robust": robust,
        "attacks": table,
        "warnings": warnings,
        "examples": {"correct_clean": pack_bits(clean["majority"]), "broken_by": broken},
        "timing": timing,
    }
    return to_jsonable(record), {label: images for label, (images, *_) in attacked.items()}


def robust_accuracy(
    model: Callable,
    attacks: list[str] | dict[str, dict],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    resume_dir: Path | str | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a model under attacks, in the worst case per example, as one JSON record.

    A stochastic model classifies each clean and each final image `draws` times, with new noise. `accuracy` is then the
    mean over draws, `worst_of_n` asks for all draws and `majority` for the vote to be correct; across attacks each is
    the minimum per example. Many draws find errors without any attack: `robust.control_worst_of_n` is what the clean
    images keep in as many draws as all attacks together had; only what is below it is the attacks' work. A model whose
    images have independent noise says so by `independent_noise = True`: then draws share a batch.

    Args:
        model: answers logits for images in [0, 1].
        attacks: names, or label → dict(name=..., **options), see `attack_plan`.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        resume_dir: where the images of finished batches are saved, so that an interrupted call resumes.
        progress: whether to show a bar.
        **settings: the fields of `EvaluationSettings`: `eps` (required), `norm`, `seed`, `batch_size`, `draws`, `mode`.

    Returns:
        The record. All but `timing` (seconds) is decided by the seed. An attack with a ball of its own or of least
        distance (cw, deepfool, jsma) may leave the evaluation's ball: that counts in `success_rate` and `distance`, not
        against `accuracy`. Distances are of successes, that is of attacked examples whose final image is misclassified;
        `failures` counts the others. `forward` and `backward` count the images an attack sent through the attacked
        model. `examples` has a 0 or 1 for each (`lib.evaluation.outcomes.unpack_bits`). `warnings` names attacks that
        did worse than simpler ones, and random answers.

    Raises:
        ValueError: if images, labels, logits or settings are unusable.
        TypeError: if an attack or the evaluation has no such option.
        RuntimeError: if an attack leaves ball or box.

    Example:
        >>> from lib.models import build_classifier
        >>> model = build_classifier("cnn", width=4, seed=0).eval()
        >>> x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> y = model(x).argmax(1)
        >>> record = robust_accuracy(model, ["fgsm", "pgd"], x, y, eps=0.05, progress=False)
        >>> record["clean"]["accuracy"], record["robust"]["accuracy"] < 1
        (1.0, True)
    """
    return evaluate_attacks(
        model, attacks, x, y, EvaluationSettings(**settings), resume_dir=resume_dir, progress=progress
    )[0]
