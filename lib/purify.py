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
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, cast, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from lib.attacks.bpda import ClampStraightThrough
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
from lib.utils.random_state import (
    RandnLike,
    forked_noise,
    randn_like,
    restored_networks,
    shared_randn_like,
    unseeded_noise,
)
from lib.utils.seeds import derive_seed, seeded_generator
from lib.utils.specs import PurifierSpec, StudentSpec
from lib.utils.validation import Integer, NonNegative, NonNegativeInt, Number, PositiveInt, check_value
from lib.utils.yaml_files import active_profile

FORMATS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
GLOBAL_NOISE = randn_like()
ScheduleIndex = Annotated[Number, Field(ge=0, le=999)]
DRAWS_ELSEWHERE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # purified classifiers of fixed noise


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
        t: level of the noise, an index of the schedule in [0, 999].
        evaluations: of the network, per image, at least 0.
        clamp: whether to cut what leaves [0, 1]. Gradients pass the cut as if it were not there, since a cut pixel has
            none and a defence must not win by that.
        extra: standard deviation, in pixel units, of more noise than the network expects, at least 0.

    Raises:
        ValueError: for a setting of another type or out of its range; at a call, for images of other channels or
            another size than the network's config names.
    """

    def __init__(
        self, net: nn.Module, sampler: Sampler, t: Any, evaluations: Any, *, clamp: Any = True, extra: Any = 0.0
    ) -> None:
        super().__init__()
        self.net, self.sampler = net.eval().requires_grad_(False), sampler
        self.t = check_value("t", t, ScheduleIndex)
        self.evaluations = check_value("evaluations", evaluations, NonNegativeInt)
        self.clamp = check_value("clamp", clamp, bool)
        self.extra = check_value("extra, a standard deviation in pixel units,", extra, NonNegative)

    def forward(self, x: Tensor, randn_like: RandnLike | None = None) -> NoisyImages:
        config = getattr(self.net, "config", None)
        channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
        wanted = (channels, *(size if isinstance(size, list | tuple) else (size, size)))
        if x.ndim != 4 or not x.is_floating_point() or any(w not in (None, n) for w, n in zip(wanted, x.shape[1:])):
            expected = "expected floating-point images (n, {}, {}, {}) for the network".format(
                *(w or "any" for w in wanted)
            )
            raise ValueError(f"{expected}, got {x.dtype} of shape {tuple(x.shape)}: convert or resize them")
        noise = randn_like or GLOBAL_NOISE
        z = add_noise(x, self.t, noise)
        if self.extra:
            z = z + 2 * self.extra * alpha_sigma(self.t)[0] * noise(x)  # a pixel's unit is half of [-1, 1]
        y = self.sampler(z, noise)
        return cast(Tensor, ClampStraightThrough.apply(y)) if self.clamp else y


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


def takes_noise(purifier: Callable) -> bool:
    """Say whether a purifier takes its noise as the argument `randn_like`, see `PurifierProtocol`."""
    try:
        return "randn_like" in inspect.signature(getattr(purifier, "forward", purifier)).parameters
    except (TypeError, ValueError):  # a built-in function
        return False


class PurifiedClassifier(nn.Module):
    """A classifier behind a purifier: logits of images in [0, 1], differentiable, random in every call.

    The noise is that of the global random state, which `lib.attacks.api` and `lib.evaluation.robust_accuracy` seed and
    restore; for a gradient averaged over noise give attacks their option `eot`. `independent_noise` and `evaluations`
    say whether images of a batch have noise of their own, and how many network evaluations one image takes. A purifier
    that takes no `randn_like` may share noise within a batch, unless its own attribute `independent_noise` is True.

    Args:
        purifier: images to images of the same shape, see `PurifierProtocol`; one that takes no `randn_like` will do.
        classifier: logits of images in [0, 1].
        votes: at least 1; more for the logarithm of the mean probabilities of so many purifications.
        fixed: a seed, an integer, that makes the noise the same for all images and calls, so that the defence is a
            function of the image. Where noise is drawn from elsewhere than `randn_like`, images pass one by one, each
            under the same random state (`lib.utils.random_state.forked_noise`).

    Raises:
        ValueError: for another number of votes or another seed. At a call: for a purifier that returns another shape,
            and with `fixed` for noise that cannot be seeded.
    """

    def __init__(self, purifier: Any, classifier: Any, votes: Any = 1, fixed: Any = None) -> None:
        super().__init__()
        for name, value in (("purifier", purifier), ("classifier", classifier)):
            if not callable(value):
                raise TypeError(f"expected a {name} that maps images, got {type(value).__name__}")
        self.purifier, self.classifier = purifier, classifier
        self.votes = check_value("votes", votes, PositiveInt)
        self.fixed = check_value("fixed", fixed, Integer | None)

    @property
    def independent_noise(self) -> bool:
        inner = getattr(self.purifier, "forward_fn", self.purifier)  # of `lib.attacks.bpda.bpda`
        return self.fixed is None and bool(getattr(inner, "independent_noise", takes_noise(inner)))

    @property
    def evaluations(self) -> int:
        own = getattr(self.purifier, "evaluations", 1)
        return self.votes * max(1, check_value("the purifier's evaluations", own, NonNegativeInt))

    def forward(self, x: Tensor, noise: tuple[RandnLike, ...] | None = None) -> Float[Tensor, "n k"]:
        if self.fixed is not None and noise is None:
            return self._fixed_logits(x)
        z = []
        for _ in range(self.votes):
            y = self.purifier(x, *(noise or ()))
            if not isinstance(y, Tensor) or y.shape != x.shape:
                got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
                expected = f"expected images of shape {tuple(x.shape)} from the purifier"
                raise ValueError(f"{expected}, got {got}: let the classifier resize, or wrap the purifier")
            z.append(self.classifier(y))
        return z[0] if self.votes == 1 else torch.stack(z).log_softmax(-1).logsumexp(0) - np.log(self.votes)

    def _fixed_logits(self, x: Tensor) -> Tensor:
        """Return logits under the one noise of `fixed`; ValueError where two answers to one image differ under it."""
        fixed, shared = cast(int, self.fixed), takes_noise(self.purifier)
        seed = derive_seed(fixed, "fixed")

        def logits(images: Tensor) -> Tensor:
            return self.forward(images, (shared_randn_like(fixed),) if shared else ())

        if self not in DRAWS_ELSEWHERE and len(x):
            if unseeded_noise(logits, x[:1], seed, "keep"):
                expected = "expected noise that can be seeded, for `fixed`, got two answers to one image"
                raise ValueError(f"{expected}: let {type(self.purifier).__name__} draw by randn_like")
            with restored_networks(self), torch.no_grad():
                one, other = (self._seeded(logits, x[:1], seed + k) for k in (0, 1))
            DRAWS_ELSEWHERE[self] = not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        if not DRAWS_ELSEWHERE.get(self, False):
            with forked_noise(self, seed, x.device) as noise_was_drawn:
                z = logits(x)
                if not noise_was_drawn():
                    return z
        return torch.cat([self._seeded(logits, image, seed) for image in x.split(1)])

    def _seeded(self, logits: Callable, x: Tensor, seed: int) -> Tensor:
        """Return logits under one random state."""
        with forked_noise(self, seed, x.device):
            return logits(x)


@torch.no_grad()
def purify(purifier: Callable, x: Tensor, seed: Any = 0, batch_size: Any = 256, progress: bool = True) -> NoisyImages:
    """Purify images, batch by batch.

    Args:
        purifier: see `PurifierProtocol` and `load_purifier`; one that takes no `randn_like` will do.
        x: images (n, c, h, w), in [0, 1].
        seed: an integer that decides the noise.
        batch_size: images per batch, at least 1.
        progress: whether to show a bar.

    Returns:
        Images of the same shape, in [0, 1].

    Raises:
        ValueError: if `x` are no images in [0, 1], for another seed or batch size, and for a purifier that returns
            another shape or pixels that are not finite.

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
    seed, batch_size = check_value("seed", seed, Integer), check_value("batch_size", batch_size, PositiveInt)
    check_images(x)
    noise = (randn_like(seeded_generator(seed, "purify", x.device)),) if takes_noise(purifier) else ()
    with forked_noise(purifier, derive_seed(seed, "purify"), x.device):
        bar = tqdm(x.split(batch_size), desc="purify", unit="batch", disable=not progress)
        y = torch.cat([purifier(part, *noise) for part in bar])
    if y.shape != x.shape or not y.isfinite().all():
        bad = int((~y.isfinite()).flatten(1).any(1).sum())
        got = f"shape {tuple(y.shape)}, {bad} images with NaN or infinite pixels"
        raise ValueError(f"expected finite images {tuple(x.shape)} from the purifier, got {got}: check its weights")
    return y.clamp(0, 1)


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
