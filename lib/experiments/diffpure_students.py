"""Experiment 5's students: which variants there are, how each is trained from experiment 4's networks, where they are.

A student is named by its variant of `lib.distillation.robust_consistency` (`lib.utils.specs`). "noskip-" before it: it
begins as a consistency student without c_skip, trained as long as the one with it; "@" and a number or a distance after
it: with that weight of the constraint or that distance in the loss, where others have the notebook's. "undistilled-"
before it: it begins as the diffusion network itself; "trades-": its δ is found through an adversarially trained
classifier; "label" and "label-n<percent>": the constraint has a label term, with that share of the noise
(`lib.distillation.label_purifier`).
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lib.data import Data
from lib.diffusion.network import load_network
from lib.diffusion.schedule import to_pixel_range
from lib.distillation import robust_consistency
from lib.distillation.consistency import DISTANCES
from lib.distillation.few_step import (
    FewStepRecipe,
    load_config,
    load_consistency_student,
    load_history,
    publish,
    save_config,
    scalings_of,
)
from lib.distillation.few_step_training import has_network, train_consistency, train_diffusion_model, train_once
from lib.distillation.label_purifier import LabelPurifierRecipe, train_label_purifier
from lib.distillation.robust_consistency import RobustConsistencyRecipe
from lib.utils import parallel
from lib.utils.artifacts import SCRATCH, results_dir
from lib.utils.checkpoints import load_checkpoint, save_checkpoint
from lib.utils.code_hash import fingerprint
from lib.utils.content_hash import content_hash
from lib.utils.device import default_device
from lib.utils.files import ROOT, part_path
from lib.utils.specs import NOSKIP, StudentSpec, label_noise

SMALL_RECIPE = FewStepRecipe(  # where experiment 4 left no networks
    channels=(8, 16),
    attention=False,
    target="v",
    t=99.0,
    t_max=149,
    batch_size=128,
    teacher_ema=0.99,
    student_ema=0.9,
    teacher_epochs=25,
    teacher_lr=4e-3,
    first=64,
    weight="capped",
    round_epochs=16,
    round_lr=2e-3,
    cd_epochs=15,
    cd_lr=2e-3,
    levels=(4, 8),
    solver="heun",
    cd_weight="uniform",
    measure="huber",
    decay=0.0,
    skip=True,
)
NATURAL, TRADES = "natural", "trades"  # classifiers: ordinary training, and adversarial training by TRADES
FROM_UNDISTILLED, BEFORE_TRADES = "undistilled-", "trades-"  # before a variant's name
MAIN_STUDENTS = ("cd", "pd", "clean", "adaptive")  # experiment 4's students, and those that claims are about


def few_step_networks(profile: str, dataset: str, data: Data, seed: int) -> Path:
    """Return the folder of experiment 4's networks of this seed, which the pipeline's stage `diff` makes.

    For the profile `SCRATCH`, of a notebook run by hand, those of the profile `dataset` do as well; where it has none,
    small ones are trained first and saved, which takes minutes. Raises FileNotFoundError, which names the stage to run,
    for any other profile without networks of its own.
    """
    name = f"diff-s{seed}"
    for place in (profile, dataset) if profile == SCRATCH else (profile,):
        if (results_dir(place, "models") / name / "recipe.json").exists():
            return results_dir(place, "models") / name
    if profile != SCRATCH:
        folder = (results_dir(profile, "models") / name).relative_to(ROOT)
        raise FileNotFoundError(
            f"expected experiment 4's networks in {folder}, got none: run `dvc repro diff@{profile}-{seed}` first"
        )
    work = results_dir(profile, "checkpoints") / f"{name}-small-{fingerprint(SMALL_RECIPE, content_hash(data))}"
    checkpoint = work / "teacher.pt"
    train_once(work / "teacher", lambda: train_diffusion_model(data, SMALL_RECIPE, seed, "teacher", checkpoint))
    teacher = load_network(work / "teacher")
    train_once(work / "cd", lambda: train_consistency(teacher, data, SMALL_RECIPE, seed, work / "cd.pt"))
    save_config(work, SMALL_RECIPE, scalings_of(data, SMALL_RECIPE))
    return publish(work, results_dir(profile, "models") / name)


def diffpure_work_dir(profile: str, source: Path, seed: int, *settings: Any) -> Path:
    """Return the folder of one run's networks: copies of experiment 4's, to which the variants are added.

    It belongs to these settings, networks and code: an interrupted run finds there what it had.
    """
    nets = sorted(source.glob("*/*.safetensors"))
    key = fingerprint(*settings, *(path.read_bytes() for path in nets))
    work = results_dir(profile, "checkpoints") / f"dp-s{seed}-{key}"
    if not (work / "recipe.json").exists():
        part = part_path(work)
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("sampler", "*.part"))
        shutil.rmtree(work, ignore_errors=True)  # of a version that copied in place
        part.replace(work)
    return work


def restore_classifiers(work: Path, classifiers: Mapping[str, nn.Module]) -> None:
    """Save the weights of a run's classifiers in `work`, or load those that are there, in place.

    What an interrupted run trained and attacked is about its own classifiers, and a GPU trains no two alike.
    """
    for name, net in classifiers.items():
        path = work / "evaluations" / f"classifier {name}.pt"
        if weights := load_checkpoint(path):
            net.load_state_dict(weights)
        else:
            save_checkpoint(path, net.state_dict())


class StudentPlan(NamedTuple):
    """How one student is trained: the network it begins as, the classifier of its δ, and the recipe."""

    begin: str  # "cd", `NOSKIP`, or "teacher" for the undistilled network
    classifier: str  # a key of the run's classifiers
    recipe: RobustConsistencyRecipe | LabelPurifierRecipe


def plan_student(name: str, robust: Mapping[str, Any], label: Mapping[str, Any]) -> StudentPlan:
    """Return the plan of the student `name`; ValueError for an unknown variant or distance.

    `robust`, `label`: the fields of `RobustConsistencyRecipe` and of `LabelPurifierRecipe` that the name leaves open.
    """
    spec = StudentSpec.parse(name)
    distance = spec.distance or robust["measure"]
    if distance not in DISTANCES:
        raise ValueError(f"{name!r} has the distance {distance!r}: choose one of {', '.join(DISTANCES)}")
    variant, begin, classifier = spec.variant, "cd" if spec.skip else NOSKIP, NATURAL
    if variant.startswith(FROM_UNDISTILLED):
        variant, begin = variant.removeprefix(FROM_UNDISTILLED), "teacher"
    elif variant.startswith(BEFORE_TRADES):
        variant, classifier = variant.removeprefix(BEFORE_TRADES), TRADES
    if (noise := label_noise(variant)) is not None:
        return StudentPlan(begin, classifier, LabelPurifierRecipe(noise=noise, **label))
    weight = robust["weight"] if spec.weight is None else spec.weight
    own = dict(robust) | {"weight": weight, "measure": distance}
    return StudentPlan(begin, classifier, RobustConsistencyRecipe(variant, **own))


def plan_students(
    variants: Sequence[str], weights: Sequence[float], robust: Mapping[str, Any], label: Mapping[str, Any]
) -> dict[str, StudentPlan]:
    """Return the students to train by name; `weights`: more of them for "adaptive", see `plan_student`.

    Raises ValueError when one is missing that claims are about, and for a weight given twice.
    """
    if missing := {"clean", "adaptive"} - set(variants):
        raise ValueError(f"variants lacks {', '.join(sorted(missing))}: claims compare these two")
    if len({robust["weight"], *weights}) != 1 + len(weights):
        weight = robust["weight"]
        raise ValueError(f"weights {list(weights)} must differ from each other and from adversarial_weight {weight}")
    for name in variants:
        if StudentSpec.parse(name).weight is not None:
            raise ValueError(f"{name!r} has a weight of its own: give it in `weights`")
    names = [*variants, *(str(StudentSpec("adaptive", weight=w)) for w in weights)]
    return {name: plan_student(name, robust, label) for name in names}


def purifiers_to_evaluate(source: Path, kinds: Sequence[str], steps: int) -> list[str]:
    """Return the students to evaluate: every kind in one step, plain variants also in `steps`, `MAIN_STUDENTS` in 4.

    "pd" only where progressive distillation has such a student.
    """
    more = {kind: {steps} for kind in robust_consistency.VARIANTS} | {kind: {steps, 4} for kind in MAIN_STUDENTS}
    pairs = [(kind, n) for kind in kinds for n in sorted({1} | more.get(kind, set()))]
    return [f"{kind}-{n}" for kind, n in pairs if kind != "pd" or (source / f"pd-{n}").exists()]


def train_noskip(work: Path, data: Data, seed: int) -> list[dict]:
    """Train the consistency student without c_skip as experiment 4 trains the one with it; return its history.

    It is saved as network `NOSKIP` in `work`, and trained only if it is not there.
    """
    teacher, checkpoint = load_network(work / "teacher"), work / f"{NOSKIP}.pt"
    recipe = replace(load_config(work)[0], skip=False)
    history = train_once(work / NOSKIP, lambda: train_consistency(teacher, data, recipe, seed, checkpoint), skip=False)
    checkpoint.unlink(missing_ok=True)
    return history


def hidden_features(classifier: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function of images in [-1, 1] to the classifier's last hidden layer: features for a distance."""
    body = nn.Sequential(*list(classifier.children())[:-1])
    return lambda u: body(to_pixel_range(u))


def train_one_student(
    name: str,
    plan: StudentPlan,
    work: Path,
    data: Data,
    pairs: robust_consistency.TrainingPairs | None,
    classifier: nn.Module,
    seed: int,
) -> list[dict]:
    """Train one student, save it as network `name` in `work` if it is not there, and return its history."""
    if pairs is None:  # nothing is left to train
        return load_history(work / name)
    recipe, own, classifier = load_config(work)[0], plan.recipe, classifier.to(default_device())
    teacher = load_network(work / "teacher", target=recipe.target).to(default_device())
    if plan.begin == "teacher":
        student, scalings = teacher, replace(load_config(work)[1], skip=True)
    else:
        student, scalings = load_consistency_student(work, plan.begin)
    student, facts = student.to(default_device()), {"skip": scalings.skip}
    if isinstance(own, LabelPurifierRecipe):
        return train_once(
            work / name,
            lambda: train_label_purifier(student, classifier, data.train, recipe, scalings, own, seed),
            **facts,
            noise_share=own.noise,
        )
    return train_once(
        work / name,
        lambda: robust_consistency.train_robust_student(
            student,
            teacher,
            classifier,
            pairs,
            recipe,
            scalings,
            own,
            seed,
            features=hidden_features(classifier),
        ),
        **facts,
    )


def train_group(
    begin: str,
    names: Sequence[str],
    plans: Mapping[str, StudentPlan],
    work: Path,
    data: Data,
    pairs: robust_consistency.TrainingPairs | None,
    classifiers: Mapping[str, nn.Module],
    seed: int,
) -> dict[str, list[dict]]:
    """Train students that begin as the same one, `NOSKIP` before those that need it; return their histories."""
    histories = {NOSKIP: train_noskip(work, data, seed)} if begin == NOSKIP else {}
    for name in names:
        plan = plans[name]
        histories[name] = train_one_student(name, plan, work, data, pairs, classifiers[plan.classifier], seed)
    return histories


def train_students(
    plans: Mapping[str, StudentPlan],
    work: Path,
    data: Data,
    classifiers: Mapping[str, nn.Module],
    seed: int,
    *,
    copies: int,
    jobs: int,
) -> dict[str, list[dict]]:
    """Train all students, name → plan, `jobs` at a time; return their histories.

    Those that begin without c_skip wait for the student that they begin as; its history is there, too. The training
    pairs are made only if a student is still to be trained. The classifiers are the run's, see `restore_classifiers`.
    """
    restore_classifiers(work, classifiers)
    (recipe, scalings), pairs = load_config(work), None
    if not all([has_network(work / name) for name in plans]):
        teacher = load_network(work / "teacher").to(default_device())
        pairs = robust_consistency.training_pairs(data.train, teacher, recipe, scalings, seed, copies=copies)
    noskip = [name for name, plan in plans.items() if plan.begin == NOSKIP]
    groups = [(NOSKIP, noskip)] * bool(noskip) + [(plans[name].begin, [name]) for name in plans if name not in noskip]
    groups.sort(key=lambda group: -sum(plans[name].recipe.epochs for name in group[1]))  # the longest first
    tasks = [(begin, names, plans, work, data, pairs, classifiers, seed) for begin, names in groups]
    histories = {}
    for group in parallel.parallel_map(train_group, tasks, jobs, "students"):
        histories |= group
    return {name: histories[name] for name in (NOSKIP, *plans) if name in histories}


def publish_run(work: Path, target: Path) -> Path:
    """Move all networks of a run to `target`, in place of what was there; return it: cells run again find them."""
    if work != target:
        shutil.rmtree(work / "evaluations", ignore_errors=True)
    return publish(work, target)
