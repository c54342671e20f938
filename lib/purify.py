"""Purifiers, which noise an image and walk back, and the classifiers that they defend.

From the command line, for one image or a folder of images of the size that the networks know:

    python -m lib.purify IN OUT --student cd-2 --models data/digits/models/diff-s0

A purifier is called `<kind>-<steps>`: sde, ddpm, ddim or heun is the teacher by that solver ("sde-100" is DiffPure),
pd the student of the ladder with so many steps, any other name a consistency student in so many jumps.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import yaml
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from lib.data import check_images
from lib.diffusion.network import eps_model, load_network
from lib.diffusion.schedule import NoisyImages, add_noise, alpha_sigma, time_grid, to_pixel_range
from lib.diffusion.solvers import SOLVERS, reverse_process
from lib.distillation.few_step import Sampler, consistency_sampler, load_config, load_student
from lib.utils.artifacts import results_dir
from lib.utils.device import default_device
from lib.utils.files import ROOT, atomic_path
from lib.utils.progress import tqdm
from lib.utils.random_state import RandnLike, randn_like
from lib.utils.seeds import seeded_generator

FORMATS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@runtime_checkable
class PurifierProtocol(Protocol):
    """What defends a classifier: images n c h w in [0, 1] to such images, with the noise of `generator`.

    Without one the noise comes from the global random state. `evaluations`: of a network, per image.
    """

    evaluations: int

    def __call__(self, x: NoisyImages, generator: torch.Generator | None = None) -> NoisyImages: ...


class Purifier(nn.Module):
    """Noises images up to level t and restores them: images in [0, 1] to images in [0, 1]; see `PurifierProtocol`.

    `restore`: from noisy z to images, by `net`, which is frozen. `clamp`: cut what leaves [0, 1]; False where gradients
    are taken, since a cut pixel has none: a defence must not win by that. `extra`: standard deviation, in pixel units,
    of more noise than the network expects.
    """

    def __init__(
        self, net: nn.Module, restore: Sampler, t: float, evaluations: int, *, clamp: bool = True, extra: float = 0.0
    ) -> None:
        super().__init__()
        if extra < 0:
            raise ValueError(f"extra is {extra}: a standard deviation of at least 0, in pixel units, is due")
        self.net = net.eval().requires_grad_(False)
        self.restore, self.t, self.evaluations, self.clamp, self.extra = restore, t, evaluations, clamp, extra

    def forward(self, x: NoisyImages, generator: torch.Generator | None = None) -> NoisyImages:
        noise = randn_like(generator)
        z = add_noise(x, self.t, noise)
        if self.extra:
            z = z + 2 * self.extra * alpha_sigma(self.t)[0] * noise(x)  # a pixel's unit is half of [-1, 1]
        y = self.restore(z, noise)
        return y.clamp(0, 1) if self.clamp else y


def purifier_kinds(models: Path) -> list[str]:
    """Returns the networks in a folder of `few_steps.finish`, as kinds of purifiers."""
    nets = {p.name for p in models.iterdir() if (p / "config.json").exists()}
    kinds = {"pd" if name.startswith("pd-") else name for name in nets - {"teacher", "sampler"}}
    return sorted(kinds | ({*SOLVERS, "heun"} if "teacher" in nets else set()))


def load_purifier(models: Path, name: str, *, save_memory: bool = False, **options: Any) -> Purifier:
    """Returns the purifier `name` (see above) from the networks in a folder, e.g. data/digits/models/diff-s0.

    `save_memory`: gradients through the teacher's steps with the memory of one, see `lib.diffusion.solvers.reverse_process`; `options`:
    those of `Purifier`. Raises ValueError for a name that is not there and FileNotFoundError for such a folder.
    """
    recipe, _ = load_config(models)
    kind, _, count = name.rpartition("-")
    if kind not in purifier_kinds(models) or not count.isdigit() or int(count) < 1:
        raise ValueError(
            f"no purifier {name!r} in {models}: <kind>-<steps>, kind one of {', '.join(purifier_kinds(models))}"
        )
    steps = int(count)
    if kind == "pd" or kind in (*SOLVERS, "heun"):
        net = load_network(models / (name if kind == "pd" else "teacher"))
        solver = "ddim" if kind == "pd" else kind
        predict, times = eps_model(net, recipe.target), time_grid(recipe.t, steps)

        def restore(z: Tensor, randn_like: RandnLike) -> Tensor:
            return to_pixel_range(reverse_process(predict, z, times, solver, randn_like, save_memory=save_memory))

        return Purifier(net, restore, recipe.t, steps * (2 if kind == "heun" else 1), **options)
    net, scalings = load_student(models, kind)
    return Purifier(net, consistency_sampler(net, scalings, steps, recipe), recipe.t, steps, **options)


@contextmanager
def shared_noise(seed: int) -> Iterator[None]:
    """Within it, `torch.randn` is the same for every image of a batch and in every call: a function of `seed`.

    It turns a random defence into a fixed function of the image, whatever the batch, device and precision. It stands in
    for `torch.randn` itself, which diffusers' schedulers ask, too: to watch all calls of torch would slow each of them.
    """
    rng, drawn = seeded_generator(seed, "same noise"), torch.randn

    def same(*shape: Any, device: Any = None, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return drawn(1, *size[1:], generator=rng).to(device=device, dtype=dtype).expand(*size)

    torch.randn = same
    try:
        yield
    finally:
        torch.randn = drawn


class PurifiedClassifier(nn.Module):
    """A classifier behind a purifier: logits of images in [0, 1], differentiable, random in every call.

    `votes` > 1: the logarithm of the mean probabilities of so many purifications. `fixed`: a seed that makes the noise
    the same for all images and calls. The noise is that of the global random state, which `lib.attacks.api` and
    `lib.evaluation.robust_accuracy` seed and restore; for a gradient averaged over noise give attacks their option `eot`.
    """

    def __init__(
        self, purifier: PurifierProtocol | nn.Module, classifier: nn.Module, votes: int = 1, fixed: int | None = None
    ) -> None:
        super().__init__()
        if votes < 1:
            raise ValueError(f"votes is {votes}: at least one purification is due")
        self.purifier, self.classifier, self.votes, self.fixed = purifier, classifier, votes, fixed

    def forward(self, x: NoisyImages) -> Float[Tensor, "n k"]:
        if self.fixed is not None:
            with shared_noise(self.fixed):
                return self.voted(x)
        return self.voted(x)

    def voted(self, x: NoisyImages) -> Float[Tensor, "n k"]:
        """Returns the logits, or the logarithm of the mean probabilities over the votes."""
        z = [self.classifier(self.purifier(x)) for _ in range(self.votes)]
        if self.votes == 1:
            return z[0]
        return torch.stack(z).log_softmax(-1).logsumexp(0) - np.log(self.votes)

    @torch.no_grad()
    def counts(
        self, x: NoisyImages, draws: int, generator: torch.Generator, batch_size: int = 256
    ) -> Int[Tensor, "n k"]:
        """Returns how often each class is the answer in `draws` purifications: its largest entry is the hard vote."""
        total: list[Tensor] = []
        for part in x.split(batch_size):
            asked = (self.classifier(self.purifier(part, generator)) for _ in range(draws))
            total.append(sum(nn.functional.one_hot(z.argmax(1), z.shape[1]) for z in asked))
        return torch.cat(total)


@torch.no_grad()
def purify(
    purifier: PurifierProtocol, x: NoisyImages, seed: int = 0, batch_size: int = 256, progress: bool = True
) -> NoisyImages:
    """Returns images in [0, 1] purified, batch by batch; ValueError for images that are not."""
    check_images(x)
    rng, parts = seeded_generator(seed, "purify", x.device), x.split(batch_size)
    bar = tqdm(parts, desc="purify", unit="batch", disable=not progress)
    return torch.cat([purifier(part, rng).clamp(0, 1) for part in bar])


def read_image(path: Path, channels: int, size: int) -> Float[Tensor, "c h w"]:
    """Returns an image file in [0, 1] as a network of so many channels (1: grey, 3: colour) and pixels takes it.

    Raises ValueError, which names the file, for another size or a file that is no image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if pixels.shape[:2] != (size, size):
        height, width = pixels.shape[:2]
        raise ValueError(f"{path} has {width} x {height} pixels: resize it to {size} x {size}, which the networks know")
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def write_image(x: Float[Tensor, "c h w"], path: Path) -> None:
    """Writes an image in [0, 1] as PNG, whole or not at all."""
    pixels = (x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    with atomic_path(path) as part:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(part, format="PNG")


def main(arguments: list[str] | None = None) -> None:
    """Purifies the image or the folder of images IN and writes PNG files to OUT."""
    profile = yaml.safe_load((ROOT / "params.yaml").read_text())["profile"]
    parser = argparse.ArgumentParser(prog="python -m lib.purify", description=main.__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help=f"an image or a folder of {', '.join(FORMATS)}")
    parser.add_argument("target", metavar="OUT", type=Path, help="a file for a file, a folder for a folder")
    parser.add_argument("--student", default="cd-2", help="<kind>-<steps>; sde-100 is DiffPure itself")
    parser.add_argument(
        "--models", type=Path, default=results_dir(profile, "models") / "diff-s0", help="folder of networks"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    asked = parser.parse_args(arguments)
    try:
        files = (
            sorted(p for p in asked.source.iterdir() if p.suffix.lower() in FORMATS)
            if asked.source.is_dir()
            else [asked.source]
        )
        if not files:
            raise ValueError(f"{asked.source} holds no image: {', '.join(FORMATS)} are read")
        purifier = load_purifier(asked.models, asked.student)
        known = purifier.net.config
        x = torch.stack([read_image(file, known.in_channels, known.sample_size) for file in files])
        purified = purify(purifier.to(default_device()), x.to(default_device()), asked.seed).cpu()
        for image, file in zip(purified, files, strict=True):
            write_image(image, asked.target / f"{file.stem}.png" if asked.source.is_dir() else asked.target)
        print(f"{len(x)} images purified by {asked.student}: {asked.target}")
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


class IdentityPurifier(nn.Module):
    """The purifier that leaves images as they are."""

    evaluations = 0

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x


if __name__ == "__main__":
    main()
