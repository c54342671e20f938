"""Experiment 5, distilled DiffPure: its defences, and what one matched set of attacks leaves of each.

A defence is a purifier by name (`lib.utils.specs`) before one of the run's classifiers, or a classifier alone. The
folder of one seed holds all networks: experiment 4's, and every student of `lib.experiments.diffpure_students`. What is
attacked is not clamped: a cut pixel has no gradient, and no defence may win by that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lib import purify
from lib.data import Data, Split
from lib.evaluation import matched_attacks
from lib.evaluation.adversarial_images import AttackedImages, adversarial_images
from lib.evaluation.attack_plan import EvaluationSettings, attack_plan
from lib.evaluation.matched_attacks import EXACT, LAST, AttackEffort, MeasuringDraws, WorstImages
from lib.evaluation.outcomes import GRAPH_LIMIT
from lib.experiments import diffpure_students, kd, robust_distillation
from lib.experiments.diffpure_students import NATURAL, TRADES
from lib.experiments.robust_runs import TrainingRun
from lib.purify import IdentityPurifier, PurifiedClassifier, Purifier
from lib.utils import parallel
from lib.utils.checkpoints import load_checkpoint, save_checkpoint
from lib.utils.device import default_device
from lib.utils.draws import MATCHED, NO_ATTACK, OUTSIDE, TRANSFERRED, pack_draws
from lib.utils.seeds import derive_seed
from lib.utils.specs import PurifierSpec

DENOISER = "ddim-1"  # the undistilled network in one step: the baseline
NO_PURIFIER = "none-0"
COARSE_STEPS = 5  # in which attacks climb a purifier of more than twice as many, but for the last climb


class Defence(NamedTuple):
    """A purifier before a classifier: `NO_PURIFIER` for a classifier alone."""

    purifier: str
    classifier: str = NATURAL

    def __str__(self) -> str:
        if self.purifier == NO_PURIFIER:
            return "none" if self.classifier == NATURAL else self.classifier
        return self.purifier if self.classifier == NATURAL else f"{self.purifier} + {self.classifier}"


def train_defended(data: Data, seed: int, width: int, **recipe: Any) -> nn.Module:
    """Return the ordinary classifier that purifiers defend, frozen; it is experiment 4's."""
    options = {"members": 1, "shift": 0, "arch": "cnn", "width": width}
    return kd.train_teachers(data, seed, **options, **recipe)[0].eval().requires_grad_(False)


def train_robust(
    data: Data, dataset: str, seed: int, method: str, recipe: robust_distillation.AdversarialRecipe
) -> nn.Module:
    """Return a classifier by adversarial training, frozen: the weights of its best validation epoch."""
    fit = robust_distillation.train_run(TrainingRun(method), None, data, dataset, recipe, seed)
    return robust_distillation.load_student(fit["best"], data, recipe).cpu().requires_grad_(False)


def train_classifiers(
    data: Data,
    dataset: str,
    seed: int,
    natural: Mapping[str, Any],
    robust: Mapping[str, tuple[str, robust_distillation.AdversarialRecipe]],
    jobs: int,
) -> dict[str, nn.Module]:
    """Return the run's classifiers: the ordinary one, and each of `robust`, name → method and recipe."""
    tasks = [(data, dataset, seed, method, recipe) for method, recipe in robust.values()]
    trained = parallel.parallel_map(train_robust, tasks, jobs, "adversarial training")
    return {NATURAL: train_defended(data, seed, **natural)} | dict(zip(robust, trained, strict=True))


def build_purifier(models: Path, name: str, **options: Any) -> Purifier | IdentityPurifier:
    """Return the purifier `name` with the networks in `models`, on the device of experiments."""
    purifier = IdentityPurifier() if name == NO_PURIFIER else purify.load_purifier(models, name, **options)
    return purifier.to(default_device())


def build_defence(
    models: Path, name: str, classifier: nn.Module, fixed: int | None = None, pixels: int = 0
) -> PurifiedClassifier:
    """Return a classifier behind the purifier `name`, on the device of experiments, without clamping.

    `fixed`: a seed that makes its noise the same in every call: then it is a function, which
    `lib.evaluation.sanity_checks` can examine; `pixels`: of the images that are attacked; with many,
    and many steps, gradients take the memory of one step.
    """
    options = {} if name == NO_PURIFIER else {"clamp": False, "save_memory": pixels * step_count(name) > GRAPH_LIMIT}
    return PurifiedClassifier(build_purifier(models, name, **options), classifier, fixed=fixed).to(default_device())


def step_count(name: str) -> int:
    """Return the steps in a purifier's name."""
    return PurifierSpec.parse(name).steps


def coarse_name(name: str) -> str | None:
    """Return the same purifier in `COARSE_STEPS` steps, None where it has not twice as many."""
    spec = PurifierSpec.parse(name)
    return str(spec._replace(steps=COARSE_STEPS)) if spec.steps > 2 * COARSE_STEPS else None


def claimed_students(steps: int) -> list[str]:
    """Return the students that claims are about: of clean pairs and of the adaptive δ, in one step and in `steps`."""
    return [f"{kind}-{n}" for kind in ("clean", "adaptive") for n in sorted({1, steps})]


def defence_plan(teacher: str, steps: int, students: Sequence[str], classifiers: Sequence[str]) -> list[Defence]:
    """Return all defences that meet the matched set.

    Args:
        teacher: "sde-<steps>" or "ddpm-<steps>".
        steps: of the second student that claims are about.
        students: variants that are evaluated in one step beside `claimed_students`.
        classifiers: adversarially trained ones; with TRADES among them it also stands behind students.

    Returns:
        No purifier, the teacher, its ODE in as many steps, the undistilled network, students, classifiers alone.

    Raises:
        ValueError: for other teachers, and steps below 1.
    """
    if steps < 1 or not teacher.startswith(("sde-", "ddpm-")):
        expected = "expected steps of at least 1 and a teacher sde-<steps> or ddpm-<steps>"
        raise ValueError(f"{expected}, got steps {steps}, teacher {teacher!r}")
    ahead = [name for name in students if name.startswith(diffpure_students.BEFORE_TRADES)]
    names = [NO_PURIFIER, teacher, f"ddim-{step_count(teacher)}", DENOISER, "ddim-4", *claimed_students(steps)]
    names += [f"{name}-1" for name in students if name not in ahead]
    plan = [Defence(name) for name in dict.fromkeys(names)] + [Defence(NO_PURIFIER, name) for name in classifiers]
    if TRADES in classifiers:
        plan += [Defence(f"{name}-1", TRADES) for name in ("adaptive", *ahead)]
    return plan


def network_evaluations(defence: Defence) -> float:
    """Return roughly what one gradient of a defence costs: what is run first when work is shared."""
    return 1 + step_count(defence.purifier)


def craft_images(
    model: PurifiedClassifier,
    entries: Mapping[str, Any],
    sample: Sequence[torch.Tensor],
    at: EvaluationSettings,
) -> dict[str, AttackedImages]:
    """Return the images of attacks on one defence by label, all images of the sample as one batch."""
    x, y = sample
    rows = [torch.arange(len(x), device=x.device)]
    return adversarial_images(model, attack_plan(entries, at), x, y, rows, at, progress=False)


def attack_defence(
    defence: Defence,
    models: Path,
    classifiers: Mapping[str, nn.Module],
    sample: Split,
    eps: float,
    effort: AttackEffort,
    seed: int,
) -> dict[str, Any]:
    """Return the images of the matched set against one defence by label, and how many got no gradient by label.

    They are taken from `models`/evaluations where an earlier call of the same run saved them.
    """
    path = models / "evaluations" / f"attacks {defence}.pt"
    if saved := load_checkpoint(path):
        return saved
    x, y = (t.to(default_device()) for t in sample)
    classifier = classifiers[defence.classifier]
    model, coarse = build_defence(models, defence.purifier, classifier, pixels=x.numel()), None
    if name := coarse_name(defence.purifier):
        coarse = build_defence(models, name, classifier, pixels=x.numel())
    at = EvaluationSettings(eps=eps, seed=seed, batch_size=len(x))
    entries = matched_attacks.matched_attacks(model, effort, seed, coarse)
    entries |= {OUTSIDE: matched_attacks.outside_attack(model, effort, eps, coarse)}
    crafted = craft_images(model, entries, (x, y), at)
    result: dict[str, Any] = {"images": {label: attacked.images.cpu() for label, attacked in crafted.items()}}
    result["no_gradient"] = {label: attacked.no_gradient for label, attacked in crafted.items() if attacked.no_gradient}
    result["outside"] = result["images"].pop(OUTSIDE)
    save_checkpoint(path, result)
    return result


def worst_of_set(
    model: PurifiedClassifier,
    long: bool,
    candidates: Mapping[str, torch.Tensor],
    sample: Sequence[torch.Tensor],
    at: EvaluationSettings,
    effort: AttackEffort,
    draws: MeasuringDraws,
) -> tuple[WorstImages, WorstImages]:
    """Return the worst candidates, and the worse of each and of what the last climb from it makes.

    `long`: whether the purifier has many steps.
    """
    chosen = matched_attacks.worst_images(model, candidates, sample[1], draws, at.seed)
    entry = matched_attacks.last_climb(model, chosen.images, effort, long)
    climbed = craft_images(model, {LAST: entry}, sample, at)[LAST].images
    both = {"chosen": chosen.images, LAST: climbed}
    return chosen, matched_attacks.worst_images(model, both, sample[1], draws, derive_seed(at.seed, LAST))


def score_defence(
    defence: Defence,
    models: Path,
    classifiers: Mapping[str, nn.Module],
    sample: Split,
    candidates: Mapping[str, torch.Tensor],
    outside: torch.Tensor,
    eps: float,
    effort: AttackEffort,
    draws: MeasuringDraws,
    seed: int,
) -> dict[str, Any]:
    """Return one defence's draws on clean images, on every candidate and on the worst, packed, and what was worst.

    `outside`: the images outside the ball, which are measured apart.
    """
    path = models / "evaluations" / f"scores {defence}.pt"
    if saved := load_checkpoint(path):
        return saved
    x, y = (t.to(default_device()) for t in sample)
    model = build_defence(models, defence.purifier, classifiers[defence.classifier], pixels=x.numel())
    moved = {label: images.to(default_device()) for label, images in candidates.items()}
    at = EvaluationSettings(eps=eps, seed=seed, batch_size=len(x))
    chosen, worst = worst_of_set(model, coarse_name(defence.purifier) is not None, moved, (x, y), at, effort, draws)
    measured = {NO_ATTACK: x, MATCHED: worst.images, OUTSIDE: outside.to(default_device())}
    correct = {
        k: matched_attacks.correct_draws(model, images, y, draws.fresh, seed, k)[0] for k, images in measured.items()
    }
    result: dict[str, Any] = {"correct": {label: pack_draws(bits) for label, bits in (correct | chosen.draws).items()}}
    result |= {"chosen": matched_attacks.count_labels(chosen.labels), "last_climb": worst.labels.count(LAST)}
    result["random"] = model.random
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    result["multiply_adds"] = counter.get_total_flops() // 2
    save_checkpoint(path, result)
    return result


def run_matched_set(
    plan: Sequence[Defence],
    models: Path,
    classifiers: Mapping[str, nn.Module],
    sample: Split,
    *,
    eps: float,
    effort: AttackEffort,
    draws: MeasuringDraws,
    seed: int,
    jobs: int = 1,
) -> dict[str, dict[str, Any]]:
    """Attack all defences, score each on its own images and on those made for the others; return results by name.

    The most expensive run first, `jobs` at a time. The classifiers are those of the run, see
    `lib.experiments.diffpure_students.restore_classifiers`.
    """
    diffpure_students.restore_classifiers(models, classifiers)
    order = sorted(plan, key=lambda defence: -network_evaluations(defence))
    common = (models, classifiers, sample)
    tasks = [(defence, *common, eps, effort, seed) for defence in order]
    attacked = dict(zip(order, parallel.parallel_map(attack_defence, tasks, jobs, "attacks"), strict=True))
    others = {f"{TRANSFERRED}{d}": crafted["images"][EXACT[0]] for d, crafted in attacked.items()}
    tasks = []
    for defence in order:
        own, mine = attacked[defence]["images"], f"{TRANSFERRED}{defence}"
        candidates = own | {label: images for label, images in others.items() if label != mine}
        tasks.append((defence, *common, candidates, attacked[defence]["outside"], eps, effort, draws, seed))
    scored = dict(zip(order, parallel.parallel_map(score_defence, tasks, jobs, "scores"), strict=True))
    return {str(d): scored[d] | {"no_gradient": attacked[d]["no_gradient"]} for d in plan}
