"""Experiment 2, defensive distillation (Papernot et al. 2016; Carlini and Wagner 2017): trainings and measurements."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.attacks.api import attack
from lib.attacks.common import cross_entropy, loss_and_grad, margin
from lib.attacks.gate import AttackWarning
from lib.attacks.transfer import train_surrogate
from lib.data import Data, Split
from lib.distillation.defensive import defensive_distillation
from lib.distillation.soft_targets import classic_loss, hard_label_smoothing_loss
from lib.evaluation.outcomes import unpack_bits
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.experiments import kd
from lib.models import build_classifier, predict_classes, predict_logits
from lib.training import hard_label_loss, train
from lib.utils import parallel
from lib.utils.artifacts import load_model
from lib.utils.device import default_device, to_model_device
from lib.utils.record_keys import temperature_key, temperature_of
from lib.utils.seeds import derive_seed, seeded_generator

ORIGINAL_ATTACKS = ("fgsm", "pgd-ce", "jsma-f", "jsma-z")  # those of the time of the defence, or of that kind
NO_BALL = "free"  # the record of the attacks of least distance, beside those of the balls


@dataclass(frozen=True)
class NetworkRecipe:
    """What the trainings of one network share: architecture and optimisation."""

    arch: str
    width: int
    epochs: int
    lr: float
    batch_size: int

    def build(self, data: Data, seed: int) -> nn.Module:
        """Build the untrained network."""
        return build_classifier(self.arch, **data.spec(), width=self.width, seed=seed)

    def options(self, seed: int) -> dict[str, Any]:
        """Return the options of `lib.training.train`."""
        return {
            "epochs": self.epochs,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "seed": seed,
            "progress": False,
        }


@dataclass(frozen=True)
class EvaluationBudget:
    """Radii of the Linf balls by name, and what each attack may spend; `jsma_targets` 0: no JSMA."""

    eps: dict[str, float]
    steps: int
    queries: int
    cw: dict[str, int]
    jsma_targets: int


def train_distilled(
    data: Data, seed: int, temperatures: Sequence[float], recipe: NetworkRecipe, jobs: int = 1
) -> dict[str, nn.Module]:
    """Train one student per temperature, in eval mode, to be used at T = 1; `jobs`: see `lib.utils.parallel`.

    Teacher and student have one architecture and one initialisation; the student is trained on soft labels alone
    (Papernot et al. 2016, section IV). T = 1 takes two trainings as well: only the temperature differs.
    """
    start = recipe.build(data, seed)
    fit = partial(distil_at, start, (data.train.x, data.train.y), recipe.options(seed))
    models = parallel.parallel_map(fit, [(T,) for T in temperatures], jobs, "temperatures")
    return dict(zip(map(temperature_key, temperatures), models, strict=True))


def distil_at(start: nn.Module, tensors: tuple[Tensor, ...], options: dict[str, Any], T: float) -> nn.Module:
    """Train the student of one temperature."""
    return defensive_distillation(start, tensors, T=T, **options)


def train_natural(data: Data, seed: int, recipe: NetworkRecipe) -> nn.Module:
    """Train the surrogate: a network on labels at T = 1, without distillation, from other initial weights."""
    own = derive_seed(seed, "surrogate") % 2**31
    model = recipe.build(data, own)
    train(model, hard_label_loss, tuple(data.train), **recipe.options(own))
    return model.eval()


def train_proxy(data: Data, seed: int, victim: nn.Module, recipe: NetworkRecipe) -> nn.Module:
    """Train a black-box proxy on the training images and the classes that `victim` predicts for them, not on labels."""
    own = derive_seed(seed, "proxy") % 2**31
    predict = partial(predict_classes, victim)
    return train_surrogate(predict, data.train.x, recipe.build(data, own), **recipe.options(own))


def linf_attacks(T: float, surrogate: nn.Module, proxy: nn.Module, budget: EvaluationBudget) -> dict[str, dict]:
    """Return the attacks in the Linf ball for `robust_accuracy`; `T` divides the logits of the rescaled ones."""
    steps, queries = budget.steps, budget.queries
    return {
        "fgsm": {"name": "fgsm"},
        "fgsm/T": {"name": "fgsm", "loss": "ce/tau", "tau": T},
        "pgd-ce": {"name": "pgd", "steps": steps},
        "pgd-ce/T": {"name": "pgd", "steps": steps, "loss": "ce/tau", "tau": T},
        "pgd-margin": {"name": "pgd", "steps": steps, "loss": "margin"},
        "apgd-dlr": {"name": "apgd-dlr", "steps": steps},
        "apgd-t": {"name": "apgd-t", "steps": steps},
        "square": {"name": "square", "queries": queries},
        "transfer": {"name": "transfer", "surrogate": surrogate, "steps": steps},
        "proxy": {"name": "transfer", "surrogate": proxy, "steps": steps},
    }


def min_distance_attacks(budget: EvaluationBudget) -> dict[str, dict]:
    """Return the minimum-distance attacks: C&W in L2, JSMA in L0 on the likeliest wrong classes."""
    jsma = {f"jsma-{kind}": {"name": f"jsma-{kind}", "targets": budget.jsma_targets} for kind in "fz"}
    return {"cw": {"name": "cw"} | budget.cw} | (jsma if budget.jsma_targets else {})


def evaluate_network(
    model: nn.Module, test: Split, seed: int, in_ball: dict[str, dict], min_distance: dict[str, dict], eps: dict
) -> tuple[dict, dict]:
    """Return the scalars of one model under all attacks, and the records of `robust_accuracy`.

    The records are one per entry of `eps`, and `NO_BALL`, of the minimum-distance attacks. Per ball: the accuracy under
    each attack and `worst`, the share of images on which all of them fail, in [0, 1]. `success` is a share of the
    correctly classified images; `l2` is C&W's mean distance over successes, in pixel units, `l0_<attack>` that of JSMA
    in pixels.
    """
    records, scalars, test = {}, {}, Split(*to_model_device(model, *test))
    for i, (ball, radius) in enumerate(eps.items()):
        record = robust_accuracy(model, in_ball, *test, eps=radius, seed=seed, progress=False)
        records[ball], results = record, record["attacks"]
        scalars[ball] = {label: results[label]["accuracy"] for label in in_ball}
        scalars[ball] |= {"worst": record["robust"]["accuracy"], "eps": radius}
        scalars["clean"] = record["clean"]["accuracy"]
        if i == 0:
            scalars["success"] = {k: results[k]["success_rate"] for k in ORIGINAL_ATTACKS if k in in_ball}
    records[NO_BALL] = robust_accuracy(model, min_distance, *test, eps=None, seed=seed, progress=False)
    results = records[NO_BALL]["attacks"]
    scalars["success"] |= {label: results[label]["success_rate"] for label in min_distance}
    scalars["l2"] = mean_distance(results, "cw", "L2")
    for label in set(min_distance) & {"jsma-f", "jsma-z"}:
        scalars[f"l0_{label}"] = mean_distance(results, label, "L0")
    return scalars, records


def mean_distance(results: dict[str, dict], attack: str, norm: str) -> float | None:
    """Return the mean distance over an attack's successes, None without any or without the attack."""
    return ((results[attack]["distance"][norm] or {}) if attack in results else {}).get("mean")


def evaluate_model(
    model: nn.Module,
    T: float,
    surrogate: nn.Module,
    data: Data,
    test: Split,
    seed: int,
    proxy_recipe: NetworkRecipe,
    budget: EvaluationBudget,
) -> tuple[dict, dict, dict[str, float]]:
    """Train the black-box proxy, then run all attacks; return scalars and records of `evaluate_network` and seconds.

    `T` divides the logits of the rescaled attacks.
    """
    seconds: dict[str, float] = {}
    with stopwatch(seconds, "proxy"):
        proxy = train_proxy(data, seed, model, proxy_recipe)
    with stopwatch(seconds, "attacks"):
        in_ball, min_distance = linf_attacks(T, surrogate, proxy, budget), min_distance_attacks(budget)
        scalars, records = evaluate_network(model, test, seed, in_ball, min_distance, budget.eps)
    return scalars, records, seconds


def evaluate_models(
    models: dict[str, nn.Module], tau: dict[str, float], *arguments: Any, jobs: int = 1
) -> tuple[dict[str, dict], dict[str, dict], dict[str, float]]:
    """Return the results of `evaluate_model` by model, and the seconds by part and model, `jobs` models at a time."""
    calls = [(model, tau[name], *arguments) for name, model in models.items()]
    results = parallel.parallel_map(evaluate_model, calls, jobs, "models attacked")
    scalars, records, seconds = (dict(zip(models, column, strict=True)) for column in zip(*results, strict=True))
    return scalars, records, {f"{part} {name}": s for name, each in seconds.items() for part, s in each.items()}


def gradient_norms(
    model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], dtype: torch.dtype, tau: float = 1.0
) -> Float[Tensor, " n"]:
    """Return, in float64, the largest entry of each image's gradient of the cross-entropy, computed in `dtype`.

    The largest entry and not the Euclidean length: squares of 1e-200 would be 0. `tau` divides the logits.
    """
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}

    def call(images: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (images,)) / tau

    x, y = to_model_device(model, x, y)
    return loss_and_grad(call, x.to(dtype), y, cross_entropy)[2].double().flatten(1).abs().amax(1).cpu()


def gradient_statistics(model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"]) -> dict[str, float]:
    """Return what makes gradients vanish: size of logits and margin, and gradients in float32 and float64.

    `logit_mean`, `logit_sd`: of |logits|, over images and classes; `zero_*`: share in [0, 1] of images whose gradient
    is exactly 0 in every pixel; `norm_*`: the median over images of `gradient_norms`.
    """
    z = predict_logits(model, x)
    out = {"logit_mean": z.abs().mean().item(), "logit_sd": z.abs().std().item()}
    out["margin_median"] = margin(z, y).median().item()
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        norms = gradient_norms(model, x, y, dtype)
        out |= {f"zero_{name}": (norms == 0).double().mean().item(), f"norm_{name}": norms.median().item()}
    return out


def classic_students(
    data: Data, seed: int, profile: str, teacher: nn.Module, fit: Callable, width: int, *, T: float, alpha: float
) -> tuple[dict[str, nn.Module], str]:
    """Return experiment 1's student, one trained by `fit` on hard labels, and where the first one comes from.

    Without the file of experiment 1 (a notebook run by hand), the student is trained here, by `teacher` on all labels.
    """
    soft = build_classifier("cnn", **data.spec(), width=width, seed=seed)
    try:
        soft, source = load_model(soft, profile, f"kd-student-s{seed}"), "experiment 1"
    except FileNotFoundError:
        z_t = predict_logits(teacher, data.train.x)
        soft, source = fit(classic_loss(T, alpha), (*data.train, z_t)).eval(), "trained here"
    hard = fit(hard_label_smoothing_loss(), (*data.train,)).eval()
    return {"kd-soft": soft.to(default_device()), "kd-hard": hard}, source


def fit_student(data: Data, seed: int, *, width: int, steps: int, batch_size: int, lr: float) -> Callable:
    """Return `fit(loss, tensors)`, which trains one student as experiment 1 does."""
    return partial(kd.train_student, data, seed, width=width, steps=steps, batch_size=batch_size, lr=lr)


def example_images(
    models: dict[str, nn.Module], test: Split, records: dict, seed: int, ball: str, eps: float, **cw: Any
) -> list[dict]:
    """Return clean image, FGSM and C&W of one test image for each model: pixels, predicted class, L2 distance.

    The image is the first that all models classify correctly and C&W breaks on all; if there is one, the first of these
    that FGSM breaks on the first model and not on the last. `records`: those of `evaluate_network`, by model; `ball`,
    `eps`: that of FGSM.
    """
    examples = [record[NO_BALL]["examples"] for record in records.values()]
    usable = np.all([unpack_bits(e["correct_clean"]) & unpack_bits(e["broken_by"]["cw"]) for e in examples], axis=0)
    broken = [unpack_bits(record[ball]["examples"]["broken_by"]["fgsm"]) for record in records.values()]
    preferred = usable & broken[0] & ~broken[-1]
    rows = (preferred if preferred.any() else usable).nonzero()[0]
    row = int(rows[0]) if len(rows) else 0
    out = []
    for name, model in models.items():
        x, y = to_model_device(model, test.x[row : row + 1], test.y[row : row + 1])
        rng = seeded_generator(seed, f"picture/{name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttackWarning)  # that FGSM gets no gradient here is what is shown
            images = {
                "clean": x,
                "FGSM": attack("fgsm", model, x, y, eps, generator=rng, progress=False),
                "C&W": attack("cw", model, x, y, generator=rng, progress=False, **cw),
            }
        for label, image in images.items():
            predicted, l2 = int(predict_classes(model, image)), (image - x).norm().item()
            entry = {"model": name, "attack": label, "pixels": image[0], "class": predicted, "true": int(y), "l2": l2}
            out.append(entry)
    return out


def defensive_summary(
    results: dict[str, dict], strong: dict[str, dict[str, dict]] | None = None
) -> dict[str, float | None]:
    """Return the numbers that claims are about: the highest temperature against the lowest.

    `results`: per model the scalars of `evaluate_network` and, under `why`, of `gradient_statistics`; `strong`: those
    of `lib.experiments.defensive_strong.attack_ends`.
    """
    distilled = {T: v for name, v in results.items() if (T := temperature_of(name)) is not None}
    low, high = distilled[min(distilled)], distilled[max(distilled)]
    success = [v["success"]["cw"] for v in distilled.values() if v["success"]["cw"] is not None]
    ends = [temperature_key(T) for T in (min(distilled), max(distilled))]
    stronger = {
        f"strong_{ball}": strong[ends[1]][ball]["accuracy"] - strong[ends[0]][ball]["accuracy"]
        for ball in ("small", "large")
        if strong
    }
    return stronger | {
        "apparent_fgsm": high["large"]["fgsm"] - low["large"]["fgsm"],
        "apparent_pgd": high["large"]["pgd-ce"] - low["large"]["pgd-ce"],
        "rescaled_fgsm": high["large"]["fgsm"] - high["large"]["fgsm/T"],
        "cw_success": high["success"]["cw"],
        "cw_success_min": min(success, default=None),
        "cw_l2_ratio": high["l2"] / low["l2"] if low["l2"] and high["l2"] else None,
        "zero_gradient": high["why"]["zero_float32"],
        "logit_ratio": high["why"]["logit_mean"] / low["why"]["logit_mean"],
        "worst_small": high["small"]["worst"] - low["small"]["worst"],
        "worst_large": high["large"]["worst"] - low["large"]["worst"],
        "kd_worst_small": results["kd-soft"]["small"]["worst"] - results["kd-hard"]["small"]["worst"],
        "kd_cw_success": results["kd-soft"]["success"]["cw"],
    }


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write the seconds that one block takes to `seconds[name]`."""
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
