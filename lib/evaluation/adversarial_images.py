"""Adversarial images for an evaluation: made once per attack, checked against ball and box, their cost counted.

They are data: any model can be scored on them afterwards (`lib.evaluation.robust_accuracy`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.attacks.api import REGISTRY, attack, attack_options
from lib.attacks.checks import perturbation_norm
from lib.utils.checkpoints import load_checkpoint, save_checkpoint
from lib.utils.code_hash import fingerprint
from lib.utils.content_hash import content_hash
from lib.utils.progress import tqdm
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed, seeded_generator

NORMS = ("Linf", "L2", "L0")
RESERVED = ("name", "model", "eps", "norm")  # the entries of an attack that are not options of its own


@dataclass(frozen=True)
class EvaluationSettings:
    """What holds for a whole evaluation.

    Args:
        eps: radius of the ball, in pixel units; None for no ball.
        norm: "Linf", "L2" or "L0".
        seed: decides all noise.
        batch_size: examples per batch.
        draws: predictions per image; more than 1 for a stochastic model.
        mode: "eval", or "keep" for the model's own train/eval flags.

    Raises:
        ValueError: if a setting is unusable.
    """

    eps: float | None
    norm: str = "Linf"
    seed: int = 0
    batch_size: int = 256
    draws: int = 1
    mode: str = "eval"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.draws < 1:
            raise ValueError(f"expected batch_size and draws of at least 1, got {self.batch_size} and {self.draws}")
        if self.norm not in NORMS or (self.eps is not None and not 0 <= self.eps < float("inf")):
            expected = f"expected eps >= 0 or None and a norm out of {', '.join(NORMS)}"
            raise ValueError(f"{expected}, got eps {self.eps} and norm {self.norm!r}")


def attack_plan(attacks: list[str] | dict[str, dict]) -> dict[str, dict]:
    """Return label → dict(name=..., **options) from a list of names or such a dict, after checking names and options.

    `name` may also be a function of `(model, x, y, eps, norm, generator, **options)`, for adaptive attacks. An entry's
    `model` is attacked in place of the evaluated one (a surrogate); its `eps` and `norm` are a ball of its own.

    Raises:
        ValueError: if there is no such attack, or an entry has no name.
        TypeError: if an attack has no such option.
    """
    entries = {a: {"name": a} for a in attacks} if not isinstance(attacks, dict) else attacks
    for label, entry in entries.items():
        if label == "clean" or "name" not in entry:
            raise ValueError(f"attack {label!r}: give dict(name=..., **options) under a label other than 'clean'")
        if not callable(entry["name"]):
            unknown = sorted(set(entry) - {*RESERVED, "batch_size"} - set(attack_options(entry["name"])))
            if unknown:
                raise TypeError(f"attack {label!r}: {entry['name']} has no option {', '.join(unknown)}")
    return entries


def attack_ball(entry: dict, at: EvaluationSettings) -> tuple[float | None, str | None]:
    """Return the eps and norm an attack is called with: the evaluation's, unless its options say otherwise.

    Attacks of least distance (cw, deepfool, jsma) get no eps, and their own norm.
    """
    if callable(entry["name"]) or REGISTRY[entry["name"]].needs_eps:
        return entry.get("eps", at.eps), entry.get("norm", at.norm)
    return entry.get("eps"), entry.get("norm")


def outside_ball(x_adv: Tensor, x: Tensor, eps: float | None, norm: str) -> Bool[Tensor, " n"]:
    """Say which images lie outside a norm ball by more than rounding.

    Args:
        x_adv: images (n, c, h, w).
        x: centres of the balls, of the same shape.
        eps: radius in pixel units; None for no ball.
        norm: "Linf", "L2" or "L0".

    Returns:
        Booleans (n,), all False without a ball.
    """
    return ~(perturbation_norm(x_adv, x, norm) <= (float("inf") if eps is None else eps * (1 + 1e-5) + 1e-6))


def _check_adversarial(label: str, x_adv: Tensor, x: Tensor, eps: float | None, norm: str, rows: Tensor) -> None:
    """Raise RuntimeError, naming attack, example and distance, for images outside [0, 1] or outside the ball."""
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        expected, got = (f"{t.dtype} {tuple(t.shape)}" for t in (x, x_adv))
        raise RuntimeError(f"attack {label!r} returned {got}, expected {expected}")
    excess = torch.maximum(-x_adv, x_adv - 1).flatten(1).amax(1)
    box = (~(excess <= 0), excess, "outside the box [0, 1] by")
    distance = perturbation_norm(x_adv, x, norm)
    ball = (outside_ball(x_adv, x, eps, norm), distance, f"outside the {norm} ball of {eps}, at distance")
    for bad, far, what in (box, ball):
        if bad.any():
            i = int(bad.nonzero()[0])
            raise RuntimeError(f"attack {label!r} put example {rows[i].item()} {what} {far[i].item():.6g}")


class CountingModel(nn.Module):
    """Pass images on to `model` and count how many went forward and through how many a gradient came back."""

    def __init__(self, model: Callable) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0
        self.training = getattr(model, "training", False)
        self.independent_noise = getattr(model, "independent_noise", False)
        self.evaluations = getattr(model, "evaluations", 1)

    def count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        z = self.model(x)
        if z.requires_grad:
            z.register_hook(self.count_backward)
        return z


def batch_purpose(label: str, rows: Tensor) -> str:
    """Return the purpose of a batch's noise: its label and the number of its first example."""
    return f"{label}/{rows[0].item() if len(rows) else 0}"


def _attack_batch(
    label: str, entry: dict, model: Callable, x: Tensor, y: Tensor, rows: Tensor, at: EvaluationSettings
) -> dict[str, Any]:
    """Attack the examples `rows`, check the images, and count what that cost."""
    counted, begin, x, y = CountingModel(entry.get("model", model)), time.perf_counter(), x[rows], y[rows]
    x_adv, purpose = x, batch_purpose(label, rows)
    if len(rows):
        eps, norm = attack_ball(entry, at)
        name, options = entry["name"], {k: v for k, v in entry.items() if k not in RESERVED}
        run: Any = name if callable(name) else partial(attack, name, batch_size=len(x), mode=at.mode, progress=False)
        rng = seeded_generator(at.seed, f"attack/{purpose}", x.device)
        with seeded_noise(counted.model, derive_seed(at.seed, f"model/{purpose}"), x.device, at.mode):
            x_adv = run(counted, x.clone(), y.clone(), eps, norm, rng, **options).detach()
        _check_adversarial(label, x_adv, x, at.eps if (eps, norm) == (at.eps, at.norm) else None, at.norm, rows)
    costs = {"forward": counted.forwards, "backward": counted.backwards, "seconds": time.perf_counter() - begin}
    return costs | {"images": x_adv, "rows": rows}


def _resume_or_run(path: Path | None, rows: Tensor, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `path` holds for these rows, else run `make` and write its result there."""
    saved = load_checkpoint(path, rows.device) if path else None
    if saved and isinstance(saved.get("rows"), Tensor) and torch.equal(saved["rows"], rows):
        return saved
    result = make()
    if path:
        save_checkpoint(path, result)
    return result


class AttackedImages(NamedTuple):
    """All images after an attack (n, c, h, w), those that it was not given as they were, and what it cost."""

    images: Float[Tensor, "n c h w"]
    forward: int
    backward: int
    seconds: float


def adversarial_images(
    model: Callable,
    attacks: dict[str, dict],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    batches: Sequence[Tensor],
    at: EvaluationSettings,
    *,
    resume_dir: Path | str | None = None,
    progress: bool = True,
) -> dict[str, AttackedImages]:
    """Make adversarial images, once per attack.

    Args:
        model: answers logits for images in [0, 1].
        attacks: see `attack_plan`.
        x: images (n, c, h, w), in [0, 1].
        y: labels (n,).
        batches: the examples that are attacked, by number, batch by batch.
        at: ball, seed and mode.
        resume_dir: where a file per attack and batch is saved; one of another model, data, setting or code is ignored.
        progress: whether to show a bar.

    Returns:
        The images by attack, in the order of `x`, with `forward` and `backward`: how many images the attack sent
        through the attacked model, its own checks included.

    Raises:
        RuntimeError: if an attack leaves ball or box.
        Unhashable: a TypeError, with `resume_dir`, if what decides the images cannot be hashed.
    """
    results, settings = {}, fingerprint(asdict(at), str(x.device), torch.__version__)
    evaluated = content_hash({"model": model, "x": x, "y": y}, "evaluation") if resume_dir else ""
    with tqdm(total=sum(map(len, batches)) * len(attacks), desc="attacks", unit="image", disable=not progress) as bar:
        for label, entry in attacks.items():
            bar.set_postfix_str(label)
            images, parts = x.clone(), []
            key = content_hash([evaluated, label, entry, settings], f"attack {label}") if resume_dir else ""
            for number, rows in enumerate(batches):
                path = Path(resume_dir) / f"{key[:32]}-{number}.pt" if resume_dir else None
                parts.append(_resume_or_run(path, rows, partial(_attack_batch, label, entry, model, x, y, rows, at)))
                images[rows] = parts[-1]["images"]
                bar.update(len(rows))
            costs = {kind: sum(part[kind] for part in parts) for kind in ("forward", "backward", "seconds")}
            results[label] = AttackedImages(images, **costs)
    return results
