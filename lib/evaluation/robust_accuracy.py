"""Robust accuracy: the worst case over attacks for each example, with intervals, distances, costs and a paper trail.

What is counted: an attack is given the examples whose clean prediction is right and hands back images. These are
checked against ball and box and classified anew: nothing an attack says of its own success is believed. Examples that
were wrong without an attack count as broken.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.attacks.api import REGISTRY, attack, attack_options
from lib.attacks.checks import check_labels, checked_logits, perturbation_norm
from lib.data import check_images
from lib.evaluation.outcomes import outcome_shares, outcomes, pack_bits, repeated_predictions
from lib.utils.code_hash import fingerprint
from lib.utils.content_hash import content_hash
from lib.utils.files import to_jsonable, write_json
from lib.utils.progress import tqdm
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed, seeded_generator

NORMS = ("Linf", "L2", "L0")
WEAK = ("noise", "fgsm", "square")  # what an iterative attack that follows gradients ought to beat
TOLERANCE = 0.002  # of accuracy: AutoAttack's flag for Square (Croce and Hein 2020, flags_doc.md)


def attack_plan(attacks: list[str] | dict[str, dict]) -> dict[str, dict]:
    """Returns label -> dict(name=..., **options) from a list of names or such a dict, after checking names and options.

    `name` may also be a function of `(model, x, y, eps, norm, generator, **options)`, for adaptive attacks.
    """
    entries = {a: {"name": a} for a in attacks} if not isinstance(attacks, dict) else attacks
    for label, entry in entries.items():
        if label == "clean" or "name" not in entry:
            raise ValueError(f"attack {label!r}: give dict(name=..., **options) under a label other than 'clean'")
        if not callable(entry["name"]):
            unknown = sorted(set(entry) - {"name", "eps", "norm", "batch_size"} - set(attack_options(entry["name"])))
            if unknown:
                raise TypeError(f"attack {label!r}: {entry['name']} has no option {', '.join(unknown)}")
    return entries


class EvaluationSettings(NamedTuple):
    """What holds for a whole evaluation: the ball (`eps` None: no ball), seed, draws per image, how many of them are
    one batch, and train/eval mode."""

    eps: float | None
    norm: str
    seed: int
    draws: int
    at_once: int
    mode: str


def attack_ball(entry: dict, at: EvaluationSettings) -> tuple[float | None, str | None]:
    """Returns the eps and norm an attack is called with: the evaluation's, unless its options say otherwise; attacks of
    least distance (cw, deepfool, jsma) get no eps, and their own norm."""
    if callable(entry["name"]) or REGISTRY[entry["name"]].needs_eps:
        return entry.get("eps", at.eps), entry.get("norm", at.norm)
    return entry.get("eps"), entry.get("norm")


def outside_ball(x_adv: Tensor, x: Tensor, eps: float | None, norm: str) -> Bool[Tensor, " n"]:
    """Says which images lie outside the norm ball (none where eps is None) by more than rounding."""
    return ~(perturbation_norm(x_adv, x, norm) <= (float("inf") if eps is None else eps * (1 + 1e-5) + 1e-6))


def check_adversarial(label: str, x_adv: Tensor, x: Tensor, eps: float | None, norm: str, rows: Tensor) -> None:
    """Raises RuntimeError, naming attack, example and distance, for images outside [0, 1] or outside the ball."""
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        raise RuntimeError(f"attack {label!r} returned {x_adv.dtype} {tuple(x_adv.shape)}, not {tuple(x.shape)}")
    excess = torch.maximum(-x_adv, x_adv - 1).flatten(1).amax(1)
    box = (~(excess <= 0), excess, "outside the box [0, 1] by")
    sphere = (
        outside_ball(x_adv, x, eps, norm),
        perturbation_norm(x_adv, x, norm),
        f"outside the {norm} ball of {eps}, at distance",
    )
    for bad, far, what in (box, sphere):
        if bad.any():
            i = int(bad.nonzero()[0])
            raise RuntimeError(f"attack {label!r} put example {rows[i].item()} {what} {far[i].item():.6g}")


class CountingModel(nn.Module):
    """Passes images on to `model` and counts how many went forward and through how many a gradient came back."""

    def __init__(self, model: Callable) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0
        self.training = getattr(model, "training", False)

    def count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        z = self.model(x)
        if z.requires_grad:
            z.register_hook(self.count)
        return z


def measure_attack(
    model: Callable, label: str, entry: dict | None, x: Tensor, y: Tensor, rows: Tensor, at: EvaluationSettings
) -> dict:
    """Attacks the examples `rows` (not at all with entry None), checks the images and classifies them anew."""
    purpose, counted, began = f"{label}/{rows[0].item() if len(rows) else 0}", CountingModel(model), time.perf_counter()
    x, y = x[rows], y[rows]
    x_adv = x
    if entry and len(rows):
        eps, norm = attack_ball(entry, at)
        name, options = entry["name"], {k: v for k, v in entry.items() if k not in ("name", "eps", "norm")}
        run = name if callable(name) else partial(attack, name, batch_size=len(x), mode=at.mode, progress=False)
        rng = seeded_generator(at.seed, f"attack/{purpose}", x.device)
        with seeded_noise(model, derive_seed(at.seed, f"model/{purpose}"), x.device, at.mode):
            x_adv = run(counted, x.clone(), y.clone(), eps, norm, rng, **options).detach()
        check_adversarial(label, x_adv, x, at.eps if (eps, norm) == (at.eps, at.norm) else None, at.norm, rows)
    with seeded_noise(model, derive_seed(at.seed, f"draws/{purpose}"), x.device, at.mode):
        votes = repeated_predictions(model, x_adv, at.draws, at.at_once) if len(x) else y.new_empty(at.draws, 0)
    out = {"rows": rows, "votes": votes, "outside": outside_ball(x_adv, x, at.eps, at.norm)}
    out |= {"forward": counted.forwards, "backward": counted.backwards, "seconds": time.perf_counter() - began}
    for name in NORMS:
        moved = (x_adv != x).any(1, keepdim=True) if name == "L0" else x_adv - x
        out[name] = torch.linalg.vector_norm(moved.double().flatten(1), float(name[1:]), dim=1)
    return to_jsonable(out)


def resume_or_run(path: Path | None, key: str, rows: Tensor, work: Callable[[], dict]) -> dict:
    """Returns what `path` holds for this very key and these rows, else does the work and writes it there atomically."""
    if path and path.exists():
        with suppress(ValueError, KeyError, TypeError):  # half-written or foreign: done afresh
            kept = json.loads(path.read_text())
            if kept["key"] == key and kept["rows"] == rows.tolist():
                return kept
    done = work() | {"key": key}
    if path:
        write_json(path, done)
    return done


def option_text(value: Any) -> Any:
    """Returns an option as the record shows it: plain values as they are, other objects by name and digest."""
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return (
        value if value is None or isinstance(value, bool | int | float | str) else f"{name} {content_hash(value)[:12]}"
    )


def attack_summary(parts: list[dict], verdict: dict[str, np.ndarray], y: np.ndarray, draws: int) -> dict[str, Any]:
    """Returns an attack's row of the table from its batches and its verdict in the ball; distances are of successes."""
    rows = np.concatenate([part["rows"] for part in parts]).astype(int)
    votes = np.concatenate([np.array(part["votes"], dtype=int).reshape(draws, -1) for part in parts], axis=1)
    broken = outcomes(votes, y[rows])["majority"] == 0
    left = broken & np.concatenate([part["outside"] for part in parts]).astype(bool)
    out = outcome_shares(verdict, draws)
    out |= {"attacked": len(rows), "failures": int((~broken).sum()), "outside_ball": int(left.sum())}
    out["success_rate"] = float(broken.mean()) if len(rows) else None
    out["distance"] = {}
    for name in NORMS:
        far = np.concatenate([part[name] for part in parts])[broken]
        out["distance"][name] = {"mean": float(far.mean()), "median": float(np.median(far))} if len(far) else None
    return out | {kind: sum(part[kind] for part in parts) for kind in ("forward", "backward")}


def weak_attacks(table: dict[str, dict]) -> list[str]:
    """Returns a sentence for each attack that is beaten by a simpler one by over 0.2 points (Carlini et al. 2019).

    Each iterative gradient attack in the evaluation's ball is held against noise and FGSM, the best one against Square.
    """
    rows = {label: row for label, row in table.items() if not row["own_ball"]}
    strong = {label: row["accuracy"] for label, row in rows.items() if row["name"] not in (*WEAK, "transfer")}
    out: list[str] = []
    for label, row in rows.items():
        rivals = sorted(strong, key=strong.get)[: 1 if row["name"] == "square" else None] if row["name"] in WEAK else []
        beaten = [rival for rival in rivals if strong[rival] > row["accuracy"] + TOLERANCE]
        out += [f"{rival} leaves {strong[rival]:.2%}, {label} only {row['accuracy']:.2%}" for rival in beaten]
    return out


def robust_accuracy(
    model: Callable,
    attacks: list[str] | dict[str, dict],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    eps: float | None,
    norm: str = "Linf",
    seed: int = 0,
    batch_size: int = 256,
    draws: int = 1,
    at_once: int = 1,
    mode: str = "eval",
    resume_dir: Path | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Returns one JSON record on `model` (logits for images in [0, 1]) under `attacks`, the worst case per example.

    `attacks`: see `attack_plan`; `eps`: radius in pixel units, None for no ball. An option `eps` or `norm` gives an attack its
    own ball, attacks of least distance (cw, deepfool, jsma) have none: what they put outside the evaluation's counts in
    `success_rate` and `distance`, not against `accuracy`. Distances are of successes, i.e. attacked examples (right as
    clean ones) whose final image is misclassified; `failures` counts the others; L0 counts pixels, not channels.
    `forward` and `backward` count the images an attack sent through `model`, its own checks included. `examples` has a
    0 or 1 for each (see `unpack_bits`). `warnings` names attacks that did worse than simpler ones, and random answers.

    A stochastic model is asked `draws` times, anew, about each clean and each final image, `at_once` of these in one
    batch, which is right where noise is each image's own. `accuracy` is then the mean over draws, `worst_of_n` asks for
    all draws and `majority` for the vote to be right; across attacks each takes the minimum per example. Asking often
    finds errors without any attack: `robust.control_worst_of_n` is what the clean images keep in as many draws as all
    attacks together had; only what is below it is the attacks' work.

    `mode`: "eval", or "keep" for the model's own train/eval flags. `resume_dir`: keeps a file per attack and batch; one
    of another model, data, setting or source code is ignored. All but `timing` (seconds) is decided by `seed`.
    Raises ValueError or TypeError for unusable input, RuntimeError for an image outside ball or box.
    """
    entries = attack_plan(attacks)
    check_images(x)
    if not len(x) or batch_size < 1 or draws < 1:
        raise ValueError(f"{len(x)} images, batch_size {batch_size}, draws {draws}: at least 1 of each is due")
    if norm not in NORMS or (eps is not None and not 0 <= eps < float("inf")):
        raise ValueError(f"eps {eps}, norm {norm!r}: a radius >= 0 or None and one of {', '.join(NORMS)} are due")
    with seeded_noise(model, derive_seed(seed, "probe"), x.device, mode):
        z, again = (checked_logits(model, x[:16], batch_size) for _ in range(2))
    check_labels("y", y, x, z.shape[1])
    at = EvaluationSettings(eps, norm, seed, draws, at_once, mode)
    facts = (content_hash(model), content_hash([x, y]), at, batch_size, str(x.device), torch.__version__)
    bar = tqdm(total=len(x) * (1 + len(entries)), desc="attacks", unit="image", disable=not progress)

    def run(label: str, entry: dict | None, batches: list[Tensor], at: EvaluationSettings) -> list[dict]:
        key, parts = fingerprint(*facts, label, content_hash(entry), at.draws), []
        bar.set_postfix_str(label)
        for number, rows in enumerate(batches):
            path = Path(resume_dir) / f"{key}-{number}.json" if resume_dir else None
            parts.append(resume_or_run(path, key, rows, partial(measure_attack, model, label, entry, x, y, rows, at)))
            bar.update(min(batch_size, len(x) - number * batch_size))
        return parts

    truth, batches = y.cpu().numpy(), torch.arange(len(x), device=x.device).split(batch_size)
    asked = draws * max(len(entries), 1) if draws > 1 else 1
    parts = {"clean": run("clean", None, list(batches), at._replace(draws=asked))}
    votes = np.concatenate([part["votes"] for part in parts["clean"]], axis=1)
    clean = outcomes(votes[:draws], truth)
    worth = torch.from_numpy(clean["accuracy"] > 0).to(x.device)
    found, table = {}, {}
    for label, entry in entries.items():
        parts[label] = run(label, entry, [rows[worth[rows]] for rows in batches], at)
        final = votes[:draws].copy()  # who finds nothing in the ball hands in the clean image
        for part in parts[label]:
            kept, rows = ~np.array(part["outside"], dtype=bool), np.array(part["rows"], dtype=int)
            final[:, rows[kept]] = np.array(part["votes"], dtype=int)[:, kept]
        found[label] = outcomes(final, truth)
        table[label] = {"name": option_text(entry["name"]), "own_ball": attack_ball(entry, at) != (eps, norm)}
        table[label]["options"] = {k: option_text(v) for k, v in entry.items() if k != "name"}
        table[label] |= attack_summary(parts[label], found[label], truth, draws)
    bar.close()
    worst = {k: np.min([verdict[k] for verdict in found.values()] or [clean[k]], axis=0) for k in clean}
    robust, warnings = outcome_shares(worst, draws), weak_attacks(table)
    if draws > 1:
        robust["control_worst_of_n"] = outcome_shares(outcomes(votes, truth), draws)["worst_of_n"]
    elif not torch.allclose(z, again, rtol=0, atol=1e-4 * z.abs().max().item()):
        warnings.append("the model's answers are random: ask with draws > 1 and attack with eot")
    broken = {label: pack_bits(1 - verdict["majority"]) for label, verdict in found.items()}
    record = {"settings": at._asdict() | {"batch_size": batch_size}, "model": facts[0][:16], "data": facts[1][:16]}
    record |= {
        "n": len(x),
        "clean": outcome_shares(clean, draws),
        "robust": robust,
        "attacks": table,
        "warnings": warnings,
    }
    record["examples"] = {"correct_clean": pack_bits(clean["majority"]), "broken_by": broken}
    record["timing"] = {label: sum(part["seconds"] for part in some) for label, some in parts.items()}
    return to_jsonable(record)
