"""What the commands take by name: classifiers, purifiers and images."""

import importlib
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib import pretrained
from lib.commands.image_sources import ImageSource, dataset_source, folder_source, npz_source
from lib.data import SIZES, Split, load_dataset
from lib.diffusion.network_files import CARD
from lib.experiments.diffpure import build_defence, coarse_name
from lib.experiments.samples import evaluation_images
from lib.purified_classifier import PurifiedClassifier
from lib.purify import IdentityPurifier, purifier_kinds
from lib.utils.device import default_device
from lib.utils.files import read_json
from lib.utils.images import RESIZE_RULE
from lib.utils.random_state import RandnLike, seeded_noise
from lib.utils.seeds import seeded_generator

ROBUSTBENCH, ROBUSTBENCH_DATASET = "robustbench:", "cifar10"  # the data set where the name says none
CHANNELS, SIZE = 3, 32  # of the images of a folder, where nothing says otherwise
ASKED_TWICE = 4  # images that are passed twice, to see whether answers are random


class OwnNoise(nn.Module):
    """The purifier of a model whose noise is its own: leaves images as they are and says that answers are random."""

    evaluations, deterministic = 1, False

    def __init__(self, independent_noise: bool) -> None:
        super().__init__()
        self.independent_noise = independent_noise

    def forward(self, x: Tensor, randn_like: RandnLike | None = None) -> Tensor:
        return x


def parse_radius(text: str) -> float:
    """Return a radius such as 0.1 or 8/255 in pixel units; ValueError for other text."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a radius such as 8/255 or 0.1, got {text!r}") from None


def import_object(name: str, what: str) -> Any:
    """Return what `module:name` stands for; the module is found from the current folder, too.

    Args:
        name: of module and function or object.
        what: should be there, in messages.

    Returns:
        The object.

    Raises:
        ValueError: if there is no such module or name.
    """
    module, _, attribute = name.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"expected a function {name!r} that returns {what}, got none: {error}") from error


def load_factory(name: str) -> Callable:
    """Return the model that a function makes: `module:function`, called without arguments.

    A model itself, `module:model`, will do. Raises ValueError if there is none, it needs arguments, or what it returns
    cannot be called.
    """
    model = import_object(name, "a model")
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise ValueError(f"expected {name!r} to be a function that returns a model, got {type(model).__name__}")
    model = model()
    if not callable(model):
        raise ValueError(f"expected {name!r} to return a function of images, got {type(model).__name__}")
    return model


def load_own_dataset(name: str) -> Any:
    """Return the torch Dataset of `module:function`, called without arguments, or `module:dataset` itself.

    Raises ValueError if there is none, or what is there has no length and items.
    """
    dataset = import_object(name, "a torch Dataset")
    if callable(dataset) and (isinstance(dataset, type) or not hasattr(dataset, "__getitem__")):
        dataset = dataset()
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(f"expected {name!r} to return a torch Dataset, with length, got {type(dataset).__name__}")
    return dataset


def image_form(model: str, purifier: str | None) -> tuple[int | None, int | None]:
    """Return channels and size of the images that a named purifier or classifier takes; None where no name says it."""
    if purifier is not None:
        for config in map(read_json, sorted(purifier_place(purifier)[0].glob("*/config.json"))):
            return config["in_channels"], config["sample_size"]
    card = None if ":" in model else pretrained.pretrained_folder(model) / CARD
    network = read_json(card)["network"] if card is not None and card.is_file() else {}
    return network.get("in_channels"), network.get("size")


def named_model(name: str, dataset: str, norm: str = "Linf") -> Callable:
    """Return a model by name.

    Args:
        name: of a classifier that comes with the repository (`digits/trades`), `module:function`, or
            `robustbench:NAME` or `robustbench:DATASET/NAME` where that package is installed.
        dataset: of the images, for RobustBench, whose own default is taken for images of one's own.
        norm: of the attack, for RobustBench.

    Returns:
        Logits of images in [0, 1]; a network is on the device of experiments, in eval mode.

    Raises:
        FileNotFoundError: for a name that is not there; it says which are.
        ValueError: for what is no model.
    """
    if name.startswith(ROBUSTBENCH):
        try:
            zoo = importlib.import_module("robustbench.utils")
        except ImportError:
            raise ValueError(f"{name}: expected the package robustbench, got none: pip install robustbench") from None
        wanted_set, _, entry = name.removeprefix(ROBUSTBENCH).rpartition("/")
        wanted_set = wanted_set or (dataset if dataset in SIZES else ROBUSTBENCH_DATASET)
        try:
            model = zoo.load_model(entry, dataset=wanted_set, threat_model=norm)
        except (KeyError, AssertionError) as error:
            expected = f"{name}: expected a model of robustbench for {wanted_set} and {norm}"
            raise ValueError(f"{expected}, got none: {' '.join(str(error).split())[:120]}") from error
    else:
        model = load_factory(name) if ":" in name else pretrained.load_classifier(name)
    return model.to(default_device()).eval() if isinstance(model, nn.Module) else model


def purifier_place(name: str) -> tuple[Path, str]:
    """Return folder and name of a purifier, `digits/adaptive-1` of this repository or `FOLDER/adaptive-1`.

    Raises:
        FileNotFoundError: if there are no networks.
    """
    folder, _, purifier = name.rpartition("/")
    own = Path(folder)
    models = own if (own / "recipe.json").is_file() else pretrained.pretrained_folder(f"{folder or 'none'}/diffusion")
    if not models.is_dir():
        there = ", ".join(n.removesuffix("/diffusion") for n in pretrained.pretrained_names() if "/diffusion" in n)
        expected = f"expected a purifier such as digits/adaptive-1, of the data sets {there or '(none yet)'}"
        raise FileNotFoundError(f"{expected}, or FOLDER/adaptive-1, got {name!r}")
    return models, purifier


def answers_vary(model: Callable, x: Tensor) -> bool:
    """Say whether a model answers the same images differently in two calls."""
    with seeded_noise(model, 0, x.device), torch.no_grad():
        z, again = (model(x[:ASKED_TWICE]) for _ in range(2))
    return not torch.allclose(z, again, rtol=0, atol=1e-4 * z.abs().max().item(), equal_nan=True)


def compose_defence(
    model: Any, purifier: str | None, x: Tensor
) -> tuple[PurifiedClassifier, PurifiedClassifier | None]:
    """Return a defence, and the same with a purifier of few steps where its own has many.

    Args:
        model: a classifier, or a whole defence.
        purifier: name of one to put in front, see `purifier_place`; None for none.
        x: images that will be attacked (n, c, h, w).

    Returns:
        The defence; the coarse one, on which attacks are model, or None.
    """
    if purifier is not None:
        models, name = purifier_place(purifier)
        coarse = coarse_name(name) if name.rsplit("-", 1)[0] in purifier_kinds(models) else None
        whole = build_defence(models, name, model, pixels=x.numel())
        return whole, build_defence(models, coarse, model, pixels=x.numel()) if coarse else None
    if isinstance(model, PurifiedClassifier):
        return model, None
    vary = answers_vary(model, x)
    own = OwnNoise(bool(getattr(model, "independent_noise", False))) if vary else IdentityPurifier()
    return PurifiedClassifier(own, model).to(default_device()), None


def open_source(source: str, channels: int | None = None, size: int | None = None) -> ImageSource:
    """Return images of one's own by name.

    Args:
        source: an .npz file, one of its arrays (`FILE.npz:x_adv`), a folder of class folders, or the torch Dataset of
            `module:function`.
        channels: of the images of a folder, and of Pillow's in a Dataset; 3 when None.
        size: of the images of a folder, in pixels, 32 when None, and of a Dataset, as they are when None.

    Returns:
        The source.

    Raises:
        FileNotFoundError: for what is not there.
        ValueError: for images that are none, and labels of another number.
    """
    file, _, array = source.rpartition(".npz:")
    path = Path(f"{file}.npz" if file else source)
    if path.is_dir():
        return folder_source(path, channels or CHANNELS, size or SIZE)
    if path.exists():
        return npz_source(path, array if file else "x")
    if ":" in source and not file:
        return dataset_source(load_own_dataset(source), source, channels or CHANNELS, size)
    known = ", ".join(SIZES)
    raise FileNotFoundError(f"expected one of {known}, an .npz file, a folder or module:function, got {source!r}")


def draw_images(
    source: str, count: int, seed: int, channels: int | None = None, size: int | None = None
) -> tuple[Split, list[int], dict[str, Any]]:
    """Return images to attack, on the device of experiments, their numbers, and what a record says of them.

    Args:
        source: a data set, whose test split it is, or one's own images, see `open_source`.
        count: at most so many, drawn by the seed; fewer are the first of more.
        seed: of the draw.
        channels: see `open_source`.
        size: see `open_source`.

    Returns:
        The images and labels; their places in the source; kind of source, shape, how many were resized and by what
        rule.

    Raises:
        FileNotFoundError: for what is not there.
        ValueError: for images that are none, and labels of another number.
    """
    if source in SIZES:
        points, numbers = evaluation_images(load_dataset(source), count, seed)
        facts, resized = {"kind": "test split"}, 0
    else:
        images = open_source(source, channels, size)
        numbers = torch.randperm(images.n, generator=seeded_generator(seed, "points"))[:count].tolist()
        (points, resized), facts = images.read(numbers), images.facts
    facts = facts | {"shape": list(points.x.shape[1:]), "resized": resized}
    facts |= {"rule": RESIZE_RULE} if resized else {}
    return Split(*(t.to(default_device()) for t in points)), numbers, facts


def load_images(
    source: str, count: int, seed: int, channels: int | None = None, size: int | None = None
) -> tuple[Split, list[int]]:
    """Return images to attack and their numbers, see `draw_images`."""
    return draw_images(source, count, seed, channels, size)[:2]


def describe(model: str, purifier: str | None) -> dict[str, Any]:
    """Return the names of a defence's parts and the defence's own."""
    return {"name": model if purifier is None else f"{purifier} before {model}", "model": model, "purifier": purifier}
