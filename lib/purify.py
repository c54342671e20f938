"""Purifiers, which diffuse an image and run the reverse process, and the classifiers that they defend.

From the command line, for one image or a folder of images of the size that the networks know:

    python -m lib.purify IN OUT --student cd-2 --models data/digits/models/diff-s0

A purifier is called `<kind>-<steps>` (`lib.utils.specs`): sde, ddpm, ddim or heun is the teacher by that solver
("sde-100" is DiffPure), pd the student of progressive distillation with so many steps, any other name a consistency
student in so many steps.
"""

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from lib.data import check_images
from lib.diffusion.network import eps_model, load_network
from lib.diffusion.schedule import NoisyImages, add_noise, alpha_sigma, time_grid, to_pixel_range
from lib.diffusion.solvers import SOLVERS, reverse_process
from lib.distillation.consistency import SAMPLING_LEVELS
from lib.distillation.few_step import Sampler, consistency_sampler, load_config, load_consistency_student
from lib.utils.artifacts import results_dir
from lib.utils.device import default_device
from lib.utils.files import atomic_path
from lib.utils.progress import tqdm
from lib.utils.random_state import RandnLike, randn_like, shared_randn_like
from lib.utils.seeds import seeded_generator
from lib.utils.specs import PurifierSpec, StudentSpec
from lib.utils.yaml_files import active_profile

FORMATS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
GLOBAL_NOISE = randn_like()


@runtime_checkable
class PurifierProtocol(Protocol):
    """What defends a classifier: images n c h w in [0, 1] to such images, with the noise of `randn_like`.

    Without it the noise comes from the global random state. `evaluations`: of a network, per image.
    """

    evaluations: int

    def __call__(self, x: NoisyImages, randn_like: RandnLike | None = None) -> NoisyImages: ...


class Purifier(nn.Module):
    """Diffuse images to level t and restore them: images in [0, 1] to images in [0, 1]; see `PurifierProtocol`.

    Args:
        net: the network, which is frozen.
        sampler: from noisy z to images in pixels, by `net`.
        t: level of the noise, an index of the schedule.
        evaluations: of the network, per image.
        clamp: whether to cut what leaves [0, 1]; False where gradients are taken, since a cut pixel has none and a
            defence must not win by that.
        extra: standard deviation, in pixel units, of more noise than the network expects.

    Raises:
        ValueError: if `extra` is negative.
    """

    def __init__(
        self, net: nn.Module, sampler: Sampler, t: float, evaluations: int, *, clamp: bool = True, extra: float = 0.0
    ) -> None:
        super().__init__()
        if extra < 0:
            raise ValueError(f"expected extra, a standard deviation in pixel units, of at least 0, got {extra}")
        self.net = net.eval().requires_grad_(False)
        self.sampler, self.t, self.evaluations, self.clamp, self.extra = sampler, t, evaluations, clamp, extra

    def forward(self, x: NoisyImages, randn_like: RandnLike | None = None) -> NoisyImages:
        noise = randn_like or GLOBAL_NOISE
        z = add_noise(x, self.t, noise)
        if self.extra:
            z = z + 2 * self.extra * alpha_sigma(self.t)[0] * noise(x)  # a pixel's unit is half of [-1, 1]
        y = self.sampler(z, noise)
        return y.clamp(0, 1) if self.clamp else y


class IdentityPurifier(nn.Module):
    """The purifier that leaves images as they are."""

    evaluations = 0

    def forward(self, x: Tensor, randn_like: RandnLike | None = None) -> Tensor:
        return x


def _network_names(models: Path) -> set[str]:
    """Return the names of the networks in a folder; what a killed run left, such as `cd.30360.part`, is none."""
    files = ("config.json", "unet/config.json")
    folders = (p for p in models.iterdir() if any((p / file).is_file() for file in files))
    return {p.name for p in folders if _is_network_name(p.name)}


def _is_network_name(name: str) -> bool:
    """Say whether a folder has the name of a network."""
    try:
        return bool(StudentSpec.parse(name))
    except ValueError:
        return False


def purifier_kinds(models: Path) -> list[str]:
    """Return the networks in a folder of `lib.distillation.few_step.publish`, as kinds of purifiers."""
    nets = _network_names(models)
    kinds = {"pd" if name.startswith("pd-") else name for name in nets - {"teacher", "sampler"}}
    return sorted(kinds | ({*SOLVERS, "heun"} if "teacher" in nets else set()))


def _find_purifier(models: Path, name: str) -> PurifierSpec:
    """Return which of the purifiers in a folder `name` stands for; ValueError if it is none of them."""
    kinds, nets = purifier_kinds(models), _network_names(models)
    try:
        spec = PurifierSpec.parse(name)
    except (ValueError, AttributeError):  # what is no text has no parts
        spec = None
    if spec is None or spec.steps < 1 or str(spec.network) not in kinds:
        expected = f"expected <kind>-<steps>, kind one of {', '.join(kinds)}"
        raise ValueError(f"no purifier {str(name)[:80]!r} in {models}: {expected}")
    kind, steps = str(spec.network), spec.steps
    if kind == "pd" and name not in nets:
        students = ", ".join(sorted(net for net in nets if net.startswith("pd-")))
        raise ValueError(f"no purifier {name!r} in {models}: expected one of {students}")
    if kind not in ("pd", "heun", *SOLVERS) and steps > SAMPLING_LEVELS:
        raise ValueError(f"expected {kind} in 1 to {SAMPLING_LEVELS} steps, got {name!r}")
    return spec


def load_purifier(models: Path, name: str, *, save_memory: bool = False, **options: Any) -> Purifier:
    """Load a purifier by its name, after checking its network's files against their card.

    Args:
        models: folder of networks, e.g. data/digits/models/diff-s0.
        name: `<kind>-<steps>`, see the module.
        save_memory: whether gradients through the teacher's steps take the memory of one step, see
            `lib.diffusion.solvers.reverse_process`.
        **options: `clamp` and `extra` of `Purifier`.

    Returns:
        The purifier, frozen, on the CPU.

    Raises:
        FileNotFoundError: if the folder holds no networks.
        ValueError: if it holds no such purifier, or files that were changed; see `lib.diffusion.network.load_network`.
    """
    models = Path(models)
    recipe, _ = load_config(models)
    spec = _find_purifier(models, name)
    kind, steps = str(spec.network), spec.steps
    if kind == "pd" or kind in (*SOLVERS, "heun"):
        net = load_network(
            models / (str(spec) if kind == "pd" else "teacher"), target=recipe.target, foreign=kind != "pd"
        )
        solver = "ddim" if kind == "pd" else kind
        predict, times = eps_model(net, recipe.target), time_grid(recipe.t, steps)

        def sampler(z: Tensor, noise: RandnLike) -> Tensor:
            return to_pixel_range(reverse_process(predict, z, times, solver, noise, save_memory=save_memory))

        return Purifier(net, sampler, recipe.t, steps * (2 if kind == "heun" else 1), **options)
    net, scalings = load_consistency_student(models, kind)
    return Purifier(net, consistency_sampler(net, scalings, steps, recipe), recipe.t, steps, **options)


class PurifiedClassifier(nn.Module):
    """A classifier behind a purifier: logits of images in [0, 1], differentiable, random in every call.

    The noise is that of the global random state, which `lib.attacks.api` and `lib.evaluation.robust_accuracy` seed and
    restore; for a gradient averaged over noise give attacks their option `eot`. `independent_noise` and `evaluations`
    say whether images of a batch have noise of their own, and how many network evaluations one image takes.

    Args:
        purifier: images to images, see `PurifierProtocol`.
        classifier: logits of images in [0, 1].
        votes: more than 1 for the logarithm of the mean probabilities of so many purifications.
        fixed: a seed that makes the noise the same for all images and calls, so that the defence is a function.

    Raises:
        ValueError: if `votes` is below 1, or `fixed` is given for a purifier that takes no `randn_like`.
    """

    def __init__(
        self, purifier: PurifierProtocol | nn.Module, classifier: nn.Module, votes: int = 1, fixed: int | None = None
    ) -> None:
        super().__init__()
        if votes < 1:
            raise ValueError(f"expected votes of at least 1, got {votes}")
        function = purifier.forward if isinstance(purifier, nn.Module) else purifier
        if fixed is not None and "randn_like" not in inspect.signature(function).parameters:
            expected = "expected a purifier (x, randn_like=None) for fixed noise"
            raise ValueError(f"{expected}, got {type(purifier).__name__} without randn_like: leave out `fixed`")
        self.purifier, self.classifier, self.votes, self.fixed = purifier, classifier, votes, fixed

    @property
    def independent_noise(self) -> bool:
        return self.fixed is None

    @property
    def evaluations(self) -> int:
        return self.votes * max(1, getattr(self.purifier, "evaluations", 1))

    def forward(self, x: NoisyImages) -> Float[Tensor, "n k"]:
        noise = () if self.fixed is None else (shared_randn_like(self.fixed),)
        z = [self.classifier(self.purifier(x, *noise)) for _ in range(self.votes)]
        if self.votes == 1:
            return z[0]
        return torch.stack(z).log_softmax(-1).logsumexp(0) - np.log(self.votes)


@torch.no_grad()
def purify(
    purifier: PurifierProtocol, x: NoisyImages, seed: int = 0, batch_size: int = 256, progress: bool = True
) -> NoisyImages:
    """Purify images, batch by batch.

    Args:
        purifier: see `PurifierProtocol` and `load_purifier`.
        x: images (n, c, h, w), in [0, 1].
        seed: decides the noise.
        batch_size: images per batch.
        progress: whether to show a bar.

    Returns:
        Images of the same shape, in [0, 1].

    Raises:
        ValueError: if `x` are no images in [0, 1].

    Example:
        >>> from lib.diffusion.network import build_unet, eps_model
        >>> from lib.diffusion.schedule import time_grid, to_pixel_range
        >>> from lib.diffusion.solvers import reverse_process
        >>> net = build_unet(1, 8, (8, 8), seed=0)  # untrained
        >>> model, times = eps_model(net), time_grid(99.0, steps=2)
        >>> sampler = lambda z, randn_like: to_pixel_range(reverse_process(model, z, times, "ddim"))
        >>> ddim = Purifier(net, sampler, t=99.0, evaluations=2)
        >>> purify(ddim, torch.full((3, 1, 8, 8), 0.5), progress=False).shape
        torch.Size([3, 1, 8, 8])
    """
    check_images(x)
    noise, parts = randn_like(seeded_generator(seed, "purify", x.device)), x.split(batch_size)
    bar = tqdm(parts, desc="purify", unit="batch", disable=not progress)
    return torch.cat([purifier(part, noise).clamp(0, 1) for part in bar])


def read_image(path: Path, channels: int, size: int) -> Float[Tensor, "c h w"]:
    """Read an image file.

    Args:
        path: of the file.
        channels: 1 for grey, 3 for colour, as the network takes it.
        size: height and width, in pixels, that the network takes.

    Returns:
        The image (c, h, w), in [0, 1].

    Raises:
        ValueError: if the image has another size or the file is no image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if pixels.shape[:2] != (size, size):
        height, width = pixels.shape[:2]
        raise ValueError(f"expected {size} x {size} pixels, got {width} x {height} in {path}: resize it")
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def write_image(x: Float[Tensor, "c h w"], path: Path) -> None:
    """Write an image in [0, 1] as PNG, whole or not at all."""
    pixels = (x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    with atomic_path(path) as part:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(part, format="PNG")


def main(arguments: list[str] | None = None) -> None:
    """Purify the image or the folder of images IN and write PNG files to OUT."""
    profile = active_profile()
    parser = argparse.ArgumentParser(prog="python -m lib.purify", description=main.__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help=f"an image or a folder of {', '.join(FORMATS)}")
    parser.add_argument("target", metavar="OUT", type=Path, help="a file for a file, a folder for a folder")
    parser.add_argument("--student", default="cd-2", help="<kind>-<steps>; sde-100 is DiffPure itself")
    parser.add_argument(
        "--models", type=Path, default=results_dir(profile, "models") / "diff-s0", help="folder of networks"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args(arguments)
    try:
        files = (
            sorted(p for p in args.source.iterdir() if p.suffix.lower() in FORMATS)
            if args.source.is_dir()
            else [args.source]
        )
        if not files:
            raise ValueError(f"expected images ({', '.join(FORMATS)}), got none in {args.source}")
        purifier = load_purifier(args.models, args.student)
        config: Any = purifier.net.config
        x = torch.stack([read_image(file, config.in_channels, config.sample_size) for file in files])
        purified = purify(purifier.to(default_device()), x.to(default_device()), args.seed).cpu()
        for image, file in zip(purified, files, strict=True):
            write_image(image, args.target / f"{file.stem}.png" if args.source.is_dir() else args.target)
        print(f"{len(x)} images purified by {args.student}: {args.target}")
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
