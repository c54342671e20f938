"""What is checked of a network's files before its weights are used: card, configuration, scheduler and weights.

A network's folder holds `config.json` and the weights in diffusers' format, `facts.json`, and `card.json`: the
network's name, the SHA-256 of these files, and that of the `recipe.json` beside the folder, which says what the network
is a function of. A changed byte, a network under another's name and another recipe are refused by name.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lib.utils.files import write_json
from lib.utils.validation import Integer, PositiveInt, check_value, setting_types

CARD, CONFIG, FACTS, RECIPE = "card.json", "config.json", "facts.json", "recipe.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
REMEDY = "delete the folder and run the stage that trains it again"
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}  # of diffusers' schedulers: the target here
SCHEDULERS = ("DDPM", "DDIM", "PNDM", "DPMSolver", "UniPC", "DEIS", "Euler", "Heun", "LMS", "KDPM2")
SCHEDULE = {  # what this project's levels are, with the reading of a missing entry: diffusers' defaults
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
}
Widths = Annotated[tuple[Annotated[Integer, Field(ge=1, le=8192)], ...], Field(min_length=1, max_length=8)]
HeadWidth: Any = PositiveInt
CONFIG_TYPES: dict[str, Any] = {
    "block_out_channels": Widths,
    "layers_per_block": Annotated[Integer, Field(ge=1, le=16)],
    "norm_num_groups": PositiveInt,
    "attention_head_dim": HeadWidth | None,
    "add_attention": bool,
    "dropout": Annotated[float, Field(ge=0, lt=1)],
}
PLAIN_NETWORK = {  # entries with one value that this project's samplers can use, and why
    "class_embed_type": (None, "a class-conditional network needs labels"),
    "num_class_embeds": (None, "a class-conditional network needs labels"),
    "center_input_sample": (False, "it would shift images that are in [-1, 1] already"),
    "time_embedding_type": ("positional", "networks here take indices of the schedule"),
}
MOST_OUTPUT = 1e3  # a network that predicts noise or v of images in [-1, 1] is far below


def refuse(path: Path, problem: str, remedy: str = REMEDY) -> NoReturn:
    """Raise the ValueError of a file that cannot be used, in one line."""
    raise ValueError(f"{path}: {problem}: {remedy}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file; ValueError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        refuse(path, f"cannot be read ({error.strerror})")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object as a dict; ValueError for a key that stands there twice."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def read_object(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Return the JSON object in a file; ValueError names a file that holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        refuse(path, f"expected a JSON object, got none ({' '.join(str(error).split())[:100]})", remedy)
    return value if isinstance(value, dict) else refuse(path, f"expected a JSON object, got {str(value)[:40]}", remedy)


def write_card(folder: Path, name: str, recipe: Path) -> None:
    """Write the card of the network in a folder, which will be known as `name` beside `recipe`, if that exists."""
    files = {file: sha256(folder / file) for file in (CONFIG, FACTS, WEIGHTS)}
    write_json(folder / CARD, {"name": name, "files": files, "recipe": sha256(recipe) if recipe.exists() else None})


def bind_to_recipe(models: Path, content: bytes) -> None:
    """State on the cards of all networks in a folder the recipe that is about to be written beside them."""
    for path in sorted(models.glob(f"*/{CARD}")):
        write_json(path, read_object(path) | {"recipe": hashlib.sha256(content).hexdigest()})


def check_card(folder: Path, files: tuple[str, ...] = (CONFIG, FACTS, WEIGHTS)) -> None:
    """Check the files of a network, its name and the recipe beside it against its card.

    Raises ValueError, which names what was changed: a file, the folder's name, or the recipe.
    """
    path, card = folder / CARD, read_object(folder / CARD)
    hashes = card.get("files")
    if set(card) != {"name", "files", "recipe"} or not isinstance(hashes, dict) or set(hashes) < {CONFIG, WEIGHTS}:
        refuse(path, f"expected name, files and recipe, got {', '.join(sorted(card))[:80]}")
    if card["name"] != folder.name:
        refuse(folder, f"expected the network {folder.name!r}, got that of the name {str(card['name'])[:40]!r}")
    for file in files:
        if hashes.get(file) != sha256(folder / file):
            refuse(folder / file, f"expected the file that {CARD} states, got another: it was changed or exchanged")
    recipe = folder.parent / RECIPE
    if recipe.exists() and card["recipe"] != sha256(recipe):
        refuse(recipe, f"expected the recipe of the network {folder.name!r}, got another: it was changed or exchanged")


def check_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Check that a U-Net's configuration is one that this project's samplers can use.

    Args:
        config: of diffusers' UNet2DModel.
        path: of the file, for messages.

    Returns:
        The configuration; `sample_size` is a number, or None where any size is taken.

    Raises:
        ValueError: for another class, unknown entries, and a network that takes or gives something else.
    """
    remedy = "choose an unconditional UNet2DModel that predicts noise or v of images"
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        refuse(path, f"expected a UNet2DModel, got {str(kind)[:40]!r}", remedy)
    known = {k: v for k, v in config.items() if not k.startswith("_")}
    if unknown := set(known) - set(setting_types(UNet2DModel.__init__)):
        refuse(path, f"expected entries of UNet2DModel, got {', '.join(sorted(unknown))[:80]}", remedy)
    for name, (value, reason) in PLAIN_NETWORK.items():
        if known.get(name, value) != value:
            refuse(path, f"expected {name} {value!r}, got {str(known[name])[:40]!r}: {reason}", remedy)
    channels, out = known.get("in_channels", 3), known.get("out_channels", 3)
    if (channels, out) in ((3, 6), (1, 2)):
        refuse(path, f"expected {channels} output channels, got {out}: a learned variance is not supported", remedy)
    if channels not in (1, 3) or out != channels or isinstance(channels, bool) or isinstance(out, bool):
        got = f"in_channels {str(channels)[:20]}, out_channels {str(out)[:20]}"
        refuse(path, f"expected 1 or 3 channels, in and out, got {got}", remedy)
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    try:
        for name, annotation in CONFIG_TYPES.items():
            if name in lists:
                check_value(name, lists[name], annotation)
        size = lists.get("sample_size")
        sides = set(size) if isinstance(size, tuple) and len(size) == 2 else {size}
        if len(sides) > 1:
            raise ValueError(f"expected a square sample_size, got {size}")
        side = check_value("sample_size", sides.pop(), PositiveInt | None)
        halvings = 2 ** (len(lists.get("block_out_channels", (1,) * 4)) - 1)
        if side and side % halvings:
            raise ValueError(f"expected a sample_size divisible by {halvings}, got {side}")
    except ValueError as error:
        refuse(path, str(error), remedy)
    return dict(config) | {"sample_size": side}


def check_scheduler(path: Path) -> str | None:
    """Check that a scheduler's configuration states the levels of this project's networks, DDPM's linear betas.

    How a scheduler draws (`clip_sample`, its order, its spacing) says nothing of the network, and is ignored.

    Args:
        path: of diffusers' scheduler_config.json.

    Returns:
        The network's target, "epsilon" or "v"; None where `path` does not exist.

    Raises:
        ValueError: for other levels and another target.
    """
    if not path.exists():
        return None
    remedy = "choose a network of DDPM's linear betas, 1000 steps from 0.0001 to 0.02"
    config = read_object(path, remedy)
    kind = str(config.get("_class_name", "DDPMScheduler"))
    if not kind.startswith(SCHEDULERS):
        refuse(path, f"expected a scheduler of noise levels as DDPM's, got {kind[:40]!r}", remedy)
    for name, value in SCHEDULE.items():
        stated = config.get(name, value)
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (stated, value))
        if not (
            math.isclose(stated, value, rel_tol=1e-6) if numbers else type(stated) is type(value) and stated == value
        ):
            refuse(path, f"expected {name} {value!r}, got {str(stated)[:40]!r}", remedy)
    if str(config.get("variance_type", "")).startswith("learned"):
        refuse(path, f"expected a fixed variance, got variance_type {config['variance_type']!r}", remedy)
    target = config.get("prediction_type", "epsilon")
    if not isinstance(target, str) or target not in PREDICTION_TYPES:
        refuse(path, f"expected prediction_type {' or '.join(PREDICTION_TYPES)}, got {str(target)[:40]!r}", remedy)
    return PREDICTION_TYPES[target]


def stated_target(folder: Path) -> tuple[str, Path] | None:
    """Return what the schedulers in and beside a network's folder say that it predicts, and the file that says so."""
    places = (folder, folder / "scheduler", folder.parent / "scheduler", folder.parent)
    stated = [(target, place / SCHEDULER) for place in places if (target := check_scheduler(place / SCHEDULER))]
    if len({target for target, _ in stated}) > 1:
        refuse(stated[0][1], f"expected one prediction_type, got another in {stated[-1][1]}", "remove the wrong one")
    return stated[0] if stated else None


def check_weights(weights: Mapping[str, Tensor], path: Path, remedy: str = REMEDY) -> None:
    """Check that all weights are finite numbers; ValueError names the first that is not."""
    for name, weight in weights.items():
        if not weight.is_floating_point():
            refuse(path, f"expected floating-point weights, got {weight.dtype} in {name}", remedy)
        if not weight.isfinite().all():
            refuse(path, f"expected finite weights, got NaN or infinity in {name}", remedy)


def check_weights_file(folder: Path) -> None:
    """Check that the weights of a folder are in one safetensors file, of floating-point numbers, before it is read."""
    path = folder / WEIGHTS
    if index := sorted(folder.glob("*.index.json")):
        refuse(index[0], "expected all weights in one file, got several", "save the network in one file")
    if not path.is_file():
        others = ", ".join(p.name for p in sorted(folder.glob("*.bin")))[:80]
        refuse(folder, f"expected {WEIGHTS}, got {others or 'no weights'}", "save the network as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        refuse(path, f"expected safetensors, got a file that cannot be read ({' '.join(str(error).split())[:80]})")
    if wrong := [f"{kind} in {name}" for name, kind in types.items() if kind not in ("F32", "F16", "BF16", "F64")]:
        refuse(path, f"expected floating-point weights, got {wrong[0]}")


@torch.no_grad()
def probe(net: nn.Module, path: Path) -> None:
    """Check that a network's output for one noisy image is an image of finite, plausible numbers."""
    config: Any = net.config
    side = config.sample_size or 2 ** (len(config.block_out_channels) + 1)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, config.in_channels, side, side, generator=generator)
    try:
        output = net(z, torch.tensor([99.0])).sample
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        refuse(path, f"expected a network of images {side} x {side}, got {' '.join(str(error).split())[:120]}")
    if output.shape != z.shape or not output.isfinite().all() or output.abs().max() > MOST_OUTPUT:
        largest = output.abs().max().item()
        refuse(path, f"expected output of size 1 for one noisy image, got up to {largest:.3g}: the weights are broken")
