"""Take networks of a finished run into the repository: `python -m lib.pipeline.publish PROFILE SEED`.

Of one seed of experiment 5: its diffusion networks, the ordinary classifier that they defend, and TRADES' classifier of
the same width, which the run does not keep and which is trained again, to the bit on the same kind of processor. Cards
state what the run's record measured of them.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from lib import pretrained
from lib.data import Data, load_dataset
from lib.diffusion.network import load_facts, load_network
from lib.distillation.few_step import load_config, save_config
from lib.experiments.diffpure import train_robust
from lib.experiments.diffpure_students import NATURAL, TRADES
from lib.experiments.robust_distillation import AdversarialRecipe
from lib.models import build_classifier, predict_classes
from lib.utils.artifacts import load_record, load_weights, results_dir
from lib.utils.draws import NO_ATTACK, unpack_draws
from lib.utils.files import read_json
from lib.utils.processes import print_in_any_locale

PUBLISHED_NETWORKS = ("teacher", "cd", "pd-1", "clean", "adaptive", "label", "label-n0")
CARD_MEASURES = ("clean", "control", "accuracy", "worst_of_10", "loss", "multiply_adds")  # of a defence in the record


def measured_rows(record: Mapping[str, Any], name: str) -> dict[str, dict[str, float]]:
    """Return what a record measured of the defences whose purifier is one network, or that are one classifier."""
    solvers = ("sde", "ddpm", "ddim") if name == "teacher" else (name,)
    out = {}
    for defence, row in record["metrics"]["defences"].items():
        parts = {row["purifier"].rsplit("-", 1)[0], row["classifier"] if row["evaluations"] == 0 else ""}
        if parts & set(solvers):
            out[defence] = {key: row[key] for key in CARD_MEASURES}
    return out


def run_facts(profile: str, seed: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a card that all networks of a run share; FileNotFoundError if it was not made here."""
    path = results_dir(profile, "provenance") / f"dp-s{seed}.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected a run of this machine, got none: `dvc repro dp@{profile}-{seed}`")
    run, metrics = read_json(path), record["metrics"]
    effort = ", ".join(f"{key} {value}" for key, value in metrics["effort"].items())
    limits = f"seed {seed} alone; accuracy under the matched set of attacks, Linf, ε = {metrics['eps']:g} ({effort}), "
    limits += f"on {metrics['n_test']} test images; control: right in ten of ten draws without an attack"
    return {
        "commit": run["git_commit"],
        "command": f"python -m lib.pipeline.publish {profile} {seed}",
        "device": run["device"],
        "minutes": run["wall_seconds"] / 60,
        "limits": limits,
        "parameters": run["parameters"],
    }


def check_answers(net: nn.Module, data: Data, record: Mapping[str, Any], defence: str) -> None:
    """Raise ValueError unless a classifier answers the run's images as the record has it of a defence."""
    rows, packed = record["outcomes"]["images"], record["outcomes"]["correct"][defence][NO_ATTACK]
    right = predict_classes(net, data.test.x[rows]) == data.test.y[rows]
    if differing := int((right.numpy() != unpack_draws(packed)[0]).sum()):
        expected = f"expected the classifier that {record['profile']}'s record calls {defence!r}"
        raise ValueError(f"{expected}, got other answers to {differing} of {len(rows)} images: run it again here")


def publish_classifiers(data: Data, seed: int, profile: str, about: dict[str, Any], record: dict[str, Any]) -> None:
    """Write the ordinary classifier of a run and TRADES' one, which is trained."""
    p = about["parameters"]
    robust = AdversarialRecipe(
        "cnn", p["classifier_width"], p["robust_epochs"], p["robust_batch"], p["robust_lr"], p["eps"], p["robust_steps"]
    )
    network: dict[str, Any] = data.spec() | {"arch": "cnn", "width": p["classifier_width"]}
    weights = results_dir(profile, "models") / f"dp-s{seed}" / "classifier.safetensors"
    natural = load_weights(build_classifier(**network, seed=seed), weights)
    natural_recipe = {key: p[f"classifier_{key}"] for key in ("width", "epochs", "lr")}
    trained = {NATURAL: (natural, natural_recipe)}
    trained[TRADES] = train_robust(data, data.name, seed, TRADES, robust), asdict(robust)
    for name, (net, recipe) in trained.items():
        check_answers(net, data, record, "none" if name == NATURAL else name)
        own = about | {"recipe": recipe, "metrics": measured_rows(record, name)}
        del own["parameters"]
        pretrained.save_classifier(f"{data.name}/{name}", net, network, own, half=False)


def publish_diffusion(data: Data, seed: int, profile: str, about: dict[str, Any], record: dict[str, Any]) -> None:
    """Write the diffusion networks `PUBLISHED_NETWORKS` of a run."""
    source = results_dir(profile, "models") / f"dp-s{seed}"
    folder = pretrained.pretrained_folder(f"{data.name}/diffusion")
    folder.mkdir(parents=True, exist_ok=True)
    recipe, scalings = load_config(source)
    save_config(folder, recipe, scalings)
    for kind in PUBLISHED_NETWORKS:
        facts = load_facts(source / kind)
        own = about | {"recipe": asdict(recipe), "metrics": measured_rows(record, kind)}
        del own["parameters"]
        history = facts.pop("history", [])
        net = load_network(source / kind, target=recipe.target)
        pretrained.save_diffusion_network(f"{data.name}/diffusion", kind, net, history, own, half=False, **facts)


def main(arguments: list[str] | None = None) -> None:
    """Write the networks of one seed of a profile's experiment 5 to `data/pretrained`, with cards."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.publish", description=main.__doc__)
    parser.add_argument("profile", help="such as digits")
    parser.add_argument("seed", type=int, help="one of those that ran here")
    args = parser.parse_args(arguments)
    try:
        record = load_record(args.profile, "dp", args.seed)
        about = run_facts(args.profile, args.seed, record)
        data = load_dataset(about["parameters"]["dataset"])
        about["data"] = {"data set": data.name, "training images": len(data.train.y)}
        publish_classifiers(data, args.seed, args.profile, about, record)
        publish_diffusion(data, args.seed, args.profile, about, record)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(", ".join(name for name in pretrained.pretrained_names() if name.startswith(f"{data.name}/")))


if __name__ == "__main__":
    main()
