"""The U-Net, how it is saved and loaded, what it predicts, and its training loss."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from lib.diffusion.schedule import ABAR, EpsModel, Level, Time, alpha_sigma, to_model_range
from lib.utils.files import write_json
from lib.utils.seeds import derive_seed

PREDICTION_TARGETS = ("epsilon", "v")


def build_unet(
    in_channels: int = 1, size: int = 8, channels: Sequence[int] = (24, 48), *, attention: bool = False, seed: int
) -> UNet2DModel:
    """Returns diffusers' U-Net with one level per entry of `channels`; its weights depend on `seed` alone.

    `size` must be divisible by 2 for each level but the first; `attention`: in the lowest level. ValueError otherwise.
    """
    if size % 2 ** (len(channels) - 1):
        raise ValueError(f"size {size} cannot be halved {len(channels) - 1} times: give fewer channels than {channels}")
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


def save_network(net: UNet2DModel, folder: Path, facts: dict | None = None) -> None:
    """Writes a network in diffusers' own format, safetensors, and `facts.json` beside it; `folder` is always whole."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    net.save_pretrained(part, safe_serialization=True)
    write_json(part / "facts.json", facts or {})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def load_network(folder: Path) -> UNet2DModel:
    """Returns the network that `save_network` wrote, in eval mode; safetensors only. FileNotFoundError without it."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no network: run `dvc repro` for the experiment that trains it")
    net = UNet2DModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    net.register_to_config(_name_or_path=folder.name)  # diffusers keeps the whole path, which differs elsewhere
    return net


def to_eps(output: Tensor, z: Tensor, at: Level, target: str) -> Tensor:
    """Returns ε from what a network of `target` says about z: ε itself, or v = α ε − s x (Salimans and Ho 2022)."""
    alpha, s = at
    return output if target == "epsilon" else alpha * output + s * z


def eps_model(net: nn.Module, target: str = "epsilon") -> EpsModel:
    """Returns the function of (z, t) that says which noise is in z, by a diffusers network of one of `PREDICTION_TARGETS`."""
    if target not in PREDICTION_TARGETS:
        raise ValueError(f"target is {target!r}: choose one of {', '.join(PREDICTION_TARGETS)}")

    def predict(z: Tensor, t: Time) -> Tensor:
        times = torch.as_tensor(t, device=z.device, dtype=z.dtype).clamp(min=0).expand(len(z))
        return to_eps(net(z, times).sample, z, alpha_sigma(t), target)

    return predict


def denoising_loss(target: str = "epsilon", t_max: int = 999) -> Callable:
    """Returns the training loss ‖network(z_t, t) − target‖², t uniform in {0, …, t_max}, for `lib.training` on images.

    A purifier needs only t up to t*; 999 is the full range, from which images can be drawn. Raises ValueError.
    """
    if target not in PREDICTION_TARGETS or not 0 <= t_max < len(ABAR):
        raise ValueError(
            f"target {target!r}, t_max {t_max}: {' or '.join(PREDICTION_TARGETS)} and 0 to {len(ABAR) - 1} are due"
        )

    def loss(net: nn.Module, x: Tensor, *_: Tensor, generator: torch.Generator, epoch: int):
        u = to_model_range(x)
        t = torch.randint(0, t_max + 1, (len(x),), generator=generator, device=x.device).to(x)
        eps = torch.randn(x.shape, generator=generator, device=x.device)
        alpha, s = alpha_sigma(t)
        wanted = eps if target == "epsilon" else alpha * eps - s * u
        return (net(alpha * u + s * eps, t).sample - wanted).square().mean(), {}

    return loss
