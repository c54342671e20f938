"""The U-Net, how it is saved and loaded, what it predicts, and its training loss."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from lib.diffusion import network_files as files
from lib.diffusion.schedule import ABAR, EpsModel, Level, Time, alpha_sigma, to_model_range
from lib.utils.files import part_path, sweep_leftovers, write_json
from lib.utils.seeds import derive_seed
from lib.utils.validation import Integer, PositiveInt, check_settings, check_value

PREDICTION_TARGETS = ("epsilon", "v")


def build_unet(
    in_channels: int = 1,
    size: PositiveInt = 8,
    channels: Sequence[int] = (24, 48),
    *,
    attention: bool = False,
    seed: Integer,
) -> nn.Module:
    """Build diffusers' U-Net; its initial weights depend on `seed` alone.

    Args:
        in_channels: of the images, 1 or 3.
        size: height and width of the images, divisible by 2 for each level but the first.
        channels: of each level.
        attention: self-attention in the lowest level.
        seed: of the initial weights.

    Returns:
        The network, of (z, t), in train mode.

    Raises:
        ValueError: for a size that cannot be halved so often and other settings out of range.
    """
    size, attention, seed = check_settings(build_unet, {"size": size, "attention": attention, "seed": seed}).values()
    in_channels = check_value("in_channels", in_channels, Literal[1, 3])
    channels = check_value("channels", tuple(channels), tuple[PositiveInt, ...])
    if not channels:
        raise ValueError("expected channels for one level or more, got none")
    if attention and channels[-1] % 8:
        raise ValueError(f"expected the last of channels to be divisible by 8 for attention, got {channels[-1]}")
    if size % 2 ** (len(channels) - 1):
        raise ValueError(
            f"expected a size divisible by {2 ** (len(channels) - 1)} for channels {channels}, got {size}: "
            "give fewer channels"
        )
    lowest = "Attn" if attention else ""
    down = ["DownBlock2D"] * (len(channels) - 1) + [f"{lowest}DownBlock2D"]
    up = [f"{lowest}UpBlock2D"] + ["UpBlock2D"] * (len(channels) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "unet"))
        return UNet2DModel(
            sample_size=size,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=tuple(channels),
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            layers_per_block=1,
            norm_num_groups=math.gcd(8, *channels),
            attention_head_dim=8,
            add_attention=attention,
        )


def save_network(net: nn.Module, folder: Path, facts: dict | None = None) -> None:
    """Write a U-Net in diffusers' own format, safetensors, with `facts.json` and its card; `folder` is always whole.

    The card states the recipe.json beside the folder, if there is one (see `lib.distillation.few_step.save_config`).

    Raises:
        TypeError: for another kind of network.
        ValueError: for one that `load_network` would refuse, such as one with weights that are not finite.
    """
    if not isinstance(net, UNet2DModel):
        raise TypeError(f"expected a diffusers UNet2DModel, got {type(net).__name__}")
    files.check_config(net.config, folder)
    files.check_weights(net.state_dict(), folder, "train it again with a smaller learning rate")
    sweep_leftovers(folder.parent, folder.name)
    part = part_path(folder)
    shutil.rmtree(part, ignore_errors=True)
    net.save_pretrained(part, safe_serialization=True)
    write_json(part / files.FACTS, facts or {})
    files.write_card(part, folder.name, folder.parent / files.RECIPE)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def load_network(folder: Path, *, target: str | None = None, foreign: bool = False) -> nn.Module:
    """Load the network that `save_network` wrote, after checking it against its card.

    Args:
        folder: of the network.
        target: what it must predict, where a scheduler's configuration beside it says so.
        foreign: whether to take a plain diffusers UNet2DModel, too, or a pipeline with one in `unet/`, which has no
            card: its configuration, weights and scheduler are checked. Weights in other precisions become float32.

    Returns:
        The network, in eval mode; `prediction_target` is what a scheduler's configuration says, if there is one.

    Raises:
        FileNotFoundError: without a network.
        ValueError: for a changed or foreign folder; the message names the file.
    """
    folder = Path(folder)
    if (folder / "model_index.json").exists() and (folder / "unet" / files.CONFIG).exists():
        if not foreign:
            files.refuse(
                folder, "expected a network, got a pipeline of diffusers", f"give its folder {folder / 'unet'}"
            )
        folder = folder / "unet"
    config_path = folder / files.CONFIG
    if not config_path.exists():
        raise FileNotFoundError(f"expected a network in {folder}: run `dvc repro` for the experiment that trains it")
    if (folder / files.CARD).exists():
        files.check_card(folder)
    elif not foreign or (folder / files.FACTS).exists():
        files.refuse(folder, f"expected {files.CARD}, which says which weights these are, got none")
    config = files.check_config(files.read_object(config_path), config_path)
    stated = files.stated_target(folder)
    if target and stated and stated[0] != target:
        files.refuse(stated[1], f"expected a network that predicts {target}, got {stated[0]}", "change the recipe")
    files.check_weights_file(folder)
    net = _read_unet(folder).eval()
    net.register_to_config(_name_or_path=folder.name)  # diffusers records the whole path, which differs elsewhere
    net.register_to_config(sample_size=config["sample_size"])
    files.check_weights(net.state_dict(), folder / files.WEIGHTS)
    files.probe(net, folder / files.WEIGHTS)
    if stated:
        net.prediction_target = stated[0]
    return net


def _read_unet(folder: Path) -> Any:
    """Return diffusers' network in a folder; ValueError where configuration and weights do not belong together."""
    try:
        loaded: Any = UNet2DModel.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            torch_dtype=torch.float32,
        )
        net, info = loaded
    except Exception as error:  # whatever diffusers, safetensors and torch raise for what does not fit
        problem = f"diffusers cannot load it ({' '.join(str(error).split())[:120]})"
        raise ValueError(f"{folder}: {problem}: {files.REMEDY}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            problem = f"expected the weights of {files.CONFIG}, got {len(names)} {kind.replace('_', ' ')}"
            files.refuse(folder / files.WEIGHTS, f"{problem}, such as {names[0][:80]}")
    return net


def load_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that `save_network` wrote with a network; ValueError where they were changed."""
    files.check_card(folder, (files.FACTS,))
    return files.read_object(folder / files.FACTS)


def check_target(target: str) -> None:
    """Raise ValueError for a prediction target that is none of `PREDICTION_TARGETS`."""
    if target not in PREDICTION_TARGETS:
        raise ValueError(f"expected a target among {', '.join(PREDICTION_TARGETS)}, got {target!r}")


def to_eps(output: Tensor, z: Tensor, level: Level, target: str) -> Tensor:
    """Return ε from the output of a network of `target` for z: ε itself, or v = α ε − s x (Salimans and Ho 2022)."""
    alpha_t, s_t = level
    return output if target == "epsilon" else (alpha_t * output + s_t * z).to(z.dtype)


def eps_model(net: nn.Module, target: str | None = None) -> EpsModel:
    """Return a diffusion network as the function of (z, t) that predicts the noise ε in z.

    Args:
        net: a diffusers network of (z, t).
        target: what it predicts, one of `PREDICTION_TARGETS`; None for what the scheduler beside its files says, see
            `load_network`, else "epsilon".

    Returns:
        ε̂(z, t) for z (n, c, h, w) and t, one index or one per image (n,), whole numbers as diffusers has them, too. The
        network sees 0 for t between CLEAN and 0.

    Raises:
        ValueError: for an unknown target, and for another than the scheduler's.
    """
    stated: str | None = getattr(net, "prediction_target", None)
    predicted = target or stated or "epsilon"
    check_target(predicted)
    if stated and predicted != stated:
        raise ValueError(f"expected the target {stated!r}, which the network's scheduler states, got {target!r}")

    def eps_hat(z: Tensor, t: Time) -> Tensor:
        if isinstance(t, Tensor):
            t = t.to(z.device)
            if t.ndim and len(t) not in (1, len(z)):
                raise ValueError(f"expected one t, or one for each of {len(z)} images, got {len(t)}")
        level = alpha_sigma(t)
        times = (
            torch.as_tensor(t, device=z.device, dtype=torch.promote_types(z.dtype, torch.float32))
            .clamp(min=0)
            .expand(len(z))
        )
        return to_eps(net(z, times).sample, z, level, predicted)

    return eps_hat


def denoising_loss(target: str = "epsilon", t_max: Integer = 999) -> Callable:
    """Return the training loss ‖network(z_t, t) − target‖², t uniform in {0, …, t_max} (Ho et al. 2020, equation 14).

    Args:
        target: what the network predicts, one of `PREDICTION_TARGETS`.
        t_max: last index, in [0, 999]. A purifier needs only t up to t*; 999 is the full range, from which images can
            be drawn.

    Returns:
        A loss for `lib.training.train` on images in [0, 1].

    Raises:
        ValueError: for an unknown target and an index outside.
    """
    check_target(target)
    t_max = check_settings(denoising_loss, {"t_max": t_max})["t_max"]
    if not 0 <= t_max < len(ABAR):
        raise ValueError(f"expected t_max in [0, {len(ABAR) - 1}], got t_max {t_max}")

    def loss(net: nn.Module, x: Tensor, *_: Tensor, generator: torch.Generator, epoch: int):
        u = to_model_range(x)
        t = torch.randint(0, t_max + 1, (len(x),), generator=generator, device=x.device).to(
            torch.promote_types(x.dtype, torch.float32)
        )
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        alpha_t, s_t = alpha_sigma(t)
        truth = noise if target == "epsilon" else alpha_t * noise - s_t * u
        return (net(alpha_t * u + s_t * noise, t).sample - truth).square().mean(), {}

    return loss
