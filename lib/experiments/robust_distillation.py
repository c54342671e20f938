"""Experiment 3, robust distillation: how its trainings (`lib.experiments.robust_runs`) are run and evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.attacks.common import step_size
from lib.data import Data, Split, load_dataset
from lib.distillation.adversarial import METHODS, AdversarialBatch, inner_maximisation, robust_loss
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.experiments.kd import class_relations
from lib.experiments.robust_runs import FEW_LABEL_METHODS, MAIN_TEACHER, OURS, PUBLISHED, TrainingRun
from lib.experiments.samples import WORST, attack_outcomes, ball_condition
from lib.models import accuracy, build_classifier, most_likely, predict_logits
from lib.training import train
from lib.utils import parallel
from lib.utils.augmentation import shift_flip
from lib.utils.device import default_device, to_model_device
from lib.utils.random_state import attack_mode
from lib.utils.record_keys import run_key
from lib.utils.seeds import seeded_generator


@dataclass(frozen=True)
class AdversarialRecipe:
    """What all trainings of one network share: architecture, optimisation, ball of the attack (eps in pixel units).

    `ema`, `precision`: see `lib.training.train`; `shift`, `flip`: see `lib.utils.augmentation`.
    """

    arch: str
    width: int
    epochs: int
    batch_size: int
    lr: float
    eps: float
    steps: int
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    ema: float = 0.0
    shift: int = 0
    flip: bool = False
    precision: str = "no"


def pgd_images(
    model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], purpose: str, *, eps: float, steps: int
) -> Float[Tensor, "n c h w"]:
    """Return the images after a short PGD on the cross-entropy; `purpose` decides the random start."""
    batch = AdversarialBatch(model, None, *to_model_device(model, x, y))
    options = {"eps": eps, "steps": steps, "alpha": step_size(eps, steps), "start": "uniform"}
    with attack_mode(model, "eval"):
        x_adv = inner_maximisation(batch, "ce", generator=seeded_generator(0, purpose, batch.x.device), **options)
    return x_adv.to(x.device)


def robust_score(
    model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], *, eps: float, steps: int
) -> float:
    """Return the accuracy in [0, 1] after a PGD of `steps` steps: cheap, and the same for all methods.

    It chooses epochs and trials on the validation split; results are measured by `evaluate_robustness`.
    """
    return accuracy(model, pgd_images(model, x, y, "validation", eps=eps, steps=steps), y, batch_size=len(x))


def training_set(
    data: Data, run: TrainingRun, teacher: nn.Module | None, dataset: str, seed: int
) -> tuple[Tensor, ...]:
    """Return images and labels of one run; with `transfer` the teacher's predicted classes label the other images."""
    if not run.labels:
        return data.train.x, data.train.y
    labelled = load_dataset(dataset, n_labels=run.labels, seed=seed).train
    if not run.transfer:
        return labelled.x, labelled.y
    if teacher is None:
        raise ValueError("expected a teacher for a run with transfer, got None")
    known = {image.numpy().tobytes() for image in labelled.x}
    x = data.train.x[torch.tensor([image.numpy().tobytes() not in known for image in data.train.x])]
    return torch.cat([labelled.x, x]), torch.cat([labelled.y, most_likely(predict_logits(teacher, x))])


def train_run(
    run: TrainingRun, teacher: nn.Module | None, data: Data, dataset: str, recipe: AdversarialRecipe, seed: int
) -> dict[str, Any]:
    """Return the `best` weights by validation, the `last`, the best `score` in [0, 1] and loss and score per epoch.

    One seed gives every run of one recipe the same initial weights; fewer images make more epochs, and as many steps.
    The score is `robust_score`, or the accuracy for methods without adversarial examples.
    """
    model = build_classifier(recipe.arch, **data.spec(), width=recipe.width, seed=seed)
    x, y = training_set(data, run, teacher, dataset, seed)
    batches = [-(-len(t) // recipe.batch_size) for t in (data.train.y, y)]
    epochs = max(1, round(run.length * recipe.epochs * batches[0] / batches[1]))
    options: dict[str, Any] = {k: v for k, v in run.trial.items() if k != "lr"}
    loss = robust_loss(run.method, teacher, eps=run.radius * recipe.eps, epochs=epochs, steps=recipe.steps, **options)
    if METHODS[run.method].inner is None:
        score = partial(accuracy, x=data.val.x, y=data.val.y)
    else:
        score = partial(robust_score, x=data.val.x, y=data.val.y, eps=recipe.eps, steps=recipe.steps)
    result = train(
        model,
        loss,
        (x, y),
        epochs=epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr * run.trial.get("lr", 1.0),
        optimizer=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        ema=recipe.ema,
        augment=partial(shift_flip, pad=recipe.shift, flip=recipe.flip) if recipe.shift or recipe.flip else None,
        precision=recipe.precision,
        validate=score,
        seed=seed,
        progress=False,
        name=run.method,
    )
    history = [[row["loss"], row["score"]] for row in result.history]
    return {"best": result.best, "last": result.last, "score": result.best_score, "history": history}


def train_runs(
    groups: Sequence[tuple[dict[str, TrainingRun], AdversarialRecipe]],
    teachers: dict[str, nn.Module],
    data: Data,
    dataset: str,
    seed: int,
    jobs: int = 1,
    desc: str = "trainings",
) -> dict[str, dict]:
    """Return the results of `train_run`, by key, for all runs of all groups, `jobs` at a time; a recipe per group."""
    calls = {
        key: (run, teachers.get(run.teacher), data, dataset, recipe, seed)
        for runs, recipe in groups
        for key, run in runs.items()
    }
    return dict(zip(calls, parallel.parallel_map(train_run, list(calls.values()), jobs, desc), strict=True))


def load_student(weights: dict[str, Tensor], data: Data, recipe: AdversarialRecipe) -> nn.Module:
    """Return a network of the recipe with these weights, in eval mode, on the default device."""
    model = build_classifier(recipe.arch, **data.spec(), width=recipe.width, seed=0)
    model.load_state_dict(weights)
    return model.eval().to(default_device())


def autoattack_set(steps: int, queries: int, targets: int) -> dict[str, dict]:
    """Return AutoAttack's attacks for `robust_accuracy`; the standard is 100 steps, 5000 queries, 9 targets."""
    targeted = {"steps": steps, "targets": targets}
    options = {"apgd-ce": {"steps": steps}, "apgd-t": targeted, "fab-t": targeted, "square": {"queries": queries}}
    return {name: {"name": name} | option for name, option in options.items()}


def apgd_set(steps: int, targets: int) -> dict[str, dict]:
    """Return the two APGD attacks of `autoattack_set`: the small budget, for comparisons other than the main one."""
    return {name: options for name, options in autoattack_set(steps, 1, targets).items() if name.startswith("apgd")}


def evaluate_robustness(
    model: nn.Module, test: Split, seed: int, eps: float, attacks: dict[str, dict]
) -> dict[str, Any]:
    """Return accuracies in [0, 1]: `clean`, `robust` (the worst case per image) and under each of `attacks`.

    `warnings` are those of `robust_accuracy`, such as an attack that is weaker than a simpler one; `outcomes` says
    which images are classified correctly under each attack (`lib.experiments.samples.attack_outcomes`).
    """
    record = robust_accuracy(model, attacks, *to_model_device(model, *test), eps=eps, seed=seed, progress=False)
    out = {"clean": record["clean"]["accuracy"], "robust": record["robust"]["accuracy"], "warnings": record["warnings"]}
    out |= {"attacks": {name: row["accuracy"] for name, row in record["attacks"].items()}}
    return out | {"outcomes": attack_outcomes(record)}


def evaluate_robustness_all(
    models: dict[str, nn.Module],
    test: Split,
    seed: int,
    eps: float,
    attacks: dict,
    jobs: int = 1,
    desc: str = "attacks",
) -> dict[str, dict]:
    """Return the results of `evaluate_robustness` for every model, `jobs` at a time."""
    calls = [(model, test, seed, eps, attacks) for model in models.values()]
    return dict(zip(models, parallel.parallel_map(evaluate_robustness, calls, jobs, desc), strict=True))


def accuracy_curves(
    models: dict[str, nn.Module], test: Split, seed: int, radii: Sequence[float], steps: int, jobs: int = 1
) -> tuple[dict[str, list[float]], dict[str, dict[str, dict]]]:
    """Return, for each radius, the worst-case accuracy in [0, 1] over PGD on the cross-entropy and on the margin.

    And the images behind it: method → condition, such as pgd@0.1 → packed answers.
    """
    attacks = {loss: {"name": "pgd", "loss": loss, "steps": steps} for loss in ("ce", "margin")}
    calls = [(model, test, seed, eps, attacks) for model in models.values() for eps in radii]
    results = iter(parallel.parallel_map(evaluate_robustness, calls, jobs, "radii"))
    by_radius = {name: {ball_condition("pgd", eps): next(results) for eps in radii} for name in models}
    outcomes = {name: {k: r["outcomes"][WORST] for k, r in each.items()} for name, each in by_radius.items()}
    return {name: [r["robust"] for r in each.values()] for name, each in by_radius.items()}, outcomes


def transfer_accuracy(student: nn.Module, teacher: nn.Module, test: Split, *, eps: float, steps: int) -> float:
    """Return the teacher's accuracy on images made against the student: low where adversarial examples transfer.

    Where it is high, the teacher's soft labels on those images say little about the student's errors (Lee et al. 2026
    explain robust saturation by that).
    """
    return accuracy(teacher, pgd_images(student, *test, "transfer", eps=eps, steps=steps), test.y)


def teacher_softness(model: nn.Module, split: Split, *, eps: float, steps: int) -> dict[str, Any]:
    """Return how soft a teacher's labels are: mean entropy (nats) and probability of the class y, clean and attacked.

    `relations`: the class-relation matrix of its predictions on clean images at T = 1 (`class_relations`).
    """
    x_adv = pgd_images(model, *split, "softness", eps=eps, steps=steps)
    out: dict[str, Any] = {"relations": class_relations(predict_logits(model, split.x), split.y, 1.0)}
    for name, x in (("clean", split.x), ("attacked", x_adv)):
        log_p = predict_logits(model, x).double().log_softmax(1)
        out[f"entropy_{name}"] = -(log_p.exp() * log_p).sum(1).mean().item()
        out[f"label_{name}"] = log_p.exp().gather(1, split.y[:, None]).mean().item()
    return out


def robust_distillation_summary(
    methods: dict[str, dict], teachers: dict[str, dict], others: dict[str, dict]
) -> dict[str, float | None]:
    """Return the numbers that claims are about: paired differences of worst-case accuracy within one seed.

    "published" is the published distillation with the best validation score; `few_*` and `transfer_*` compare students
    with the same few labels, without and with the unlabelled images.
    """
    robust = {name: row["robust"] for name, row in methods.items()}
    quick = {name: row["quick"] for name, row in methods.items() if "quick" in row}
    other = {key: row["robust"] for key, row in others.items()}
    best = max((m for m in PUBLISHED if m in methods), key=lambda m: methods[m]["score"])
    out = {f"{m}_minus_{base}": robust[m] - robust[base] for m in OURS for base in ("pgd-at", "trades", "trades-at")}
    out |= {f"published_minus_{base}": robust[best] - robust[base] for base in ("pgd-at", "trades")}
    out |= {"kd_minus_natural": robust["kd"] - robust["natural"]}
    out |= {f"{m}_minus_pgd-at": robust[m] - robust["pgd-at"] for m in ("trades", "trades-at")}
    out["clean_guided_minus_trades"] = methods["guided"]["clean"] - methods["trades"]["clean"]
    out["teacher_minus_trades"] = teachers[MAIN_TEACHER]["robust"] - quick["trades"]
    if (natural := run_key("teacher", "rslad", "natural")) in other:
        out["natural_rslad_minus_pgd-at"] = other[natural] - quick["pgd-at"]
        out["natural_kd_minus_natural"] = other[run_key("teacher", "kd", "natural")] - quick["natural"]
    if run_key("few", "trades") in other:
        few = {m: other[run_key("few", m)] for m in FEW_LABEL_METHODS}
        transfer = {m: other[run_key("transfer", m)] for m in FEW_LABEL_METHODS if m != "pgd-at"}
        out |= {f"few_{m}_minus_trades": few[m] - few["trades"] for m in OURS}
        out |= {f"transfer_{m}_minus_few_trades": transfer[m] - few["trades"] for m in OURS}
        out["transfer_guided_minus_trades-at"] = transfer["guided"] - transfer["trades-at"]
    return out
