"""Robust accuracy: the worst case over attacks for each example, with intervals, distances and costs.

An attack is given the examples whose clean prediction is correct and returns images. These are checked against ball and
box and classified anew: nothing an attack says of its own success is believed. Examples that were misclassified without
an attack count as broken.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.attacks.checks import check_labels, check_model_output
from lib.attacks.gate import ModelGate
from lib.data import check_images
from lib.evaluation.adversarial_images import AttackedImages, adversarial_images
from lib.evaluation.attack_plan import EvaluationSettings, attack_ball, attack_plan, check_plan
from lib.evaluation.noise_control import has_noise, leaves_more_than_noise, noise_attack, works
from lib.evaluation.outcomes import count_not_finite, outcome_shares, outcomes, pack_bits, passes_per_batch
from lib.evaluation.scoring import Subject, predict_batches, score_attack
from lib.utils.content_hash import content_id
from lib.utils.files import to_jsonable
from lib.utils.random_state import seeded_noise, unseeded_noise
from lib.utils.seeds import derive_seed
from lib.utils.validation import check_value, from_settings

WEAK = ("noise", "fgsm", "square")  # what an iterative attack that follows gradients ought to beat
PROBED = 8  # images that are passed twice before the first attack
TOLERANCE = 0.002  # of accuracy: AutoAttack's flag for Square (Croce and Hein 2020, flags_doc.md)


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


def _probe(subject: Subject, at: EvaluationSettings) -> tuple[int, list[str]]:
    """Return the number of classes, and sentences about random answers, after checking images, labels and logits."""
    model, gate, x, y = subject
    if not len(x):
        raise ValueError("expected at least 1 image, got 0")
    if isinstance(model, nn.Module) and any(p.is_inference() for p in model.parameters()):
        remedy = "make or load it outside torch.inference_mode()"
        raise ValueError(f"expected a model that can be differentiated, got weights of inference mode: {remedy}")
    first = x[:PROBED]
    try:
        with seeded_noise(model, derive_seed(at.seed, "probe"), x.device, at.mode), torch.no_grad():
            z, again = (torch.cat([gate(part) for part in first.split(at.batch_size)]) for _ in range(2))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected a model for images {tuple(x.shape[1:])}, got {reason!r} from it") from error
    finite = z.isfinite().all(1)
    check_model_output(z[finite] if finite.any() else z, int(finite.sum()) or len(z))
    check_labels("y", y, x, z.shape[1])
    largest = z.nan_to_num(0, 0, 0).abs().max().item()
    if torch.allclose(z, again, rtol=0, atol=1e-4 * largest, equal_nan=True):
        return z.shape[1], []
    out = []
    if at.draws == 1:
        out.append("the model's answers are random: evaluate with draws > 1 and attack with eot")
    if unseeded_noise(gate, first, derive_seed(at.seed, "probe"), at.mode):
        remedy = "draw it from the generators of torch, numpy or random"
        out.append(f"the model's answers differ under one seed, so this record does not repeat: {remedy}")
    return z.shape[1], out


def _attack_marks(table: dict[str, dict], not_finite: dict[str, int]) -> list[str]:
    """Return a sentence for each attack without a gradient, and for answers that are not finite."""
    out = [
        f"{label} got no gradient on {row['no_gradient']} of {row['attacked']} images: "
        "its accuracy is no robustness; attack by BPDA or square"
        for label, row in table.items()
        if row["no_gradient"] and row["accuracy"] > 0
    ]
    where = {label: "clean images" if label == "clean" else f"images of {label}" for label in not_finite}
    return out + [
        f"the model's answers are not finite on {n} {where[label]}: they count as wrong"
        for label, n in not_finite.items()
        if n
    ]


def evaluate_attacks(
    model: Any,
    attacks: Any,
    x: Any,
    y: Any,
    at: EvaluationSettings,
    *,
    resume_dir: Path | str | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Float[Tensor, "n c h w"]]]:
    """Evaluate a model as `robust_accuracy` does, and hand back the images, to score other models on.

    Args:
        model: answers logits for images in [0, 1].
        attacks: names, or label → dict(name=..., **options), see `lib.evaluation.attack_plan.attack_plan`.
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
    entries = attack_plan(attacks, at)
    check_value("model", model, Callable, "give a function of images that returns logits")
    check_images(x)
    check_labels("y", y, x)
    with torch.inference_mode(False):
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))
        subject = Subject(model, ModelGate(model, x), x, y)
        classes, random_marks = _probe(subject, at)
        check_plan(entries, x, classes)
        return _evaluate(subject, entries, random_marks, at, resume_dir, progress)


def _evaluate(
    subject: Subject,
    entries: dict[str, dict[str, Any]],
    random_marks: list[str],
    at: EvaluationSettings,
    resume_dir: Path | str | None,
    progress: bool,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return record and images of `evaluate_attacks`, whose settings are checked."""
    model, _, x, y = subject
    truth, draws = y.cpu().numpy(), at.draws
    batches = torch.arange(len(x), device=x.device).split(at.batch_size)
    control_draws = draws * max(len(entries), 1) if draws > 1 else 1
    began = time.perf_counter()
    clean_votes, clean_margins, _ = predict_batches(subject, "clean", x, batches, control_draws, at)
    clean = outcomes(clean_votes[:draws], truth)
    timing = {"clean": time.perf_counter() - began}
    correct = torch.from_numpy(clean["accuracy"] > 0).to(x.device)
    batches = [rows[correct[rows]] for rows in batches]
    rows, table, results = torch.cat(batches), {}, {}
    not_finite, weak = {"clean": count_not_finite(clean_votes)}, False

    def score(label: str, attacked: AttackedImages, noise: bool) -> tuple[dict[str, np.ndarray], dict[str, Any], bool]:
        """Return an attack's outcomes and row, and whether it may do no better than noise."""
        votes, margins, noisy = predict_batches(subject, label, attacked.images, batches, draws, at, noise=noise)
        outcome, row = score_attack(attacked, votes, clean_votes[:draws], rows, x, y, at)
        not_finite[label], left = count_not_finite(votes), ~noisy.isnan()
        doubtful = left.any().item() and not works(clean_margins[rows][left], margins[left], noisy[left])
        return outcome, row, bool(doubtful or row["outside_ball"] > 0)

    attacked = adversarial_images(model, entries, x, y, batches, at, resume_dir=resume_dir, progress=progress)
    plain = [k for k, e in entries.items() if e == {"name": "noise"}]
    control = has_noise(at) and not plain
    for label, entry in entries.items():
        began = time.perf_counter()
        results[label], row, doubtful = score(label, attacked[label], control and not weak)
        weak = weak or doubtful
        options = {k: option_text(v) for k, v in entry.items() if k != "name"}
        own_ball = attack_ball(entry, at) != (at.eps, at.norm)
        table[label] = {"name": option_text(entry["name"]), "own_ball": own_ball, "options": options} | row
        timing[label] = attacked[label].seconds + time.perf_counter() - began
    worst = {k: np.min([result[k] for result in results.values()] or [clean[k]], axis=0) for k in clean}
    robust, marks = outcome_shares(worst, draws), weak_attacks(table)
    if draws > 1:
        robust["control_worst_of_n"] = outcome_shares(outcomes(clean_votes, truth), draws)["worst_of_n"]
    began, broken = time.perf_counter(), {k: pack_bits(1 - result["majority"]) for k, result in results.items()}
    noise = table[plain[0]]["accuracy"] if plain else None
    if control and weak:
        entry = {"noise": {"name": noise_attack}}
        images = adversarial_images(model, entry, x, y, batches, at, resume_dir=resume_dir, progress=False)
        noise = robust["control_noise"] = score("noise", images["noise"], False)[1]["accuracy"]
        timing["control"] = time.perf_counter() - began
    if noise is not None:
        named = leaves_more_than_noise(table, noise, plain[0] if plain else "noise of the same radius")
        marks += [text for text in named if text not in marks]
    record = {
        "settings": asdict(at) | {"at_once": passes_per_batch(model, x, draws, graph=False)},
        "model": content_id(model),
        "data": content_id([x, y]),
        "n": len(x),
        "clean": outcome_shares(clean, draws),
        "robust": robust,
        "attacks": table,
        "not_finite": not_finite,
        "warnings": [*marks, *_attack_marks(table, not_finite), *random_marks],
        "examples": {"correct_clean": pack_bits(clean["majority"]), "broken_by": broken},
        "timing": timing,
    }
    return to_jsonable(record), {label: images for label, (images, *_) in attacked.items()}


def robust_accuracy(
    model: Any,
    attacks: Any,
    x: Any,
    y: Any,
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
        attacks: names, or label → dict(name=..., **options), see `lib.evaluation.attack_plan.attack_plan`.
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
        model, `no_gradient` the attacked images that never got a gradient but 0 or NaN (None where the attack asks for
        none). `not_finite` counts, by attack, the images with an answer that is not finite, which is wrong.
        `examples` has a 0 or 1 for each (`lib.evaluation.outcomes.unpack_bits`). `warnings` has a sentence for each
        mark: an attack that did worse than a simpler one or than noise of the same radius, that got no gradient,
        answers that are not finite, random answers, noise out of the seed's reach. `robust.control_noise` is what that
        noise leaves, where an attack is so weak that it has to be run (`lib.evaluation.noise_control`).

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
    at = from_settings(EvaluationSettings, settings, "robust_accuracy")
    return evaluate_attacks(model, attacks, x, y, at, resume_dir=resume_dir, progress=progress)[0]
