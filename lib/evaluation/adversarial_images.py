"""Adversarial images for an evaluation: made once per attack, checked against ball and box, their cost counted.

They are data: any model can be scored on them afterwards (`lib.evaluation.robust_accuracy`).
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.attacks.api import attack
from lib.attacks.checks import outside_ball, perturbation_norm
from lib.attacks.gate import AttackWarning
from lib.evaluation.attack_plan import RESERVED, EvaluationSettings, attack_ball
from lib.utils.checkpoints import load_checkpoint, save_checkpoint
from lib.utils.code_hash import fingerprint
from lib.utils.content_hash import content_hash
from lib.utils.progress import tqdm
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed, seeded_generator


def _check_adversarial(label: str, x_adv: Tensor, x: Tensor, eps: float | None, norm: str, rows: Tensor) -> None:
    """Raise RuntimeError, naming attack, example and distance, for images outside [0, 1] or outside the ball."""
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        expected, got = (f"{t.dtype} {tuple(t.shape)}" for t in (x, x_adv))
        raise RuntimeError(f"attack {label!r} returned {got}, expected {expected}")
    excess = torch.maximum(-x_adv, x_adv - 1).flatten(1).amax(1)
    outside = outside_ball(x_adv, x, eps, norm)
    for bad, what in ((~(excess <= 0), "outside the box [0, 1] by"), (outside, f"outside the {norm} ball of {eps}")):
        if bad.any():
            i = int(bad.nonzero()[0])
            far = excess[i] if bad is not outside else perturbation_norm(x_adv[i : i + 1], x[i : i + 1], norm)
            what = what if bad is not outside else f"{what}, at distance"
            raise RuntimeError(f"attack {label!r} put example {rows[i].item()} {what} {far.item():.6g}")


class CountingModel(nn.Module):
    """Pass images on to `model`; count those that went forward and those through which a gradient came back.

    Of the images `x` that are attacked it notes which ones were passed for a gradient (`requested`), and which of them
    got one that is a number and not 0 (`reached`). A batch of as many images, or a multiple, is in their order; images
    of another batch are taken for the nearest ones. It stops watching once every image has a gradient.
    """

    def __init__(self, model: Callable, x: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0
        self.training = getattr(model, "training", False)
        self.independent_noise = getattr(model, "independent_noise", False)
        self.evaluations = getattr(model, "evaluations", 1)
        self.origins = x
        self.requested, self.reached = torch.zeros(2, 0 if x is None else len(x), dtype=torch.bool)

    def count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def note_gradient(self, rows: Tensor, gradient: Tensor) -> None:
        """Note which images `rows` got a usable gradient."""
        usable = ((gradient != 0) & gradient.isfinite()).flatten(1).any(1).cpu()
        self.reached[rows[usable]] = True
        if self.reached.all():
            self.origins = None

    def rows_of(self, x: Tensor, origins: Tensor) -> Tensor:
        """Return for images of a pass which of the attacked images they come from."""
        if len(x) % len(origins) == 0:
            return torch.arange(len(origins)).repeat(len(x) // len(origins))
        return torch.cdist(x.detach().flatten(1).float(), origins.flatten(1).float()).argmin(1).cpu()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if self.origins is not None and x.requires_grad and torch.is_grad_enabled() and x.shape[1:] == self.shape:
            rows, x = self.rows_of(x, self.origins), x.view_as(x)  # a view, so that each pass has a hook of its own
            self.requested[rows] = True
            x.register_hook(partial(self.note_gradient, rows))
        z = self.model(x)
        if isinstance(z, Tensor) and z.requires_grad:
            z.register_hook(self.count_backward)
        return z

    @property
    def shape(self) -> torch.Size | None:
        return None if self.origins is None else self.origins.shape[1:]


def batch_purpose(label: str, rows: Tensor) -> str:
    """Return the purpose of a batch's noise: its label and the number of its first example."""
    return f"{label}/{rows[0].item() if len(rows) else 0}"


def _attack_batch(
    label: str, entry: dict, model: Callable, x: Tensor, y: Tensor, rows: Tensor, at: EvaluationSettings
) -> dict[str, Any]:
    """Attack the examples `rows`, check the images, and count what that cost and which images got no gradient."""
    begin, x, y = time.perf_counter(), x[rows], y[rows]
    counted, surrogate = CountingModel(entry.get("model", model), x), None
    x_adv, purpose = x, batch_purpose(label, rows)
    if len(rows):
        eps, norm = attack_ball(entry, at)
        name, options = entry["name"], {k: v for k, v in entry.items() if k not in RESERVED}
        if isinstance(options.get("target"), Tensor) and not callable(name):
            options["target"] = options["target"][rows]
        if callable(options.get("surrogate")) and not callable(name):
            surrogate = options["surrogate"] = CountingModel(options["surrogate"], x)
        run: Any = name if callable(name) else partial(attack, name, batch_size=len(x), mode=at.mode, progress=False)
        rng = seeded_generator(at.seed, f"attack/{purpose}", x.device)
        noise = seeded_noise(counted.model, derive_seed(at.seed, f"model/{purpose}"), x.device, at.mode)
        with noise, torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", AttackWarning)  # the record has them, by image
            x_adv = run(counted, x.clone(), y.clone(), eps, norm, rng, **options)
        if not isinstance(x_adv, Tensor):
            raise ValueError(f"attack {label!r}: expected images as a tensor, got {type(x_adv).__name__}")
        x_adv = x_adv.detach()
        _check_adversarial(label, x_adv, x, at.eps if (eps, norm) == (at.eps, at.norm) else None, at.norm, rows)
    watched = [counted, *([surrogate] if surrogate else [])]
    requested, reached = (torch.stack([getattr(w, k) for w in watched]).any(0) for k in ("requested", "reached"))
    costs = {"forward": counted.forwards, "backward": counted.backwards, "seconds": time.perf_counter() - begin}
    costs |= {"requested": int(requested.sum()), "no_gradient": int((requested & ~reached).sum())}
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
    """All images after an attack (n, c, h, w), those that it was not given as they were, and what it cost.

    `requested`: images that were passed for a gradient; `no_gradient`: those of them that never got one but 0 or NaN.
    """

    images: Float[Tensor, "n c h w"]
    forward: int
    backward: int
    seconds: float
    requested: int = 0
    no_gradient: int = 0


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
        attacks: see `lib.evaluation.attack_plan.attack_plan`.
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
    results, evaluated = {}, []
    if resume_dir:
        settings = fingerprint(asdict(at), str(x.device), torch.__version__)
        evaluated = [content_hash({"model": model, "x": x, "y": y}, "evaluation"), settings]
    with tqdm(total=sum(map(len, batches)) * len(attacks), desc="attacks", unit="image", disable=not progress) as bar:
        for label, entry in attacks.items():
            bar.set_postfix_str(label)
            images, parts = x.clone(), []
            key = content_hash([*evaluated, label, entry], f"attack {label}") if resume_dir else ""
            for number, rows in enumerate(batches):
                path = Path(resume_dir) / f"{key[:32]}-{number}.pt" if resume_dir else None
                parts.append(_resume_or_run(path, rows, partial(_attack_batch, label, entry, model, x, y, rows, at)))
                images[rows] = parts[-1]["images"]
                bar.update(len(rows))
            costs = {kind: sum(part[kind] for part in parts) for kind in AttackedImages._fields[1:]}
            results[label] = AttackedImages(images, **costs)
    return results
