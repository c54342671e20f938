"""Experiment 5, distilled DiffPure: the protocol, its evaluations, and the numbers that claims are about.

A defence is a purifier by name (`lib.utils.specs`) before one classifier. The folder of one seed holds all networks:
experiment 4's, and a student of every variant of `lib.distillation.robust_consistency`. What is attacked is not
clamped: a cut pixel has no gradient, and no defence may win by that.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from lib import purify
from lib.data import Data, Split
from lib.evaluation import threat_models
from lib.evaluation.outcomes import GRAPH_LIMIT
from lib.evaluation.robust_accuracy import TOLERANCE
from lib.evaluation.threat_models import AttackBudget
from lib.experiments import diffpure_students, kd
from lib.experiments.samples import evaluation_images as evaluation_images
from lib.purify import IdentityPurifier, PurifiedClassifier, Purifier
from lib.utils import parallel
from lib.utils.checkpoints import load_checkpoint, save_checkpoint
from lib.utils.device import default_device
from lib.utils.files import dump_canonical, to_jsonable
from lib.utils.specs import PurifierSpec, ResultKey, effort_label

DENOISER = "ddim-1"  # the undistilled network in one step: the baseline
NO_PURIFIER = "none-0"


def train_classifiers(data: Data, seed: int, widths: Sequence[int], **recipe: Any) -> list[nn.Module]:
    """Return ordinary classifiers of the given widths: the defended one, and others that no student met."""
    nets = [kd.train_teachers(data, seed, members=1, shift=0, arch="cnn", width=w, **recipe)[0] for w in widths]
    return [net.eval().requires_grad_(False) for net in nets]


class Evaluation(NamedTuple):
    """One defence under one threat model: what `run_evaluation` runs."""

    purifier: str
    threat: str
    budget: AttackBudget
    eps: float
    norm: str = "Linf"
    others: tuple[str, ...] = ()  # purifiers that the same images are scored on
    classifier: int = 0  # which of the classifiers stands behind all of them
    extra: float = 0.0  # more noise at inference, in pixel units
    votes: int = 1
    many: bool = False  # on the larger sample, not on the one that the teacher gets too


def build_purifier(models: Path, name: str, **options: Any) -> Purifier | IdentityPurifier:
    """Return the purifier `name` with the networks in `models`, on the device of experiments."""
    purifier = IdentityPurifier() if name == NO_PURIFIER else purify.load_purifier(models, name, **options)
    return purifier.to(default_device())


def build_defence(
    models: Path,
    name: str,
    classifier: nn.Module,
    votes: int = 1,
    fixed: int | None = None,
    pixels: int = 0,
    **options: Any,
) -> PurifiedClassifier:
    """Return a classifier behind the purifier `name`, on the device of experiments, without clamping.

    `fixed`: a seed that makes its noise the same in every call: then it is a function, which
    `lib.evaluation.sanity_checks` can examine; `pixels`: of the images that are attacked; with many,
    and many steps, gradients take the memory of one step.
    """
    memory = pixels * step_count(name) > GRAPH_LIMIT
    purifier = build_purifier(models, name, clamp=False, save_memory=memory, **options)
    return PurifiedClassifier(purifier, classifier, votes, fixed).to(default_device())


def step_count(name: str) -> int:
    """Return the steps in a purifier's name."""
    return PurifierSpec.parse(name).steps


def claimed_students(steps: int) -> list[str]:
    """Return the students that claims are about: of clean pairs and of the adaptive δ, in one step and in `steps`."""
    return [f"{kind}-{n}" for kind in ("clean", "adaptive") for n in sorted({1, steps})]


def run_evaluation(
    key: str,
    evaluation: Evaluation,
    models: Path,
    classifiers: Sequence[nn.Module],
    few: Split,
    many: Split,
    seed: int,
) -> dict[str, Any]:
    """Return the result of one evaluation, from `models`/evaluations/<key>.pt if it was saved before."""
    path = models / "evaluations" / f"{key.replace('/', ' ')}.pt"
    if saved := load_checkpoint(path):
        return saved
    classifier = classifiers[evaluation.classifier]
    others = {name: build_defence(models, name, classifier) for name in evaluation.others}
    x, y = (t.to(default_device()) for t in (many if evaluation.many else few))
    options = {"pixels": x.numel(), "extra": evaluation.extra}
    defence = build_defence(models, evaluation.purifier, classifier, evaluation.votes, **options)
    ball = {"eps": evaluation.eps, "norm": evaluation.norm}
    result = threat_models.evaluate_under_attack(
        evaluation.threat, defence, x, y, **ball, budget=evaluation.budget, seed=seed, others=others
    )
    result = json.loads(dump_canonical(to_jsonable(result)))
    save_checkpoint(path, result)
    return result


def run_evaluations(
    evaluations: Mapping[str, Evaluation],
    models: Path,
    classifiers: Sequence[nn.Module],
    few: Split,
    many: Split,
    seed: int,
    jobs: int = 1,
) -> dict[str, dict]:
    """Return the result of every evaluation, the most expensive ones first, `jobs` at a time.

    The classifiers are those of the run, see `lib.experiments.diffpure_students.restore_classifiers`.
    """
    diffpure_students.restore_classifiers(models, classifiers)
    order = sorted(evaluations, key=lambda key: -evaluation_cost(evaluations[key]))
    tasks = [(key, evaluations[key], models, classifiers, few, many, seed) for key in order]
    results = dict(zip(order, parallel.parallel_map(run_evaluation, tasks, jobs, "threats"), strict=True))
    return {key: results[key] for key in evaluations}


def evaluation_table(results: Mapping[str, dict]) -> pd.DataFrame:
    """Return what each threat model left, in %, with Wilson's 95 % interval over the images in brackets."""

    def text(result: dict, measure: str) -> str:
        low, high = result["intervals"][measure]
        return f"{100 * result[measure]:.1f} [{100 * low:.0f}, {100 * high:.0f}]"

    cells = {key: {m: text(result, m) for m in threat_models.MEASURES} for key, result in results.items()}
    return pd.DataFrame({key: row | {"images": results[key]["n"]} for key, row in cells.items()}).T


def evaluation_cost(evaluation: Evaluation) -> float:
    """Return the network evaluations per image, roughly: what is run first when work is shared."""
    budget, threat, steps = evaluation.budget, evaluation.threat, step_count(evaluation.purifier)
    passes = {"none": 0, "grey": 0, "bpda": 1, "fixed": 3, "square": 1, "apgd": 6}.get(threat, 3)
    each = budget.queries if threat == "square" else budget.steps * (1 if threat == "fixed" else budget.eot)
    scoring = 2 * budget.draws * (steps + sum(map(step_count, evaluation.others)))
    return evaluation.votes * passes * each * steps + scoring


def evaluation_protocol(
    teacher: str,
    steps: int,
    *,
    eps: float,
    full: AttackBudget,
    small: AttackBudget,
    names: Sequence[str],
    unseen: Mapping[str, tuple],
) -> dict[str, Evaluation]:
    """Return all evaluations by key, "<purifier>/<label>": what is attacked, through what and with which effort.

    `full`: the budget behind claims about students; `small`: of everything else, and of the teacher's own gradient;
    `names`: purifiers that get the small budget, besides the claimed ones; `unseen`: other balls, label → (eps, norm).
    Raises ValueError.
    """
    if steps < 1 or not teacher.startswith(("sde-", "ddpm-")):
        expected = "expected steps of at least 1 and a teacher sde-<steps> or ddpm-<steps>"
        raise ValueError(f"{expected}, got steps {steps}, teacher {teacher!r}")
    claimed, best, plain = claimed_students(steps), f"adaptive-{steps}", f"clean-{steps}"
    transferred = (best, "clean-1")  # whose images are scored on the teacher, which costs as much as making them

    def exact(name: str, budget: AttackBudget, eps: float = eps, **options: Any) -> Evaluation:
        return Evaluation(name, "exact", budget, eps, **options)

    plan = {f"{name}/exact": exact(name, full, others=(teacher,) * (name in transferred)) for name in claimed}
    plan[f"{DENOISER}/exact"] = exact(DENOISER, full)
    plan[f"{NO_PURIFIER}/exact"] = exact(NO_PURIFIER, full._replace(eot=1))
    plan[f"{teacher}/sweep"] = exact(teacher, small, others=(best, plain))
    plan[f"{teacher}/bpda"] = Evaluation(teacher, "bpda", small, eps)
    plan |= {f"{name}/many": exact(name, small, many=True) for name in [DENOISER, *claimed]}
    for name in dict.fromkeys([DENOISER, *names, *claimed]):
        plan[f"{name}/sweep"] = exact(name, small, others=(teacher,) * (name == best))
    for name in (best, plain):
        plan |= {f"{name}/{threat}": Evaluation(name, threat, small, eps) for threat in ("bpda", "apgd", "square")}
        plan[f"{name}/fixed"] = Evaluation(name, "fixed", full, eps)
        plan |= {f"{name}/{label}": exact(name, small, eps=e, norm=norm) for label, (e, norm) in unseen.items()}
        plan[f"{name}/other"] = exact(name, small, classifier=1)
    plan |= {f"{name}/none": Evaluation(name, "none", full, eps) for name in (*claimed, DENOISER, NO_PURIFIER, teacher)}
    plan |= {f"{name}/grey": Evaluation(name, "grey", full, eps) for name in (best, plain, DENOISER, teacher)}
    plan |= {f"{best}/extra {s:g}": exact(best, small, extra=s) for s in (0.05, 0.1)}
    plan[f"{best}/votes 4"] = exact(best, small, votes=4)
    curve = [full._replace(steps=s) for s in (5, 20, 50)] + [full._replace(eot=k) for k in (1, 4)]
    return plan | {f"adaptive-1/{effort_label(b.steps, b.eot)}": exact("adaptive-1", b) for b in curve}


def strongest_attack(results: Mapping[str, dict], name: str, measure: str = "average") -> float:
    """Return the least that any attack left of a purifier, those made for other defences among them.

    The unseen balls, the other classifier and the altered purifiers do not count.
    """
    labels = {*threat_models.THREAT_MODELS, "sweep"} - {"fixed"}
    keys = {key: ResultKey.parse(key) for key in results}
    own = [results[k][measure] for k, key in keys.items() if key.name == name and key.what in labels]
    transferred = [result["others"][name][measure] for result in results.values() if name in result["others"]]
    return min(own + transferred)


def strongest_attacks(results: Mapping[str, dict], teacher: str) -> dict[str, dict[str, float]]:
    """Return what the strongest attack leaves of the teacher and of each defence that met the full budget.

    By measure, the attack that is strongest by it; `clean` and `control` are without any.
    """
    keys, out = map(ResultKey.parse, results), {}
    for name in [teacher, *(key.name for key in keys if key.what == "exact")]:
        out[name] = {measure: strongest_attack(results, name, measure) for measure in ("average", "worst", "majority")}
        out[name] |= {measure: results[f"{name}/none"][measure] for measure in ("clean", "control")}
    return out


def weak_attack_warnings(results: Mapping[str, dict]) -> list[str]:
    """Return a sentence for each purifier whose exact gradient leaves more than a simpler attack on the same images.

    Simpler are none at all, the grey box, BPDA, Square and images made for another defence; more is over the tolerance
    of `lib.evaluation.robust_accuracy`, on average. Few images tell such attacks apart badly, and budgets may differ.
    """
    keys, out = {key: ResultKey.parse(key) for key in results}, []
    for name in dict.fromkeys(key.name for key in keys.values()):
        own = {key.what: results[k]["average"] for k, key in keys.items() if key.name == name}
        exact = {threat: own[threat] for threat in ("exact", "sweep", "apgd") if threat in own}
        simple = {threat: own[threat] for threat in ("none", "grey", "bpda", "square") if threat in own}
        for key, result in results.items():
            if name in result["others"]:
                simple[f"images for {key}"] = result["others"][name]["average"]
        if not exact:
            continue
        best = min(exact, key=exact.__getitem__)
        less = {threat: left for threat, left in simple.items() if exact[best] > left + TOLERANCE}
        out += [f"{name}: {best} leaves {exact[best]:.1%}, {threat} only {left:.1%}" for threat, left in less.items()]
    return out


def diffpure_summary(
    results: Mapping[str, dict],
    strongest: Mapping[str, dict],
    residuals: Mapping[str, dict],
    teacher: str,
    steps: int,
) -> dict[str, float]:
    """Return the numbers that claims are about, "one" for one step and "few" for `steps`; shares in [0, 1].

    Differences are paired: the same images, seeds and, but for the teacher's own gradient, the same budget.
    """
    out: dict[str, float] = {}
    projection = {name: residual["projection"] for name, residual in residuals.items()}
    for n, label in ((1, "one"), (steps, "few")):
        clean, adaptive = f"clean-{n}", f"adaptive-{n}"
        for what in ("average", "worst"):
            for kind, name in (("clean", clean), ("adaptive", adaptive)):
                out[f"{kind}_{label}_minus_teacher_{what}"] = strongest[name][what] - strongest[teacher][what]
            gain = results[f"{adaptive}/many"][what] - results[f"{clean}/many"][what]
            out[f"adaptive_minus_clean_{label}_many_{what}"] = gain
            out[f"adaptive_minus_clean_{label}_{what}"] = strongest[adaptive][what] - strongest[clean][what]
        out[f"accuracy_{label}_minus_teacher"] = strongest[adaptive]["clean"] - strongest[teacher]["clean"]
        out[f"inherited_clean_{label}_minus_teacher"] = projection[clean] - projection[teacher]
        out[f"inherited_adaptive_{label}_minus_clean"] = projection[adaptive] - projection[clean]
    best, plain, noskip = f"adaptive-{steps}", f"clean-{steps}", "noskip-clean-1"
    out["grey_adaptive_minus_clean"] = results[f"{best}/grey"]["average"] - results[f"{plain}/grey"]["average"]
    out["clean_one_minus_denoiser"] = strongest["clean-1"]["average"] - strongest[DENOISER]["average"]
    if noskip in projection:
        out["inherited_noskip_minus_skip"] = projection[noskip] - projection["clean-1"]
        out["noskip_minus_skip_average"] = results[f"{noskip}/sweep"]["average"] - results["clean-1/sweep"]["average"]
    if {"match-sde-1", "match-ode-1"} <= residuals.keys():
        sde, ode = (residuals[f"match-{goal}-1"]["to_denoiser"] for goal in ("sde", "ode"))
        out["match_sde_minus_ode_to_denoiser"] = sde - ode
    own = results[f"{teacher}/sweep"]["average"]
    out["teacher_exact_minus_bpda"] = own - results[f"{teacher}/bpda"]["average"]
    out["teacher_exact_minus_surrogate"] = own - results[f"{best}/sweep"]["others"][teacher]["average"]
    return out
