"""Diffusion models of images: noise levels, U-Net, training loss, reverse-time solvers, DiffPure's purifier.

Everything between `scaled` and `unscaled` lives in [-1, 1] pixels. A noise level is an index t of the 1000 steps of
DDPM's linear betas (Ho et al. 2020): z_t = α_t x + s_t ε with α² + s² = 1; σ = s / α is the same level in
variance-exploding units, the ones to compare schedules in (DiffPure's t* = 0.1 is t = 99, σ* = 0.34). CLEAN stands for
no noise. All solvers are differentiable end to end: nothing is clipped, rounded or detached between input and output.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.paths import write_json
from lib.seeds import derive

Images = Float[Tensor, "n c h w"]
Time = float | Float[Tensor, " n"]
Predict = Callable[[Tensor, Time], Tensor]  # of (z, t): the noise ε in it
Level = tuple[float, float] | tuple[Tensor, Tensor]  # (α, s)

ABAR = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod.double()
LOG_SIGMA = ((1 - ABAR) / ABAR).log() / 2
CLEAN = -1.0
TARGETS = ("epsilon", "v")


def level(t: Time) -> Level:
    """Returns (α, s) at the index t in [0, 999], between two indices by interpolating log σ; (1, 0) at CLEAN.

    Between CLEAN and 0, where grids finer than the schedule end, σ² rises linearly, as it does in the continuous SDE.
    `t`: one number for a whole batch, or a tensor with one per image, which gives α and s the shape n 1 1 1.
    Raises ValueError outside.
    """
    times = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    if not ((times >= CLEAN) & (times <= len(ABAR) - 1)).all():
        raise ValueError(f"t is {t}: an index in [0, {len(ABAR) - 1}], or down to {CLEAN} for a clean image, is due")
    low = times.long().clamp(0, len(ABAR) - 2)
    sigma = torch.lerp(LOG_SIGMA[low], LOG_SIGMA[low + 1], (times - low).clamp(min=0)).exp()
    sigma = sigma * (times - CLEAN).clamp(max=1).sqrt()
    alpha = (1 + sigma**2).rsqrt()
    if isinstance(t, Tensor):
        return tuple(part.to(t)[:, None, None, None] for part in (alpha, sigma * alpha))
    return alpha.item(), (sigma * alpha).item()


def sigma_of(t: float) -> float:
    """Returns σ = s / α of an index t: 0.34 at t = 99."""
    alpha, s = level(t)
    return s / alpha


def t_of(sigma: Time) -> Time:
    """Returns the index t, not rounded, of a level σ or of one level per image: the inverse of `sigma_of`.

    Raises ValueError outside the schedule.
    """
    value = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
    wanted = value.log()
    if not ((value >= 0) & (wanted < LOG_SIGMA[-1] + 1e-6)).all():
        raise ValueError(f"σ is {sigma}: a level in [0, {LOG_SIGMA[-1].exp():.3g}] is due")
    low = (torch.searchsorted(LOG_SIGMA, wanted) - 1).clamp(0, len(LOG_SIGMA) - 2)
    part = (wanted - LOG_SIGMA[low]) / (LOG_SIGMA[low + 1] - LOG_SIGMA[low])
    below = CLEAN + (value / LOG_SIGMA[0].exp()).clamp(max=1) ** 2  # 0 above the first index
    t = low + part.clamp(0, 1) + below
    return t.to(sigma) if isinstance(sigma, Tensor) else t.item()


def scaled(x: Images) -> Images:
    """Returns images in [0, 1] as the network takes them, in [-1, 1]."""
    return 2 * x - 1


def unscaled(u: Images) -> Images:
    """Returns images in [-1, 1] as pixels in [0, 1]; what lies outside stays outside (a clamp would stop gradients)."""
    return (u + 1) / 2


def unet(
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
        torch.manual_seed(derive(seed, "unet"))
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


def save_net(net: UNet2DModel, folder: Path, facts: dict | None = None) -> None:
    """Writes a network in diffusers' own format, safetensors, and `facts.json` beside it; `folder` is always whole."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    net.save_pretrained(part, safe_serialization=True)
    write_json(part / "facts.json", facts or {})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def load_net(folder: Path) -> UNet2DModel:
    """Returns the network that `save_net` wrote, in eval mode; safetensors only. FileNotFoundError without it."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no network: run `dvc repro` for the experiment that trains it")
    net = UNet2DModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    net.register_to_config(_name_or_path=folder.name)  # diffusers keeps the whole path, which differs elsewhere
    return net


def noise_in(output: Tensor, z: Tensor, at: Level, target: str) -> Tensor:
    """Returns ε from what a network of `target` says about z: ε itself, or v = α ε − s x (Salimans and Ho 2022)."""
    alpha, s = at
    return output if target == "epsilon" else alpha * output + s * z


def predictor(net: nn.Module, target: str = "epsilon") -> Predict:
    """Returns the function of (z, t) that says which noise is in z, by a diffusers network of one of `TARGETS`."""
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}: choose one of {', '.join(TARGETS)}")

    def predict(z: Tensor, t: Time) -> Tensor:
        times = torch.as_tensor(t, device=z.device, dtype=z.dtype).clamp(min=0).expand(len(z))
        return noise_in(net(z, times).sample, z, level(t), target)

    return predict


def denoising(target: str = "epsilon", t_max: int = 999) -> Callable:
    """Returns the training loss ‖network(z_t, t) − target‖², t uniform in {0, …, t_max}, for `lib.train` on images.

    A purifier needs only t up to t*; 999 is the full range, from which images can be drawn. Raises ValueError.
    """
    if target not in TARGETS or not 0 <= t_max < len(ABAR):
        raise ValueError(f"target {target!r}, t_max {t_max}: {' or '.join(TARGETS)} and 0 to {len(ABAR) - 1} are due")

    def loss(net: nn.Module, x: Tensor, *_: Tensor, generator: torch.Generator, epoch: int):
        u = scaled(x)
        t = torch.randint(0, t_max + 1, (len(x),), generator=generator, device=x.device).to(x)
        eps = torch.randn(x.shape, generator=generator, device=x.device)
        alpha, s = level(t)
        wanted = eps if target == "epsilon" else alpha * eps - s * u
        return (net(alpha * u + s * eps, t).sample - wanted).square().mean(), {}

    return loss


def ddim(z: Tensor, eps: Tensor, now: Level, then: Level, noise: Tensor | None = None) -> Tensor:
    """Returns the deterministic step of DDIM between two levels (Song et al. 2021, equation 12 with σ = 0)."""
    return then[0] * (z - now[1] * eps) / now[0] + then[1] * eps


def ancestral(z: Tensor, eps: Tensor, now: Level, then: Level, noise: Tensor) -> Tensor:
    """Returns a draw of DDPM's posterior q(z_then | z_now, x) at the predicted x (Ho et al. 2020, equation 7)."""
    x, ratio = (z - now[1] * eps) / now[0], now[0] / then[0]
    beta = 1 - ratio**2
    mean = then[0] * beta / now[1] ** 2 * x + ratio * then[1] ** 2 / now[1] ** 2 * z
    return mean + math.sqrt(beta) * then[1] / now[1] * noise


def euler_maruyama(z: Tensor, eps: Tensor, now: Level, then: Level, noise: Tensor) -> Tensor:
    """Returns DiffPure's step of the reverse-time VP SDE, dz = −β (z / 2 + score) dt + √β dw (Nie et al. 2022, eq. 4).

    The score is −ε / s at the level now; β dt is what has passed of −log α² between the levels.
    """
    beta = 2 * math.log(then[0] / now[0])
    return z + beta * (z / 2 - eps / now[1]) + math.sqrt(beta) * noise


SOLVERS: dict[str, tuple[Callable, bool]] = {  # one step, and whether it draws noise
    "sde": (euler_maruyama, True),
    "ddpm": (ancestral, True),
    "ddim": (ddim, False),
}


def heun(predict: Predict, z: Tensor, now: float, then: float) -> Tensor:
    """Returns Heun's step of the probability-flow ODE d(z/α)/dσ = ε(z, σ) (Karras et al. 2022, algorithm 1).

    The step to CLEAN is Euler's, as theirs.
    """
    (a, s), (a2, s2) = level(now), level(then)
    eps = predict(z, now)
    euler = ddim(z, eps, (a, s), (a2, s2))
    if then == CLEAN:
        return euler
    return a2 * (z / a + (s2 / a2 - s / a) * (eps + predict(euler, then)) / 2)


def grid(t: float, steps: int) -> list[float]:
    """Returns the levels of a run of `steps` steps from t to CLEAN, equally far apart in time: t first, CLEAN last."""
    if steps < 1 or not 0 <= t <= len(ABAR) - 1:
        raise ValueError(f"t {t}, steps {steps}: an index of the schedule and at least one step are due")
    return [t - k * (t + 1) / steps for k in range(steps)] + [CLEAN]


def reverse(
    predict: Predict,
    z: Images,
    times: Sequence[float],
    solver: str = "sde",
    generator: torch.Generator | None = None,
    *,
    save_memory: bool = False,
) -> Images:
    """Returns what `solver` ("sde", "ddpm", "ddim", "heun") makes of z at times[0] on its way to times[-1].

    Gradients go through every step. `save_memory`: keep only the images between steps and compute each step's inside
    again for the backward pass, with the same noise, which is drawn outside: exact gradients, memory of one step.
    Raises ValueError for an unknown solver and for a stochastic one without `generator`.
    """
    if solver not in (*SOLVERS, "heun"):
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join((*SOLVERS, 'heun'))}")
    move, random = SOLVERS.get(solver, (None, False))
    if random and generator is None:
        raise ValueError(f"{solver} draws noise: give a generator")

    def step(z: Tensor, now: float, then: float, noise: Tensor | None) -> Tensor:
        if move is None:
            return heun(predict, z, now, then)
        return move(z, predict(z, now), level(now), level(then), noise)

    for now, then in pairwise(times):
        noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype) if random else None
        if save_memory and torch.is_grad_enabled():
            z = checkpoint(step, z, now, then, noise, use_reentrant=False)
        else:
            z = step(z, now, then, noise)
    return z


def noised(x: Images, t: float, generator: torch.Generator) -> Images:
    """Returns images in [0, 1] as z at level t: scaled, and with noise drawn from `generator`."""
    alpha, s = level(t)
    return alpha * scaled(x) + s * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def purified(
    predict: Predict, x: Images, generator: torch.Generator, *, t: float = 99, steps: int = 100, **options: Any
) -> Images:
    """Returns DiffPure's purification of images in [0, 1]: noise up to level t, then back (Nie et al. 2022, eq. 3, 4).

    `options`: those of `reverse`. Not clamped: pixels may leave [0, 1] by a little.
    """
    return unscaled(reverse(predict, noised(x, t, generator), grid(t, steps), generator=generator, **options))
