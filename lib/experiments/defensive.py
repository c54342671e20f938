"""Experiment 2, defensive distillation (Papernot et al. 2016; Carlini and Wagner 2017): what the notebook computes."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.attacks.api import attack
from lib.attacks.common import cross_entropy, loss_and_grad, margin
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
from lib.utils.seeds import derive_seed, seeded_generator

ORIGINAL_ATTACKS = (
    "fgsm",
    "pgd-ce",
    "jsma-f",
    "jsma-z",
)  # what was tried when the defence was proposed, or is of that kind


def temperature_name(T: float) -> str:
    """Returns the name under which results at temperature T are kept, e.g. T100."""
    return f"T{T:g}"


def train_distilled(
    data: Data, seed: int, temperatures: Sequence[float], *, arch: str, width: int, jobs: int = 1, **options: Any
) -> dict[str, nn.Module]:
    """Returns one student per temperature, in eval mode, to be used at T = 1; `jobs`: see `lib.utils.parallel`.

    Teacher and student have one architecture and the weights of one seed at the start; the student sees soft labels
    only (Papernot et al. 2016, section IV). At T = 1 the two trainings are made as well: only the temperature differs.
    `options`: those of `lib.training.train`.
    """
    start = build_classifier(arch, **data.spec(), width=width, seed=seed)
    fit = partial(defensive_distillation, start, tuple(data.train), **{"seed": seed, "progress": False} | options)

    def at(T: float) -> nn.Module:
        return fit(T=T)

    models = parallel.parallel_map(at, [(T,) for T in temperatures], jobs, "temperatures")
    return dict(zip(map(temperature_name, temperatures), models, strict=True))


def train_natural(data: Data, seed: int, *, arch: str, width: int, **options: Any) -> nn.Module:
    """Returns a network trained on labels at T = 1, without distillation, of other initial weights: the surrogate."""
    own = derive_seed(seed, "surrogate") % 2**31
    model = build_classifier(arch, **data.spec(), width=width, seed=own)
    train(model, hard_label_loss, tuple(data.train), seed=own, **{"progress": False} | options)
    return model.eval()


def train_proxy(
    data: Data, seed: int, victim: nn.Module, *, arch: str, width: int, epochs: int, **options: Any
) -> nn.Module:
    """Returns a network trained on nothing but the classes that `victim` answers to the training images (no labels)."""
    own = derive_seed(seed, "proxy") % 2**31
    start = build_classifier(arch, **data.spec(), width=width, seed=own)
    asked = partial(predict_classes, victim)
    return train_surrogate(asked, data.train.x, start, epochs=epochs, seed=own, **{"progress": False} | options)


def linf_attacks(T: float, surrogate: nn.Module, proxy: nn.Module, *, steps: int, queries: int) -> dict[str, dict]:
    """Returns the attacks in the Linf ball for `robust_accuracy`: `T` is what the scaled ones divide the logits by."""
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


def min_distance_attacks(*, cw_steps: int, cw_searches: int, jsma_targets: int) -> dict[str, dict]:
    """Returns attacks of least distance: C&W in L2, JSMA in L0 (`jsma_targets` likeliest wrong classes; 0: none)."""
    both = {f"jsma-{kind}": {"name": f"jsma-{kind}", "targets": jsma_targets} for kind in "fz"}
    return {"cw": {"name": "cw", "steps": cw_steps, "searches": cw_searches}} | (both if jsma_targets else {})


def evaluate_network(
    model: nn.Module, test: Split, seed: int, in_ball: dict[str, dict], free: dict[str, dict], eps: dict[str, float]
) -> tuple[dict, dict]:
    """Returns the scalars of one model under all attacks, and the records of `lib.evaluation.robust_accuracy`, one per entry of `eps`.

    Per ball: the accuracy that each attack leaves and `worst`, the share of images that resist all of them, in [0, 1].
    The attacks of least distance do not depend on the ball: they run once, and `success` is their share of the images
    that were right; `l2` is C&W's mean distance over successes, in pixel units, `l0_<attack>` JSMA's pixels.
    """
    records, scalars, test = {}, {}, Split(*to_model_device(model, *test))
    for i, (name, radius) in enumerate(eps.items()):
        attacks = in_ball | (free if i == 0 else {})
        records[name] = found = robust_accuracy(model, attacks, *test, eps=radius, seed=seed, progress=False)
        scalars[name] = {label: found["attacks"][label]["accuracy"] for label in in_ball}
        scalars[name] |= {"worst": found["robust"]["accuracy"], "eps": radius}
        scalars["clean"] = found["clean"]["accuracy"]
        if i == 0:
            rows = {label: found["attacks"][label] for label in free}
            scalars["success"] = {label: row["success_rate"] for label, row in rows.items()}
            scalars["success"] |= {s: found["attacks"][s]["success_rate"] for s in ORIGINAL_ATTACKS if s in in_ball}
            scalars["l2"] = ((rows["cw"]["distance"]["L2"] or {}) if "cw" in rows else {}).get("mean")
            for label in set(free) & {"jsma-f", "jsma-z"}:
                scalars[f"l0_{label}"] = (rows[label]["distance"]["L0"] or {}).get("mean")
    return scalars, records


def evaluate_model(
    model: nn.Module,
    T: float,
    surrogate: nn.Module,
    data: Data,
    test: Split,
    seed: int,
    free: dict[str, dict],
    eps: dict[str, float],
    *,
    steps: int,
    queries: int,
    proxy_epochs: int,
    **recipe: Any,
) -> tuple[dict, dict, dict[str, float]]:
    """Returns the scalars and records of `evaluate_network` and the seconds: the black-box proxy is trained, then all attack.

    `T` is what the scaled attacks divide the logits by; `recipe`: that of `train_proxy`.
    """
    proxy, training = timed(train_proxy, data, seed, model, epochs=proxy_epochs, **recipe)
    attacks = linf_attacks(T, surrogate, proxy, steps=steps, queries=queries)
    (scalars, records), attacking = timed(evaluate_network, model, test, seed, attacks, free, eps)
    return scalars, records, {"proxy": training, "attacks": attacking}


def evaluate_models(
    models: dict[str, nn.Module], tau: dict[str, float], *arguments: Any, jobs: int = 1, **options: Any
) -> tuple[dict[str, dict], dict[str, dict], dict[str, float]]:
    """Returns what `evaluate_model` returns, by name of the model and, for the seconds, of the work; `jobs` at a time."""
    work = [(model, tau[name], *arguments) for name, model in models.items()]
    done = parallel.parallel_map(partial(evaluate_model, **options), work, jobs, "models attacked")
    scalars, records, spent = (dict(zip(models, column, strict=True)) for column in zip(*done, strict=True))
    return scalars, records, {f"{what} {name}": s for name, each in spent.items() for what, s in each.items()}


def gradient_norms(
    model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], dtype: torch.dtype, tau: float = 1.0
) -> Float[Tensor, " n"]:
    """Returns, in float64, the largest entry of each image's gradient of the cross-entropy, computed in `dtype`.

    The largest entry and not the Euclidean length: squares of 1e-200 would be 0. `tau` divides the logits.
    """
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}

    def call(images: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (images,)) / tau

    x, y = to_model_device(model, x, y)
    return loss_and_grad(call, x.to(dtype), y, cross_entropy)[2].double().flatten(1).abs().amax(1).cpu()


def gradient_statistics(model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"]) -> dict[str, float]:
    """Returns why gradients vanish: logit size and margin, and gradients in float32 and float64, at the images.

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
    """Returns experiment 1's student and its twin on hard labels, both without defence, and where the first came from.

    Without the file of experiment 1 (a notebook run by hand), the student is trained here, by `teacher` on all labels.
    """
    soft = build_classifier("cnn", **data.spec(), width=width, seed=seed)
    try:
        soft, source = load_model(soft, profile, f"kd-student-s{seed}"), "experiment 1"
    except FileNotFoundError:
        soft, source = (
            fit(classic_loss(T, alpha), (*data.train, predict_logits(teacher, data.train.x))).eval(),
            "trained here",
        )
    return {
        "kd-soft": soft.to(default_device()),
        "kd-hard": fit(hard_label_smoothing_loss(), (*data.train,)).eval(),
    }, source


def fit_student(data: Data, seed: int, *, width: int, steps: int, batch_size: int, lr: float) -> Callable:
    """Returns `fit(loss, tensors)`, which trains one student as experiment 1 does."""
    return partial(kd.train_student, data, seed, width=width, steps=steps, batch_size=batch_size, lr=lr)


def example_images(
    models: dict[str, nn.Module], test: Split, records: dict, seed: int, eps: float, **cw: Any
) -> list[dict]:
    """Returns clean image, FGSM and C&W of one test image for each model: pixels, predicted class, L2 distance.

    The image is the first that all models have right, that C&W breaks on all, and FGSM on all but the last, if any is.
    """
    examples = [record["examples"] for record in records.values()]
    wanted = [unpack_bits(e["correct_clean"]) & unpack_bits(e["broken_by"]["cw"]) for e in examples]
    fooled = [unpack_bits(e["broken_by"]["fgsm"]) for e in examples]
    usable, telling = wanted[0], fooled[0] & ~fooled[-1]
    for more in wanted[1:]:
        usable = usable & more
    rows = (usable & telling if (usable & telling).any() else usable).nonzero()[0]
    row = int(rows[0]) if len(rows) else 0
    out = []
    for name, model in models.items():
        x, y = to_model_device(model, test.x[row : row + 1], test.y[row : row + 1])
        rng = seeded_generator(seed, f"picture/{name}")
        shown = {
            "clean": x,
            "FGSM": attack("fgsm", model, x, y, eps, generator=rng, progress=False),
            "C&W": attack("cw", model, x, y, generator=rng, progress=False, **cw),
        }
        for label, image in shown.items():
            said = int(predict_classes(model, image))
            far = (image - x).norm().item()
            out.append({"model": name, "attack": label, "pixels": image[0], "class": said, "true": int(y), "l2": far})
    return out


def defensive_summary(found: dict[str, dict], first: str, last: str) -> dict[str, float | None]:
    """Returns the numbers that claims are about: the highest temperature (`last`) against the lowest (`first`).

    `found`: the scalars of `evaluate_network` and, under `why`, of `gradient_statistics`, per model; temperatures begin with T.
    """
    a, b = found[first], found[last]
    distilled = [v for k, v in found.items() if k.startswith("T")]
    lengths = a["l2"], b["l2"]
    return {
        "apparent_fgsm": b["large"]["fgsm"] - a["large"]["fgsm"],
        "apparent_pgd": b["large"]["pgd-ce"] - a["large"]["pgd-ce"],
        "rescaled_fgsm": b["large"]["fgsm"] - b["large"]["fgsm/T"],
        "cw_success": b["success"]["cw"],
        "cw_success_min": min((v["success"]["cw"] for v in distilled if v["success"]["cw"] is not None), default=None),
        "cw_l2_ratio": lengths[1] / lengths[0] if all(lengths) else None,
        "zero_gradient": b["why"]["zero_float32"],
        "logit_ratio": b["why"]["logit_mean"] / a["why"]["logit_mean"],
        "worst_small": b["small"]["worst"] - a["small"]["worst"],
        "worst_large": b["large"]["worst"] - a["large"]["worst"],
        "kd_worst_small": found["kd-soft"]["small"]["worst"] - found["kd-hard"]["small"]["worst"],
        "kd_cw_success": found["kd-soft"]["success"]["cw"],
    }


def timed(work: Callable, *inputs: Any, **options: Any) -> tuple[Any, float]:
    """Returns what `work` returns and the seconds it took."""
    begin = time.perf_counter()
    out = work(*inputs, **options)
    return out, time.perf_counter() - begin
