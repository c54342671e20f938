"""Records of experiment 5 without its networks: defences with planted accuracies, losses and noise."""

from collections.abc import Mapping

import numpy as np

from lib.utils.draws import image_measures, pack_draws

EVERY = ["none", "sde-100", "ddim-100", "ddim-1", "ddim-4", "clean-1", "clean-2", "adaptive-1", "adaptive-2", "grey-1"]
EVERY += ["undistilled-adaptive-1", "label-1", "label-n50-1", "label-n25-1", "label-n0-1", "pgd-at", "trades"]
EVERY += ["trades-wide", "adaptive-1 + trades", "trades-adaptive-1 + trades"]
FEW = ["none", "sde-100", "clean-1", "adaptive-1"]
DETERMINISTIC = {"none", "label-n0-1", "pgd-at", "trades", "trades-wide"}
LOSSES = {"none": 0.4, "sde-100": 0.2, "ddim-100": 0.24, "ddim-1": 0.22, "clean-1": 0.2, "clean-2": 0.19}
LOSSES |= {"adaptive-1": 0.14, "adaptive-2": 0.13, "label-1": 0.12, "label-n0-1": 0.15, "trades": 0.1, "pgd-at": 0.11}
SHAKY = {"sde-100": 0.3, "ddim-100": 0.2}  # the share of images that some draws get wrong, without attack
ALONE = {"none": 30_000, "pgd-at": 30_000, "trades": 30_000, "trades-wide": 1_030_000}  # multiply-adds
SHARES = {"grey": 0.2, "square": 0.3, "bpda": 0.5, "fixed": 0.6, "from ddim-1": 0.55, "exact-ce": 0.9}
SHARES |= {"exact-margin": 0.92, "apgd": 0.85, "from trades": 0.3, "from adaptive-1": 0.95}  # of the loss


def answers(rng, difficulty: np.ndarray, loss: float, shaky: float, draws: int) -> np.ndarray:
    """Right or wrong per draw and image: the easiest `loss` are lost, the hardest `shaky` right in 8 of 10 draws."""
    chance = np.where(difficulty > 1 - shaky, 0.8, 1.0)
    return rng.random((draws, len(difficulty))) < np.where(difficulty < loss, 0.0, chance)


def synthetic_record(
    seed: int = 0,
    names=EVERY,
    n: int = 60,
    draws: int = 40,
    losses: Mapping[str, float] = {},
    shaky: Mapping[str, float] = {},
    shares: Mapping[str, float] = {},
) -> dict:
    """One seed's record; `losses`, `shaky`, `shares`: planted, in place of the ones above."""
    rng = np.random.default_rng(seed)
    difficulty = (rng.permutation(n) + 0.5) / n
    correct, defences = {}, {}
    for name in names:
        random = name not in DETERMINISTIC
        loss, m = (LOSSES | dict(losses)).get(name, 0.16), draws if random else 1
        unsure = (SHAKY | dict(shaky)).get(name, 0.15) if random else 0.0
        attacks = {k: s for k, s in (SHARES | dict(shares)).items() if k != f"from {name}"}
        bits = {k: answers(rng, difficulty, loss * s, unsure, m) for k, s in attacks.items()}
        bits |= {"clean": answers(rng, difficulty, 0, unsure, m), "matched": answers(rng, difficulty, loss, unsure, m)}
        bits["outside"] = answers(np.random.default_rng(seed), difficulty, loss, unsure, m)
        correct[name] = {k: pack_draws(v) for k, v in bits.items()}
        clean, hit = ({k: float(v.mean()) for k, v in image_measures(bits[c]).items()} for c in ("clean", "matched"))
        steps = 0 if name in ALONE else int(name.partition(" + ")[0].rpartition("-")[2])
        worst = max(attacks, key=lambda k: attacks[k])
        defences[name] = {
            "purifier": name.partition(" + ")[0],
            "classifier": "trades" if "trades" in name else "natural",
            "random": random,
            "evaluations": steps,
            "multiply_adds": ALONE.get(name, 30_000 + 1_000_000 * steps),
            "clean": clean["accuracy"],
            "control": clean["worst_of_10"],
            **hit,
            "loss": clean["accuracy"] - hit["accuracy"],
            "worst_loss": clean["worst_of_10"] - hit["worst_of_10"],
            "outside": float(bits["outside"].mean()),
            "attacks": {k: float(bits[k].mean()) for k in attacks},
            "chosen": {worst: n - 3, "square": 3},
        }
    outcomes = {"images": rng.permutation(500)[:n].tolist(), "correct": correct}
    purifiers = [k for k in names if k != "none" and "trades" not in k and k != "pgd-at"]
    metrics = {"n_test": n, "n_inherited": 100, "n_diagnosed": 40, "eps": 0.1, "teacher": "sde-100", "steps": 2}
    metrics |= {
        "effort": {"steps": 16, "eot": 4, "queries": 200, "last_steps": 8, "last_eot": 12},
        "defences": defences,
        "weak_attacks": [],
    }
    metrics |= {"draws": {"first": 2, "kept": 4, "second": 6, "fresh": draws}, "summary": {}, "red": {}}
    metrics |= {"inheritance": {k: residual(i) for i, k in enumerate(purifiers)}, "certified": certificates()}
    pixels = rng.integers(0, 255, (6, 1, 8, 8)).tolist()
    pictures = dict.fromkeys(["image", "attacked", "δ × 10", *purifiers[:5]], pixels)
    check = {"check": ["zero gradients", "more steps"], "flag": [False, seed == 0], "measured": [0.0, 0.02]}
    arrays = {"pictures": pictures, "history": {}, "diagnosis": dict.fromkeys(purifiers[-3:], check)}
    start = {"experiment": "dp", "seed": seed, "profile": "t"}
    return start | {"metrics": metrics, "arrays": arrays, "outcomes": outcomes}


def residual(i: int) -> dict:
    """How much of δ a purifier leaves."""
    part = {"projection": 0.6 - 0.01 * i, "ratio": 0.7 - 0.01 * i, "damage": 12.0 + 0.1 * i}
    return part | {"damage_before": 14.0, "to_denoiser": 0.001, "own": part}


def certificates() -> dict:
    """Certified accuracy of three networks at two noise levels, up to the ceiling of the certificate."""
    radii = [0.0425 * k for k in range(8)]
    ceiling = {"0.085": 0.2096, "0.17": 0.4192}
    networks = {"teacher": 0.9, "clean": 0.88, "adaptive": 0.99}
    accuracy = {
        f"{net}/{sigma}": [top - r / 3 if r < ceiling[sigma] else 0.0 for r in radii]
        for net, top in networks.items()
        for sigma in ceiling
    }
    return {"radii": radii, "accuracy": accuracy, "n": 20, "draws": 1000, "ceiling": ceiling}
