"""Experiment 3, robust distillation: what the notebook computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from lib.models import accuracy, build_classifier, predict_logits
from lib.training import shift_flip, train
from lib.utils import parallel
from lib.utils.device import default_device, to_model_device
from lib.utils.random_state import attack_mode
from lib.utils.seeds import seeded_generator

PUBLISHED = ("ard", "rslad", "iad", "adaad", "igdm")
OURS = ("teach", "guided")
COMPARED = {"natural", "kd", "pgd-at", "trades", "trades-at", "ard", "rslad", "teach", "guided"}
TEACHER_SWEEP = ("kd", "rslad", "guided")  # taught by every other teacher
FEW_LABEL_METHODS = ("pgd-at", "trades", "trades-at", "teach", "guided")  # compared when labels are few
MAIN_TEACHER = "trades"  # the teacher of all methods but those of the teacher sweep

# The trials of each method, as many for the baselines as for the others: options of the loss, or `lr`, a factor on the
# learning rate, where it has none. The validation split chooses.
TRIALS: dict[str, list[dict[str, float]]] = {
    "natural": [{"lr": 1.0}, {"lr": 0.5}, {"lr": 0.25}],
    "pgd-at": [{"lr": 1.0}, {"lr": 0.5}, {"lr": 2.0}],
    "trades": [{"beta": 6.0}, {"beta": 3.0}, {"beta": 9.0}],
    "trades-at": [{"lam": 0.1}, {"lam": 0.05}, {"lam": 0.2}],
    "mart": [{"lam": 3.0, "lr": 0.5}, {"lam": 1.0, "lr": 0.5}, {"lam": 6.0, "lr": 0.25}],
    "kd": [{"tau": 4.0}, {"tau": 2.0}, {"tau": 8.0}],
    "ard": [{"tau": 1.0}, {"tau": 4.0}, {"tau": 2.0}],
    "rslad": [{"clean": 1 / 6}, {"clean": 1 / 3}, {"clean": 1 / 2}],
    "iad": [{"beta": 0.1}, {"beta": 0.5}, {"beta": 1.0}],
    "adaad": [{"lr": 1.0}, {"lr": 0.5}, {"lr": 2.0}],
    "igdm": [{"weight": 1.0}, {"weight": 5.0}, {"weight": 20.0}],
    "teach": [{"beta": 6.0}, {"beta": 3.0}, {"beta": 9.0}],
    "guided": [{"lam": 0.1}, {"lam": 0.05}, {"lam": 0.2}],
}


@dataclass(frozen=True)
class TrainingRun:
    """One training: what is learnt, from whom, on which images.

    `method`: one of `lib.distillation.adversarial.METHODS`; `teacher`: its name, "" for none; `trial`: options of the loss and `lr`, as
    in `TRIALS`; `radius`: of the training attack, as a share of eps; `length`: of the training, as a share of the
    recipe's epochs; `labels`: how many images are labelled (0: all); `transfer`: the others are there too, with the
    classes that the teacher answers in place of labels.
    """

    method: str
    teacher: str = ""
    trial: dict[str, float] = field(default_factory=dict)
    radius: float = 1.0
    length: float = 1.0
    labels: int = 0
    transfer: bool = False


@dataclass(frozen=True)
class AdversarialRecipe:
    """What all trainings of one network share: architecture, optimisation, ball of the attack (eps in pixel units).

    `ema`, `shift`, `flip`, `precision`: see `lib.training`; weights are averaged and images shifted for all or for none.
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


def robust_score(
    model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], *, eps: float, steps: int
) -> float:
    """Returns the share of images in [0, 1] that are right after a PGD of `steps` steps: cheap, and the same for all.

    It chooses epochs and trials on the validation split; results are measured by `evaluate_robustness`.
    """
    batch = AdversarialBatch(model, None, *to_model_device(model, x, y))
    with attack_mode(model, "eval"):
        options = {"eps": eps, "steps": steps, "alpha": step_size(eps, steps), "start": "uniform"}
        x_adv = inner_maximisation(batch, "ce", generator=seeded_generator(0, "validation", batch.x.device), **options)
        return accuracy(model, x_adv, batch.y, batch_size=len(x))


def training_set(
    data: Data, run: TrainingRun, teacher: nn.Module | None, dataset: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns images and labels of one run; `transfer` gives the unlabelled images the teacher's classes."""
    if not run.labels:
        return tuple(data.train)
    some = load_dataset(dataset, n_labels=run.labels, seed=seed).train
    if not run.transfer:
        return tuple(some)
    known = {image.numpy().tobytes() for image in some.x}
    rest = torch.tensor([image.numpy().tobytes() not in known for image in data.train.x])
    x = data.train.x[rest]
    return torch.cat([some.x, x]), torch.cat([some.y, predict_logits(teacher, x).argmax(1)])


def train_run(
    run: TrainingRun, teacher: nn.Module | None, data: Data, dataset: str, recipe: AdversarialRecipe, seed: int
) -> dict[str, Any]:
    """Returns the `best` weights by validation, the `last`, their epochs' curves and the best `score` in [0, 1].

    One seed gives every run of one recipe the same initial weights; with fewer images the epochs grow, so that the
    number of steps is the same. The score is `robust_score`, without adversarial examples in training the accuracy.
    """
    model = build_classifier(recipe.arch, **data.spec(), width=recipe.width, seed=seed)
    x, y = training_set(data, run, teacher, dataset, seed)
    batches = [-(-len(t) // recipe.batch_size) for t in (data.train.y, y)]
    epochs = max(1, round(run.length * recipe.epochs * batches[0] / batches[1]))
    options = {k: v for k, v in run.trial.items() if k != "lr"}
    loss = robust_loss(run.method, teacher, eps=run.radius * recipe.eps, epochs=epochs, steps=recipe.steps, **options)
    if METHODS[run.method].inner is None:
        score = partial(accuracy, x=data.val.x, y=data.val.y)
    else:
        score = partial(robust_score, x=data.val.x, y=data.val.y, eps=recipe.eps, steps=recipe.steps)
    found = train(
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
    history = [[row["loss"], row["score"]] for row in found.history]
    return {"best": found.best, "last": found.last, "score": found.best_score, "history": history}


def train_runs(
    groups: Sequence[tuple[dict[str, TrainingRun], AdversarialRecipe]],
    teachers: dict[str, nn.Module],
    data: Data,
    dataset: str,
    seed: int,
    jobs: int = 1,
    desc: str = "trainings",
) -> dict[str, dict]:
    """Returns what `train_run` returns, by name, for all runs of all groups, `jobs` at a time; a recipe per group."""
    named = [(name, run, recipe) for runs, recipe in groups for name, run in runs.items()]
    work = [(run, teachers.get(run.teacher), data, dataset, recipe, seed) for _, run, recipe in named]
    return dict(zip([name for name, *_ in named], parallel.parallel_map(train_run, work, jobs, desc), strict=True))


def load_student(weights: dict[str, Tensor], data: Data, recipe: AdversarialRecipe) -> nn.Module:
    """Returns a network of the recipe with these weights, in eval mode, where networks are asked."""
    model = build_classifier(recipe.arch, **data.spec(), width=recipe.width, seed=0)
    model.load_state_dict(weights)
    return model.eval().to(default_device())


def teacher_runs(others: Sequence[str]) -> dict[str, TrainingRun]:
    """Returns `MAIN_TEACHER`, the teacher of all methods, and `others` of: natural, weak and middle (TRADES), pgd-at.

    The weak and the middle one learn at a third and two thirds of the radius, for as large a share of the epochs.
    Raises ValueError for another name.
    """
    weak, middle = (TrainingRun("trades", radius=share, length=share) for share in (1 / 3, 2 / 3))
    runs = {
        "natural": TrainingRun("natural"),
        "weak": weak,
        "middle": middle,
        MAIN_TEACHER: TrainingRun("trades"),
        "pgd-at": TrainingRun("pgd-at"),
    }
    if unknown := sorted(set(others) - set(runs)):
        raise ValueError(f"teachers has {', '.join(unknown)}: choose among {', '.join(runs)}")
    return {name: run for name, run in runs.items() if name in (*others, MAIN_TEACHER)}


def grid_runs(trials: int, methods: Sequence[str] = ()) -> dict[str, TrainingRun]:
    """Returns the first `trials` trials of every method of `TRIALS`, or of `methods`, called `<method>/<number>`.

    Raises ValueError for an unknown method and when one is missing that others are compared with.
    """
    methods = list(methods) or list(TRIALS)
    if unknown := sorted(set(methods) - set(TRIALS)):
        raise ValueError(f"methods has {', '.join(unknown)}: choose among {', '.join(TRIALS)}")
    if missing := sorted(COMPARED - set(methods)):
        raise ValueError(f"methods lacks {', '.join(missing)}: others are compared with these")
    if not 1 <= trials <= 3:
        raise ValueError(f"trials is {trials}: each method has 1 to 3")
    named = {name: MAIN_TEACHER if METHODS[name].teacher else "" for name in methods}
    return {
        f"{m}/{i}": TrainingRun(m, t, trial) for m, t in named.items() for i, trial in enumerate(TRIALS[m][:trials])
    }


def choose_trials(found: dict[str, dict], runs: dict[str, TrainingRun]) -> dict[str, str]:
    """Returns for each method the name of its run with the best validation score, the first of equals."""
    chosen: dict[str, str] = {}
    for name, run in runs.items():
        best = chosen.get(run.method)
        if best is None or found[name]["score"] > found[best]["score"]:
            chosen[run.method] = name
    return chosen


def ablation_runs(
    chosen: dict[str, TrainingRun], teachers: Sequence[str], labels: int, temperatures: Sequence[float]
) -> dict[str, TrainingRun]:
    """Returns the runs that ask when it fails, with the trials that were chosen on all labels.

    `teacher/<method>/<teacher>`: students of the other teachers; `tau/<τ>`: ARD at each temperature; `few/<method>`:
    with so many labels only (0: none of these); `transfer/<method>`: with the other images too, which the teacher
    labels; TRADES' variants without a teacher are the controls that get its classes and nothing else of it.
    """
    others = [name for name in teachers if name not in (MAIN_TEACHER, "pgd-at")]
    runs = {f"teacher/{m}/{t}": replace(chosen[m], teacher=t) for m in TEACHER_SWEEP for t in others}
    runs |= {f"tau/{tau:g}": replace(chosen["ard"], trial={"tau": float(tau)}) for tau in temperatures}
    if labels:
        runs |= {f"few/{m}": replace(chosen[m], labels=labels) for m in FEW_LABEL_METHODS}
        with_rest = {
            m: replace(chosen[m], teacher=MAIN_TEACHER, labels=labels, transfer=True)
            for m in FEW_LABEL_METHODS
            if m != "pgd-at"
        }
        runs |= {f"transfer/{m}": run for m, run in with_rest.items()}
    return runs


def autoattack_set(steps: int, queries: int, targets: int) -> dict[str, dict]:
    """Returns the attacks of AutoAttack for `lib.evaluation.robust_accuracy`, official with 100 steps, 5000 queries and 9 targets."""
    some = {"steps": steps, "targets": targets}
    options = {"apgd-ce": {"steps": steps}, "apgd-t": some, "fab-t": some, "square": {"queries": queries}}
    return {name: {"name": name} | chosen for name, chosen in options.items()}


def apgd_set(steps: int, targets: int) -> dict[str, dict]:
    """Returns the two APGDs of `autoattack_set`, for the comparisons beside the main one."""
    return {name: options for name, options in autoattack_set(steps, 1, targets).items() if name.startswith("apgd")}


def evaluate_robustness(
    model: nn.Module, test: Split, seed: int, eps: float, attacks: dict[str, dict]
) -> dict[str, Any]:
    """Returns accuracies in [0, 1]: `clean`, `robust` (the worst case per image), and what each attack leaves.

    `warnings` are those of `lib.evaluation.robust_accuracy`: an attack that a simpler one beats is named there.
    """
    record = robust_accuracy(model, attacks, *to_model_device(model, *test), eps=eps, seed=seed, progress=False)
    out = {"clean": record["clean"]["accuracy"], "robust": record["robust"]["accuracy"], "warnings": record["warnings"]}
    return out | {"attacks": {name: row["accuracy"] for name, row in record["attacks"].items()}}


def evaluate_robustness_all(
    models: dict[str, nn.Module],
    test: Split,
    seed: int,
    eps: float,
    attacks: dict,
    jobs: int = 1,
    desc: str = "attacks",
) -> dict[str, dict]:
    """Returns what `evaluate_robustness` returns, for every model, `jobs` at a time."""
    work = [(model, test, seed, eps, attacks) for model in models.values()]
    return dict(zip(models, parallel.parallel_map(evaluate_robustness, work, jobs, desc), strict=True))


def accuracy_curves(
    models: dict[str, nn.Module], test: Split, seed: int, radii: Sequence[float], steps: int, jobs: int = 1
) -> dict[str, list[float]]:
    """Returns the worst-case accuracy in [0, 1] over PGD on the cross-entropy and on the margin, for each radius."""
    attacks = {loss: {"name": "pgd", "loss": loss, "steps": steps} for loss in ("ce", "margin")}
    work = [(model, test, seed, eps, attacks) for model in models.values() for eps in radii]
    found = iter(parallel.parallel_map(evaluate_robustness, work, jobs, "radii"))
    return {name: [next(found)["robust"] for _ in radii] for name in models}


def transfer_accuracy(student: nn.Module, teacher: nn.Module, test: Split, *, eps: float, steps: int) -> float:
    """Returns the teacher's accuracy on images made against the student: low where its weaknesses are the same.

    Where the teacher withstands them, its answers say little about the student's (Lee et al. 2026 blame robust
    saturation on that).
    """
    batch = AdversarialBatch(student, None, *to_model_device(student, *test))
    options = {"eps": eps, "steps": steps, "alpha": step_size(eps, steps), "start": "uniform"}
    with attack_mode(student, "eval"):
        x_adv = inner_maximisation(batch, "ce", generator=seeded_generator(0, "transfer", batch.x.device), **options)
    return accuracy(teacher, x_adv, batch.y)


def teacher_softness(model: nn.Module, split: Split, *, eps: float, steps: int) -> dict[str, Any]:
    """Returns how soft a teacher's answers are: mean entropy (nats) and mass on the label, clean and under attack.

    `relations`: the class-relation matrix of its clean answers at T = 1 (see `lib.experiments.kd.class_relations`).
    """
    options = {"eps": eps, "steps": steps, "alpha": step_size(eps, steps), "start": "uniform"}
    with attack_mode(model, "eval"):
        batch = AdversarialBatch(model, None, *to_model_device(model, *split))
        x_adv = inner_maximisation(batch, "ce", generator=seeded_generator(0, "softness", batch.x.device), **options)
    out: dict[str, Any] = {"relations": class_relations(predict_logits(model, split.x), split.y, 1.0)}
    for name, x in (("clean", split.x), ("attacked", x_adv)):
        log_p = predict_logits(model, x).double().log_softmax(1)
        out[f"entropy_{name}"] = -(log_p.exp() * log_p).sum(1).mean().item()
        out[f"label_{name}"] = log_p.exp().gather(1, split.y[:, None]).mean().item()
    return out


def robust_distillation_summary(
    methods: dict[str, dict], teachers: dict[str, dict], others: dict[str, dict]
) -> dict[str, float | None]:
    """Returns the numbers that claims are about: paired differences of worst-case accuracy within one seed.

    `best_published` is the published distillation with the best validation score; `few_gain` compares students that
    have the same few labels, with and without the teacher and the unlabelled images.
    """
    robust = {name: row["robust"] for name, row in methods.items()}
    best = max((m for m in PUBLISHED if m in methods), key=lambda m: methods[m]["score"])
    out = {
        f"{name}_minus_{base}": robust[name] - robust[base]
        for name in OURS
        for base in ("pgd-at", "trades", "trades-at")
    }
    out |= {f"published_minus_{base}": robust[best] - robust[base] for base in ("pgd-at", "trades")}
    out |= {"kd_minus_natural": robust["kd"] - robust["natural"]}
    out |= {f"{name}_minus_pgd-at": robust[name] - robust["pgd-at"] for name in ("trades", "trades-at")}
    out["clean_guided_minus_trades"] = methods["guided"]["clean"] - methods["trades"]["clean"]
    out["teacher_minus_trades"] = teachers[MAIN_TEACHER]["robust"] - methods["trades"]["quick"]
    if "teacher/rslad/natural" in others:
        out["natural_rslad_minus_pgd-at"] = others["teacher/rslad/natural"]["robust"] - methods["pgd-at"]["quick"]
        out["natural_kd_minus_natural"] = others["teacher/kd/natural"]["robust"] - methods["natural"]["quick"]
    if "few/trades" in others:
        few = {m: others[f"few/{m}"]["robust"] for m in FEW_LABEL_METHODS}
        rest = {m: others[f"transfer/{m}"]["robust"] for m in FEW_LABEL_METHODS if m != "pgd-at"}
        out |= {f"few_{m}_minus_trades": few[m] - few["trades"] for m in OURS}
        out |= {f"transfer_{m}_minus_few_trades": rest[m] - few["trades"] for m in OURS}
        out["transfer_guided_minus_trades-at"] = rest["guided"] - rest["trades-at"]
    return out
