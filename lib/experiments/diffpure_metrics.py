"""Experiment 5's numbers: what is left of each defence, which attacks were weak, and the residual perturbation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib.evaluation.matched_attacks import EXACT
from lib.experiments.diffpure import Defence, step_count
from lib.utils.draws import MATCHED, NO_ATTACK, OUTSIDE, TRANSFERRED, image_measures, unpack_draws

WEAKER_BY = 0.005  # of accuracy: more is a weak attack
SIMPLE = ("bpda", "grey", "fixed", "square")  # attacks that the exact gradient ought to beat


def defence_metrics(plan: Sequence[Defence], results: Mapping[str, dict]) -> dict[str, dict[str, Any]]:
    """Return the numbers of each defence: accuracies in [0, 1], attack-induced losses, and its cost.

    `clean`, `control`: average and worst of ten draws without an attack; `accuracy`, `worst_of_10`, `majority_of_10`:
    on the worst image of the matched set; `outside`: average under the smooth attack outside the ball; `loss`,
    `worst_loss`: what of the former the attack took away; `attacks`: the average that each attack leaves by itself, in
    the first draws, before any choice.
    """
    out = {}
    for defence in plan:
        result = results[str(defence)]
        means = {
            label: {k: float(v.mean()) for k, v in image_measures(unpack_draws(result["correct"][label])).items()}
            for label in (NO_ATTACK, MATCHED, OUTSIDE)
        }
        row = {"purifier": defence.purifier, "classifier": defence.classifier, "random": result["random"]}
        row |= {"evaluations": step_count(defence.purifier), "multiply_adds": result["multiply_adds"]}
        row |= {"clean": means[NO_ATTACK]["accuracy"], "control": means[NO_ATTACK]["worst_of_10"], **means[MATCHED]}
        row["loss"] = row["clean"] - row["accuracy"]
        row["worst_loss"] = row["control"] - row["worst_of_10"]
        row["outside"] = means[OUTSIDE]["accuracy"]
        labels = [label for label in result["correct"] if label not in means]
        row["attacks"] = {label: float(np.mean(unpack_draws(result["correct"][label]))) for label in labels}
        out[str(defence)] = row | {key: result[key] for key in ("chosen", "last_climb", "no_gradient")}
    return out


def defence_table(defences: Mapping[str, dict]) -> pd.DataFrame:
    """Return accuracies and losses of all defences in %, and their costs."""
    columns = ["clean", "control", "accuracy", "worst_of_10", "majority_of_10", "loss", "worst_loss"]
    rows = [[100 * row[key] for key in columns] for row in defences.values()]
    table = pd.DataFrame(rows, index=list(defences), columns=columns, dtype=float).round(1)
    costs = {"evaluations": "evaluations", "thousand multiply-adds": "multiply_adds"}
    for name, key in costs.items():
        scale = 1000 if key == "multiply_adds" else 1
        table[name] = [round(row[key] / scale) for row in defences.values()]
    return table


def weak_attack_warnings(defences: Mapping[str, dict]) -> list[str]:
    """Return a sentence for each defence on which a simpler attack, or another defence's images, leave less.

    Less by more than `WEAKER_BY` than the better of the exact gradients, each by its first draws alone: of few images
    with few draws some fall below by chance. The worst image of all counts in any case.
    """
    out = []
    for name, row in defences.items():
        attacks = row["attacks"]
        exact = min((label for label in EXACT if label in attacks), key=attacks.__getitem__)
        simple = {k: v for k, v in attacks.items() if k in SIMPLE or k.startswith(TRANSFERRED)}
        less = {k: v for k, v in simple.items() if v < attacks[exact] - WEAKER_BY}
        out += [f"{name}: {exact} leaves {attacks[exact]:.1%}, {k} only {v:.1%}" for k, v in less.items()]
        out += [f"{name}: {label} got no gradient on {n} images" for label, n in row["no_gradient"].items()]
    return out


def diffpure_summary(residuals: Mapping[str, dict], teacher: str, steps: int) -> dict[str, float]:
    """Return the numbers of the residual perturbation that claims are about, "one" for one step, "few" for `steps`."""
    out: dict[str, float] = {}
    projection = {name: residual["projection"] for name, residual in residuals.items()}
    for n, label in ((1, "one"), (steps, "few")):
        clean, adaptive = f"clean-{n}", f"adaptive-{n}"
        out[f"inherited_clean_{label}_minus_teacher"] = projection[clean] - projection[teacher]
        out[f"inherited_adaptive_{label}_minus_clean"] = projection[adaptive] - projection[clean]
    if (noskip := "noskip-clean-1") in projection:
        out["inherited_noskip_minus_skip"] = projection[noskip] - projection["clean-1"]
    if {"match-sde-1", "match-ode-1"} <= residuals.keys():
        sde, ode = (residuals[f"match-{goal}-1"]["to_denoiser"] for goal in ("sde", "ode"))
        out["match_sde_minus_ode_to_denoiser"] = sde - ode
    return out
