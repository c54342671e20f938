"""The U-Net, how it is saved and loaded, what it predicts, and its training loss."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from lib.diffusion.schedule import ABAR, EpsModel, Level, Time, alpha_sigma, to_model_range
from lib.utils.files import write_json
from lib.utils.seeds import derive_seed

PREDICTION_TARGETS = ("epsilon", "v")


def build_unet(
    in_channels: int = 1, size: int = 8, channels: Sequence[int] = (24, 48), *, attention: bool = False, seed: int
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
        ValueError: for a size that cannot be halved so often.
    """
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
    """Write a U-Net in diffusers' own format, safetensors, and `facts.json` with it; `folder` is always whole."""
    if not isinstance(net, UNet2DModel):
        raise TypeError(f"expected a diffusers UNet2DModel, got {type(net).__name__}")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    net.save_pretrained(part, safe_serialization=True)
    write_json(part / "facts.json", facts or {})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def load_network(folder: Path) -> nn.Module:
    """Return the network that `save_network` wrote, in eval mode; FileNotFoundError without it. Safetensors only."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"expected a network in {folder}: run `dvc repro` for the experiment that trains it")
    net = UNet2DModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    net.register_to_config(_name_or_path=folder.name)  # diffusers records the whole path, which differs elsewhere
    return net


def load_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that `save_network` wrote with a network."""
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def check_target(target: str) -> None:
    """Raise ValueError for a prediction target that is none of `PREDICTION_TARGETS`."""
    if target not in PREDICTION_TARGETS:
        raise ValueError(f"expected a target among {', '.join(PREDICTION_TARGETS)}, got {target!r}")


def to_eps(output: Tensor, z: Tensor, level: Level, target: str) -> Tensor:
    """Return ε from the output of a network of `target` for z: ε itself, or v = α ε − s x (Salimans and Ho 2022)."""
    alpha_t, s_t = level
    return output if target == "epsilon" else alpha_t * output + s_t * z


def eps_model(net: nn.Module, target: str = "epsilon") -> EpsModel:
    """Return a diffusion network as the function of (z, t) that predicts the noise ε in z.

    Args:
        net: a diffusers network of (z, t).
        target: what it predicts, one of `PREDICTION_TARGETS`.

    Returns:
        ε̂(z, t) for z (n, c, h, w) and t, one index or one per image (n,). The network sees 0 for t between CLEAN and 0.

    Raises:
        ValueError: for an unknown target.
    """
    check_target(target)

    def eps_hat(z: Tensor, t: Time) -> Tensor:
        times = torch.as_tensor(t, device=z.device, dtype=z.dtype).clamp(min=0).expand(len(z))
        return to_eps(net(z, times).sample, z, alpha_sigma(t), target)

    return eps_hat


def denoising_loss(target: str = "epsilon", t_max: int = 999) -> Callable:
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
    if not 0 <= t_max < len(ABAR):
        raise ValueError(f"expected t_max in [0, {len(ABAR) - 1}], got t_max {t_max}")

    def loss(net: nn.Module, x: Tensor, *_: Tensor, generator: torch.Generator, epoch: int):
        u = to_model_range(x)
        t = torch.randint(0, t_max + 1, (len(x),), generator=generator, device=x.device).to(x)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        alpha_t, s_t = alpha_sigma(t)
        truth = noise if target == "epsilon" else alpha_t * noise - s_t * u
        return (net(alpha_t * u + s_t * noise, t).sample - truth).square().mean(), {}

    return loss
