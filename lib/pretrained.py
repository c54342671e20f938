"""Networks that come with the repository: `data/pretrained/<data set>/<name>`, each with a card.

Large ones have half precision, those of small images the weights that were measured.

A classifier's folder holds `weights.safetensors` and `card.json`: what it is, the weights' SHA-256, and how it came
about (data, recipe, commit, command, device, minutes), what was measured and its limits. A folder of diffusion networks
is one that `lib.purify.load_purifier` reads: `recipe.json` and a folder for each network, whose `facts.json` says the
same.
"""

import copy
import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from lib.diffusion.network import save_network
from lib.diffusion.network_files import CARD, RECIPE
from lib.models import build_classifier
from lib.utils.artifacts import load_weights, save_weights
from lib.utils.files import ROOT, read_json, write_json
from lib.utils.validation import Name, check_value

PRETRAINED = Path("data/pretrained")
CLASSIFIER_WEIGHTS = "weights.safetensors"
DIFFUSION_FOLDER = "diffusion"  # a data set's folder of diffusion networks
MEASURED = ("data", "recipe", "commit", "command", "device", "minutes", "metrics", "limits")  # what every card says


def pretrained_folder(name: str) -> Path:
    """Return the folder of a name such as "cifar10/resnet18".

    Args:
        name: `<data set>/<name>`, plain names both.

    Returns:
        The folder, which need not exist.

    Raises:
        ValueError: for another form.
    """
    parts = str(name).split("/")
    if len(parts) != 2:
        raise ValueError(f"expected a name such as cifar10/resnet18, got {name!r}")
    for part in parts:
        check_value("each part of a network's name", part, Name)
    return ROOT / PRETRAINED / parts[0] / parts[1]


def pretrained_names() -> list[str]:
    """Return the names of all classifiers and folders of diffusion networks that are there, sorted."""
    paths = [*(ROOT / PRETRAINED).glob(f"*/*/{CARD}"), *(ROOT / PRETRAINED).glob(f"*/*/{RECIPE}")]
    return sorted("/".join(path.parent.parts[-2:]) for path in paths)


def classifier_names() -> list[str]:
    """Return the names of all classifiers that are there, sorted."""
    return [name for name in pretrained_names() if (pretrained_folder(name) / CARD).is_file()]


def diffusion_names() -> list[str]:
    """Return the names of all folders of diffusion networks that are there, `<data set>/diffusion`, sorted."""
    return [name for name in pretrained_names() if name.endswith(f"/{DIFFUSION_FOLDER}")]


def round_weights(net: nn.Module) -> nn.Module:
    """Round a network's weights to half precision in place: measure it after that, as it will be loaded.

    Args:
        net: with float32 weights.

    Returns:
        The network, float32 again.
    """
    return net.half().float()


def check_about(about: dict[str, Any]) -> None:
    """Raise ValueError for a card that leaves something out of `MEASURED`."""
    if missing := [key for key in MEASURED if key not in about]:
        raise ValueError(f"expected a card with {', '.join(MEASURED)}, got none for {', '.join(missing)}")


def save_classifier(
    name: str, net: nn.Module, network: dict[str, Any], about: dict[str, Any], half: bool = True
) -> Path:
    """Write a classifier and its card.

    Args:
        name: "cifar10/resnet18", say.
        net: the network; it is not changed.
        network: arguments of `lib.models.build_classifier` that build it, without the seed.
        about: the entries of `MEASURED`.
        half: whether in half precision.

    Returns:
        The folder.

    Raises:
        ValueError: for a card that leaves something out, and weights that are not finite.
    """
    check_about(about)
    folder = pretrained_folder(name)
    save_weights(copy.deepcopy(net).half() if half else net, folder / CLASSIFIER_WEIGHTS)
    digest = hashlib.sha256((folder / CLASSIFIER_WEIGHTS).read_bytes()).hexdigest()
    write_json(folder / CARD, {"name": name, "network": network, "half": half, "sha256": digest} | about)
    return folder


def load_classifier(name: str) -> nn.Module:
    """Load a classifier that comes with the repository, after checking its weights against their card.

    Args:
        name: one of `pretrained_names`.

    Returns:
        The network, float32, frozen, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: for a name that is not there; says which are.
        ValueError: for weights that are not those of the card.
    """
    folder = pretrained_folder(name)
    if not (folder / CARD).exists():
        known = ", ".join(pretrained_names()) or "none"
        raise FileNotFoundError(f"expected a classifier {name!r} in {PRETRAINED}, got none: there are {known}")
    card = read_json(folder / CARD)
    if hashlib.sha256((folder / CLASSIFIER_WEIGHTS).read_bytes()).hexdigest() != card["sha256"]:
        raise ValueError(
            f"{folder / CLASSIFIER_WEIGHTS}: expected the weights that {CARD} states, got others: restore the file"
        )
    net = build_classifier(**card["network"], seed=0)
    net = load_weights(net.half() if card["half"] else net, folder / CLASSIFIER_WEIGHTS)
    return net.float().eval().requires_grad_(False)


def save_diffusion_network(
    name: str,
    kind: str,
    net: nn.Module,
    history: list[dict[str, Any]],
    about: dict[str, Any],
    half: bool = True,
    **facts: Any,
) -> Path:
    """Write one diffusion network in the folder of its name.

    Args:
        name: of the folder, "cifar10/diffusion", say; `lib.distillation.few_step.save_config` writes its recipe.
        kind: "teacher", "cd" or another name of `lib.purify.load_purifier`.
        net: the network; it is not changed.
        history: of its training, one dict per epoch.
        about: the entries of `MEASURED`.
        half: whether in half precision.
        **facts: others that belong to the network, such as the `skip` of a consistency student.

    Returns:
        The folder of the network.

    Raises:
        ValueError: for a card that leaves something out, and weights that are not finite.
    """
    check_about(about)
    folder = pretrained_folder(name) / kind
    folder.parent.mkdir(parents=True, exist_ok=True)
    net = copy.deepcopy(net).half() if half else net
    save_network(net, folder, {"history": history, "about": about, **facts})
    return folder
