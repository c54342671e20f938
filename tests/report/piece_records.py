"""Pieces of GPU minutes without a GPU: cards and measured attacks with planted outcomes, in the form of pieces."""

from collections.abc import Mapping

import numpy as np

from lib.utils.draws import image_measures, pack_draws, unpack_draws
from lib.utils.files import write_json

EPS = 8 / 255
LABEL = {"commit": "abcdef0123", "command": "python -m lib.pipeline.pieces all", "device": "H100", "minutes": 4.0}
EFFORT = {"steps": 16, "eot": 4, "queries": 100, "last_steps": 16, "last_eot": 16}
DRAWS = {"first": 2, "finalists": 4, "second": 10, "fresh": 20}
STUDENTS = ["none", "ddim-1", "ddim-4", "clean-1", "adaptive-1", "label-1", "label-n0-1", "trades"]
STUDENTS += ["adaptive-1 + trades", "cd-1", "cd-1 + purified", "pd-1"]
EVERYONE = [*STUDENTS, "sde-100", "ddim-100"]
DETERMINISTIC = ("none", "label-n0-1", "trades")
ATTACKS = ("grey", "square", "bpda", "fixed", "from ddim-1", "exact-ce", "exact-margin", "exact-ten", "apgd")


def share_bits(share: float, n: int, draws: int = 1) -> dict:
    """Packed answers: the first images right, in every draw."""
    return pack_draws(np.tile(np.arange(n) < round(share * n), (draws, 1)))


def defence_row(name: str, correct: Mapping[str, dict]) -> dict:
    """The metrics of a defence, as `lib.experiments.diffpure_metrics` computes them."""
    means = {
        c: {k: float(v.mean()) for k, v in image_measures(unpack_draws(correct[c])).items()}
        for c in ("clean", "matched", "outside")
    }
    row = {"clean": means["clean"]["accuracy"], "control": means["clean"]["worst_of_10"], **means["matched"]}
    row |= {"random": name not in DETERMINISTIC, "multiply_adds": 556e6 if name in ("none", "trades") else 1.5e9}
    row |= {"loss": row["clean"] - row["accuracy"], "worst_loss": row["control"] - row["worst_of_10"]}
    row |= {"outside": means["outside"]["accuracy"], "evaluations": 1, "purifier": name, "classifier": "natural"}
    attacks = {c: float(unpack_draws(bits).mean()) for c, bits in correct.items() if c not in means}
    return row | {"attacks": attacks, "chosen": {"exact-ce": correct["clean"]["n"]}, "no_gradient": {}}


def matched_piece(outcomes: Mapping[str, Mapping[str, dict]], images: list[int]) -> dict:
    """A file of the matched set from outcomes."""
    metrics = {"n_test": len(images), "defences": {k: defence_row(k, v) for k, v in outcomes.items()}}
    recipe = {"eps": EPS, "effort": EFFORT, "draws": DRAWS, "seed": 0}
    outcomes = {"images": images, "correct": {name: dict(each) for name, each in outcomes.items()}}
    return LABEL | {"recipe": recipe, "metrics": metrics, "outcomes": outcomes, "minutes": 8.0}


def planted_outcomes(names, n: int, attacked: Mapping[str, float]) -> dict[str, dict[str, dict]]:
    """Outcomes with clean accuracy 0.9, and the planted accuracy under attack, by default 0.4."""
    out = {}
    for name in names:
        left, draws = attacked.get(name, 0.4), 1 if name in DETERMINISTIC else DRAWS["fresh"]
        shares = {a: left + 0.3 if a in ("grey", "square") else left for a in ATTACKS if a != f"from {name}"}
        shares |= {"clean": 0.9, "matched": left, "outside": left / 2}
        out[name] = {condition: share_bits(share, n, draws) for condition, share in shares.items()}
    return out


def classifier_card(method: str, clean: float, arch: str = "resnet18", teacher: str = "") -> dict:
    """A card as `lib.experiments.gpu_pieces` writes it."""
    recipe = {"method": method, "teacher": teacher, "epochs": 30, "arch": arch, "eps": EPS}
    metrics = {"clean": clean, "n": 10_000, "pgd_20": 0.52, "n_pgd": 1000, "eps": EPS}
    return LABEL | {"recipe": recipe, "metrics": metrics, "network": {"arch": arch, "width": 64}}


def autoattack_piece(name: str, bits: dict) -> dict:
    """What AutoAttack measured of a classifier."""
    attacks = dict.fromkeys(("apgd-ce", "apgd-t", "fab-t", "square"), 0.5)
    outcomes = {"images": list(range(bits["n"])), "correct": {name: {"clean": bits, "worst": bits}}}
    recipe = {"steps": 100, "queries": 5000, "targets": 9, "eps": EPS, "seed": 0}
    return LABEL | {"recipe": recipe, "metrics": {"attacks": attacks, "warnings": ["a weak one"]}, "outcomes": outcomes}


def network_card(**metrics) -> dict:
    """The facts of a diffusion network."""
    return {"about": LABEL | {"recipe": {"t": 100, "t_max": 150}, "metrics": metrics}, "history": []}


def write_networks(root, dataset: str) -> None:
    """Write all cards below `root`."""
    folder = root / "data/pretrained" / dataset
    cards = {
        "resnet18": classifier_card("natural", 0.95),
        "resnet18-trades": classifier_card("trades", 0.81),
        "resnet50-trades": classifier_card("trades", 0.84, "resnet50"),
        **{f"resnet18-{m}": classifier_card(m, 0.80, teacher="resnet50-trades") for m in ("ard", "rslad", "guided")},
        "resnet18-pgd-at": classifier_card("pgd-at", 0.83),
        "resnet18-purified": classifier_card("natural", 0.93),
    }
    cards["resnet18-purified"]["recipe"]["images purified by"] = "cd-1"
    plain = {"n": 1000, "clean": 0.95, "cd-1": 0.78}
    cards["resnet18-purified"]["metrics"] = {"n": 1000, "clean": 0.93, "cd-1": 0.88, "plain": plain}
    for name, card in cards.items():
        write_json(folder / name / "card.json", card)
    curve = [{"minutes": 0.05 * (i + 1), "error": 0.004 + 0.01 / (i + 1)} for i in range(120)]
    networks = {
        "teacher": network_card(validation_error=0.00409, unit="px²", curve=curve),
        "cd": network_card(
            **{"cd-1_to_ode_100": 0.0012, "cd-2_to_ode_100": 0.0009},
            purified={"n": 1000, "sde-100": 0.871, "cd-1": 0.78},
        ),
        **{
            f"pd-{k}": network_card(**{"pd-1_to_ode_100": 0.0015}, purified={"n": 1000, "pd-1": 0.77})
            for k in (1, 2, 4)
        },
        **{k: network_card(purified={"n": 1000, f"{k}-1": 0.8}) for k in ("clean", "adaptive", "label", "label-n0")},
    }
    for name, facts in networks.items():
        write_json(folder / "diffusion" / name / "facts.json", facts)


def write_autoattack(root, dataset: str, robust: Mapping[str, float], n: int = 1000) -> None:
    """Write what AutoAttack measured of each classifier."""
    for name, share in robust.items():
        write_json(root / f"data/{dataset}/pieces/autoattack-{name}.json", autoattack_piece(name, share_bits(share, n)))


def write_matched(root, dataset: str, part: str, piece: dict) -> None:
    """Write a piece of the matched set."""
    write_json(root / f"data/{dataset}/pieces/matched-{part}.json", piece)
