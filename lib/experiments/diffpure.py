"""Experiment 5, distilled DiffPure: what the notebook computes.

A defence is a purifier of `lib.purify` by name, "<kind>-<steps>", before one classifier. The folder of one seed holds
all their networks: experiment 4's, and a student of every variant of `lib.distillation.robust_consistency`. What is attacked is not clamped:
a cut pixel has no gradient, and no defence may win by that.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from lib import purify
from lib.attacks.eot_pgd import eot_pgd
from lib.data import Data, Split
from lib.distillation.few_step import mse
from lib.evaluation import threat_models
from lib.evaluation.robust_accuracy import TOLERANCE
from lib.evaluation.threat_models import AttackBudget
from lib.experiments import diffpure_students, kd
from lib.purify import IdentityPurifier, PurifiedClassifier
from lib.utils import parallel
from lib.utils.device import default_device, to_model_device
from lib.utils.files import write_json
from lib.utils.seeds import derive_seed, seeded_generator

DENOISER = "ddim-1"  # the undistilled network in one step: the baseline to beat
NO_PURIFIER = "nothing-0"  # no purifier at all


def evaluation_images(data: Data, count: int, seed: int) -> Split:
    """Returns `count` test images, drawn once for a seed: all its defences and attacks get these."""
    rows = torch.randperm(len(data.test.y), generator=seeded_generator(seed, "points"))[:count]
    return Split(data.test.x[rows], data.test.y[rows])


def train_classifiers(data: Data, seed: int, widths: Sequence[int], **recipe: Any) -> list[nn.Module]:
    """Returns ordinary classifiers of the given widths: the one that is defended, and others that no student saw."""
    found = [kd.train_teachers(data, seed, members=1, shift=0, arch="cnn", width=w, **recipe)[0] for w in widths]
    return [net.eval().requires_grad_(False) for net in found]


class Evaluation(NamedTuple):
    """One defence under one threat model: what is asked of `run_evaluation`."""

    name: str  # of the purifier
    threat: str
    budget: AttackBudget
    eps: float
    norm: str = "Linf"
    others: tuple[str, ...] = ()  # purifiers that the same images are put to
    judge: int = 0  # which of the classifiers stands behind all of them
    extra: float = 0.0  # more noise at inference, in pixel units
    votes: int = 1
    many: bool = False  # on the many points, not on those that the teacher gets too


def build_purifier(models: Path, name: str, **options: Any) -> nn.Module:
    """Returns the purifier `name` with the networks in `models`, on the device of experiments."""
    return (IdentityPurifier() if name == NO_PURIFIER else purify.load_purifier(models, name, **options)).to(
        default_device()
    )


def build_defence(
    models: Path,
    name: str,
    classifier: nn.Module,
    votes: int = 1,
    fixed: int | None = None,
    pixels: int = 0,
    **options: Any,
) -> PurifiedClassifier:
    """Returns a classifier behind the purifier `name`, on the device of experiments, without clamping.

    `fixed`: a seed that makes its noise the same in every call: then it is a function, which `lib.evaluation.sanity_checks` can judge;
    `pixels`: of the images that gradients are asked for; with many, and many steps, they come with the memory of one.
    """
    memory = pixels * step_count(name) > threat_models.GRAPH_LIMIT
    purifier = build_purifier(models, name, clamp=False, save_memory=memory, **options)
    return PurifiedClassifier(purifier, classifier, votes, fixed).to(default_device())


def claimed_students(steps: int) -> list[str]:
    """Returns the students that claims are about: of clean pairs and of the adaptive δ, in one step and in `steps`."""
    return [f"{kind}-{n}" for kind in ("clean", "adaptive") for n in sorted({1, steps})]


def run_evaluation(
    key: str, row: Evaluation, models: Path, classifiers: Sequence[nn.Module], few: Split, many: Split, seed: int
) -> dict[str, Any]:
    """Returns what `lib.evaluation.threat_models.evaluate_under_attack` says about a row, from `models`/rows/<key>.json if it was asked before."""
    path = models / "rows" / f"{key.replace('/', ' ')}.json"
    if path.exists():
        return json.loads(path.read_text())
    judge = classifiers[row.judge]
    others = {name: build_defence(models, name, judge) for name in row.others}
    x, y = (t.to(default_device()) for t in (many if row.many else few))
    defence = build_defence(models, row.name, judge, row.votes, pixels=x.numel(), extra=row.extra)
    options = {"eps": row.eps, "norm": row.norm, "budget": row.budget, "seed": seed, "others": others}
    write_json(path, threat_models.evaluate_under_attack(row.threat, defence, x, y, **options))
    return json.loads(path.read_text())


def run_evaluations(
    rows: Mapping[str, Evaluation],
    models: Path,
    classifiers: Sequence[nn.Module],
    few: Split,
    many: Split,
    seed: int,
    jobs: int = 1,
) -> dict[str, dict]:
    """Returns what `run_evaluation` returns for every row, the most expensive ones first, `jobs` at a time.

    The classifiers are those of the run, see `lib.experiments.diffpure_students.restore_classifiers`.
    """
    diffpure_students.restore_classifiers(models, classifiers)
    order = sorted(rows, key=lambda key: -evaluation_cost(rows[key]))
    asked = [(key, rows[key], models, classifiers, few, many, seed) for key in order]
    found = dict(zip(order, parallel.parallel_map(run_evaluation, asked, jobs, "threats"), strict=True))
    return {key: found[key] for key in rows}


def evaluation_table(found: Mapping[str, dict]) -> pd.DataFrame:
    """Returns what each threat model left, in %, with Wilson's 95 % interval over the images in brackets."""

    def told(row: dict, name: str) -> str:
        low, high = row["intervals"][name]
        return f"{100 * row[name]:.1f} [{100 * low:.0f}, {100 * high:.0f}]"

    rows = {
        key: {name: told(row, name) for name in threat_models.MEASURES} | {"images": row["n"]}
        for key, row in found.items()
    }
    return pd.DataFrame(rows).T


def step_count(name: str) -> int:
    """Returns the steps in a purifier's name."""
    return int(name.rpartition("-")[2])


def evaluation_cost(row: Evaluation) -> float:
    """Returns the network evaluations per image of a row, roughly: what comes first when work is shared."""
    b = row.budget
    passes = {"none": 0, "grey": 0, "bpda": 1, "fixed": 3, "square": 1, "apgd": 6}.get(row.threat, 3)
    each = b.queries if row.threat == "square" else b.steps * (1 if row.threat == "fixed" else b.eot)
    asked = 2 * b.draws * (step_count(row.name) + sum(map(step_count, row.others)))
    return row.votes * passes * each * step_count(row.name) + asked


def evaluation_protocol(
    teacher: str,
    steps: int,
    *,
    eps: float,
    full: AttackBudget,
    sweep: AttackBudget,
    names: Sequence[str],
    unseen: Mapping[str, tuple],
) -> dict[str, Evaluation]:
    """Returns the evaluation as rows, "<purifier>/<threat>": what is attacked, through what and with which effort.

    `full`: what claims about students rest on; `sweep`: everything else, and the teacher's own gradient; `names`: of
    the purifiers to sweep, beside the claimed ones; `unseen`: other balls, label → (eps, norm). Raises ValueError.
    """
    if steps < 1 or not teacher.startswith(("sde-", "ddpm-")):
        raise ValueError(f"steps {steps}, teacher {teacher!r}: at least 1, and sde-<steps> or ddpm-<steps> are due")
    asked = claimed_students(steps)
    best, plain = f"adaptive-{steps}", f"clean-{steps}"
    lent = (best, "clean-1")  # whose images the teacher gets: asking it costs as much as making them
    rows = {f"{name}/exact": Evaluation(name, "exact", full, eps, others=(teacher,) * (name in lent)) for name in asked}
    rows[f"{DENOISER}/exact"] = Evaluation(DENOISER, "exact", full, eps)
    rows[f"{NO_PURIFIER}/exact"] = Evaluation(NO_PURIFIER, "exact", full._replace(eot=1), eps)
    rows[f"{teacher}/sweep"] = Evaluation(teacher, "exact", sweep, eps, others=(best, plain))
    rows[f"{teacher}/bpda"] = Evaluation(teacher, "bpda", sweep, eps)
    rows |= {f"{name}/many": Evaluation(name, "exact", sweep, eps, many=True) for name in [DENOISER, *asked]}
    swept = dict.fromkeys([DENOISER, *names, *asked])
    rows |= {
        f"{name}/sweep": Evaluation(name, "exact", sweep, eps, others=(teacher,) * (name == best)) for name in swept
    }
    for name in (best, plain):
        rows |= {f"{name}/{threat}": Evaluation(name, threat, sweep, eps) for threat in ("bpda", "apgd", "square")}
        rows[f"{name}/fixed"] = Evaluation(name, "fixed", full, eps)
        rows |= {f"{name}/{label}": Evaluation(name, "exact", sweep, e, norm) for label, (e, norm) in unseen.items()}
        rows[f"{name}/other"] = Evaluation(name, "exact", sweep, eps, judge=1)
    rows |= {f"{name}/none": Evaluation(name, "none", full, eps) for name in (*asked, DENOISER, NO_PURIFIER, teacher)}
    rows |= {f"{name}/grey": Evaluation(name, "grey", full, eps) for name in (best, plain, DENOISER, teacher)}
    rows |= {f"{best}/extra {s:g}": Evaluation(best, "exact", sweep, eps, extra=s) for s in (0.05, 0.1)}
    rows |= {f"{best}/votes {k}": Evaluation(best, "exact", sweep, eps, votes=k) for k in (4,)}
    curve = [full._replace(steps=s) for s in (5, 20, 50)] + [full._replace(eot=k) for k in (1, 4)]
    return rows | {f"adaptive-1/{b.steps}x{b.eot}": Evaluation("adaptive-1", "exact", b, eps) for b in curve}


def strongest_attack(found: Mapping[str, dict], name: str, what: str = "average") -> float:
    """Returns the least that any attack in `found` left of a purifier, those made for others among them.

    The unseen balls, the other classifier and the altered purifiers do not count: "none" to "sweep" alone do.
    """
    known = {*threat_models.THREAT_MODELS, "sweep"} - {"fixed"}
    own = [row[what] for key, row in found.items() if key.split("/")[0] == name and key.split("/")[1] in known]
    lent = [row["others"][name][what] for row in found.values() if name in row["others"]]
    return min(own + lent)


def strongest_attacks(found: Mapping[str, dict], teacher: str) -> dict[str, dict[str, float]]:
    """Returns what the strongest attack leaves of the teacher and of each defence that met the full budget.

    By measure, the attack that is strongest by it; `clean` and `control` beside it are without any.
    """
    out = {}
    for name in [teacher, *(key.split("/")[0] for key in found if key.endswith("/exact"))]:
        out[name] = {what: strongest_attack(found, name, what) for what in ("average", "worst", "majority")}
        row = found[f"{name}/none"]
        out[name] |= {"clean": row["clean"], "control": row["control"]}
    return out


def weak_attack_warnings(found: Mapping[str, dict]) -> list[str]:
    """Returns a sentence for each purifier whose exact gradient leaves more than a simpler attack on the same images.

    Simpler are none at all, the grey box, BPDA, Square and images made for another defence; more is over the tolerance
    of `lib.evaluation.robust_accuracy`, on average. Few images tell such attacks apart badly, and budgets may differ: it asks for a look.
    """
    out = []
    for name in dict.fromkeys(key.split("/")[0] for key in found):
        own = {key.split("/")[1]: row["average"] for key, row in found.items() if key.split("/")[0] == name}
        exact = {threat: own[threat] for threat in ("exact", "sweep", "apgd") if threat in own}
        simple = {threat: own[threat] for threat in ("none", "grey", "bpda", "square") if threat in own}
        simple |= {
            f"images for {key}": row["others"][name]["average"] for key, row in found.items() if name in row["others"]
        }
        best = min(exact, key=exact.get, default=None)
        less = {threat: left for threat, left in simple.items() if best and exact[best] > left + TOLERANCE}
        out += [f"{name}: {best} leaves {exact[best]:.1%}, {threat} only {left:.1%}" for threat, left in less.items()]
    return out


def diffpure_summary(
    found: Mapping[str, dict], left: Mapping[str, dict], inheritance: Mapping[str, dict], teacher: str, steps: int
) -> dict[str, float]:
    """Returns the numbers that claims are about, "one" for one step and "few" for `steps`; shares in [0, 1].

    Differences are paired: the same points, seeds and, but for the teacher's own gradient, the same budget.
    """
    out: dict[str, float] = {}
    for n, label in ((1, "one"), (steps, "few")):
        clean, adaptive = f"clean-{n}", f"adaptive-{n}"
        for what in ("average", "worst"):
            for kind, name in (("clean", clean), ("adaptive", adaptive)):
                out[f"{kind}_{label}_minus_teacher_{what}"] = left[name][what] - left[teacher][what]
            gain = found[f"{adaptive}/many"][what] - found[f"{clean}/many"][what]
            out[f"adaptive_minus_clean_{label}_many_{what}"] = gain
            out[f"adaptive_minus_clean_{label}_{what}"] = left[adaptive][what] - left[clean][what]
        out[f"accuracy_{label}_minus_teacher"] = left[adaptive]["clean"] - left[teacher]["clean"]
        moved = {name: inheritance[name]["projection"] for name in (clean, adaptive, teacher)}
        out[f"inherited_clean_{label}_minus_teacher"] = moved[clean] - moved[teacher]
        out[f"inherited_adaptive_{label}_minus_clean"] = moved[adaptive] - moved[clean]
    best, plain = f"adaptive-{steps}", f"clean-{steps}"
    out["grey_adaptive_minus_clean"] = found[f"{best}/grey"]["average"] - found[f"{plain}/grey"]["average"]
    out["clean_one_minus_denoiser"] = left["clean-1"]["average"] - left[DENOISER]["average"]
    if (bare := "noskip-clean-1") in inheritance:
        out["inherited_noskip_minus_skip"] = inheritance[bare]["projection"] - inheritance["clean-1"]["projection"]
        out["noskip_minus_skip_average"] = found[f"{bare}/sweep"]["average"] - found["clean-1/sweep"]["average"]
    if {"match-sde-1", "match-ode-1"} <= inheritance.keys():
        near = {goal: inheritance[f"match-{goal}-1"]["to_denoiser"] for goal in ("sde", "ode")}
        out["match_sde_minus_ode_to_denoiser"] = near["sde"] - near["ode"]
    own = found[f"{teacher}/sweep"]["average"]
    out["teacher_exact_minus_bpda"] = own - found[f"{teacher}/bpda"]["average"]
    out["teacher_exact_minus_surrogate"] = own - found[f"{best}/sweep"]["others"][teacher]["average"]
    return out


def residual_of(
    name: str,
    models: Path,
    classifier: nn.Module,
    test: Split,
    grey: Tensor,
    denoised: Tensor,
    seed: int,
    eps: float,
    steps: int,
) -> dict[str, Any]:
    """Returns what `residual_perturbations` says of one purifier, for the grey box's images and what `DENOISER` made of them."""
    (x, y), purifier = test, build_purifier(models, name, clamp=False)
    found: dict[str, Any] = threat_models.residual_perturbation(purifier, classifier, x, grey, y, seed)
    if step_count(name) <= 4:
        found["to_denoiser"] = mse(purify.purify(purifier, grey, seed, progress=False), denoised)
        fixed = PurifiedClassifier(purifier, classifier, fixed=seed)
        own = eot_pgd(fixed, x, y, eps, seed=derive_seed(seed, "own"), steps=steps)
        found["own"] = threat_models.residual_perturbation(purifier, classifier, x, own, y, seed)
    return found


def residual_perturbations(
    names: Sequence[str],
    models: Path,
    classifier: nn.Module,
    test: Split,
    seed: int,
    *,
    eps: float,
    steps: int,
    jobs: int = 1,
) -> dict[str, dict]:
    """Returns `lib.evaluation.threat_models.residual_perturbation` of every purifier for δ of the grey box, which is the same for all of them.

    Under "own" the same for δ found through a student itself, with one draw of noise that the attacker knows, and
    under "to_denoiser" how far what it makes of x + δ is from what `DENOISER` makes of it: mean square, same noise.
    """
    few = Split(*to_model_device(classifier, *test))
    grey = eot_pgd(classifier, *few, eps, seed=derive_seed(seed, "inherited"), steps=steps)
    denoised = purify.purify(build_purifier(models, DENOISER), grey, seed, progress=False)
    asked = [(name, models, classifier, few, grey, denoised, seed, eps, steps) for name in names]
    return dict(zip(names, parallel.parallel_map(residual_of, asked, jobs, "inheritance"), strict=True))


def purified_images(
    names: Sequence[str], models: Path, classifier: nn.Module, test: Split, seed: int, *, eps: float, count: int = 6
) -> dict[str, list]:
    """Returns images, their grey-box attack, the difference × 10 about grey, and what purifiers make of the attack.

    One row each, as bytes 0 to 255.
    """
    x, y = to_model_device(classifier, *(t[:count] for t in test))
    bad = eot_pgd(classifier, x, y, eps, seed=derive_seed(seed, "inherited"), steps=20)
    found = {"image": x, "attacked": bad, "δ × 10": (0.5 + 10 * (bad - x)).clamp(0, 1)}
    for name in names:
        found[name] = purify.purify(build_purifier(models, name), bad, seed, progress=False)
    return {name: (255 * images).round().to(torch.uint8).tolist() for name, images in found.items()}
