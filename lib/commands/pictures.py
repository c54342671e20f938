"""Pictures of a few images of an evaluation, as PNG data URIs that a record can hold."""

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.commands.named import OwnNoise
from lib.data import Split
from lib.purified_classifier import PurifiedClassifier
from lib.purify import IdentityPurifier
from lib.utils.random_state import seeded_noise
from lib.utils.seeds import derive_seed

COUNT, PIXELS = 6, 2**16  # pictured images, fewer where they have so many pixels together; at least one
DATA_URI = "data:image/png;base64,"
PUOR = ((127, 59, 8), (241, 163, 64), (247, 247, 247), (153, 142, 195), (45, 0, 75))  # ColorBrewer's, orange to violet


def png_uri(image: Tensor) -> str:
    """Return an image (c, h, w), cut to [0, 1], as the data URI of a PNG file."""
    pixels = (image.detach().cpu().clamp(0, 1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return DATA_URI + base64.b64encode(buffer.getvalue()).decode("ascii")


def signed_image(delta: Tensor) -> Tensor:
    """Return a perturbation (c, h, w) as colours: orange below 0, violet above, its largest change darkest."""
    mean = delta.detach().cpu().mean(0)
    signed, places = (mean / mean.abs().max().clamp_min(1e-12)).numpy(), np.linspace(-1, 1, len(PUOR))
    return torch.from_numpy(np.stack([np.interp(signed, places, channel) / 255 for channel in zip(*PUOR)]))


@torch.no_grad()
def picture_rows(
    defence: PurifiedClassifier, points: Split, x_adv: Tensor, answers: dict[str, Tensor], seed: int
) -> list[dict[str, Any]]:
    """Return pictures of the first images of an evaluation, which its seed drew, with their answers.

    Args:
        defence: the defence.
        points: images and labels.
        x_adv: their attacked images (n, c, h, w).
        answers: condition → classes (draws, n).
        seed: of the noise of the one purification that is shown.

    Returns:
        For each image its label, the share of right answers and the most frequent answer by condition, and pictures:
        the image, δ, the attacked image and, where there is a purifier, what it makes of that.
    """
    n = max(1, min(COUNT, len(x_adv), PIXELS // x_adv[0, 0].numel()))
    purified = None
    if not isinstance(defence.purifier, IdentityPurifier | OwnNoise):
        with seeded_noise(defence, derive_seed(seed, "pictures"), x_adv.device):
            purified = defence.purifier(x_adv[:n])
    rows = []
    for k in range(n):
        label = int(points.y[k])
        shown = {"x": points.x[k], "δ": signed_image(x_adv[k] - points.x[k]), "x + δ": x_adv[k]}
        shown |= {} if purified is None else {"g(x + δ)": purified[k]}
        said = {
            name: {"right": (some[:, k] == label).double().mean().item(), "most": int(some[:, k].mode().values)}
            for name, some in answers.items()
        }
        rows.append({"label": label, "answers": said, "images": {name: png_uri(t) for name, t in shown.items()}})
    return rows
