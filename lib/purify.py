"""Purifiers, which diffuse an image and run the reverse process, and the classifiers that they defend.

From the command line, for one image or a folder of images of the size that the networks know:

    python -m lib.purify IN OUT --student cd-2 --models data/digits/models/diff-s20

A purifier is called `<kind>-<steps>` (`lib.utils.specs`): sde, ddpm, ddim or heun is the teacher by that solver
("sde-100" is DiffPure), pd the student of progressive distillation with so many steps, any other name a consistency
student in so many steps.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, cast, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from lib.attacks.bpda import ClampStraightThrough
from lib.data import check_images
from lib.diffusion.network import eps_model, load_facts, load_network
from lib.diffusion.schedule import NoisyImages, add_noise, alpha_sigma, time_grid, to_pixel_range
from lib.diffusion.solvers import SOLVERS, reverse_process
from lib.distillation.consistency import SAMPLING_LEVELS
from lib.distillation.few_step import Sampler, consistency_sampler, load_config, load_consistency_student
from lib.distillation.label_purifier import NoiseShare
from lib.purified_classifier import PurifiedClassifier as PurifiedClassifier  # what users import from here
from lib.purified_classifier import check_purified, takes_noise
from lib.utils.artifacts import results_dir
from lib.utils.device import default_device
from lib.utils.files import shown_path
from lib.utils.images import FORMATS, RESIZE_RULE, fit_image, plan_outputs, read_image, write_image
from lib.utils.processes import print_in_any_locale
from lib.utils.progress import tqdm
from lib.utils.random_state import RandnLike, forked_noise, randn_like
from lib.utils.seeds import derive_seed, seeded_generator
from lib.utils.specs import PurifierSpec, StudentSpec
from lib.utils.validation import Integer, NonNegative, NonNegativeInt, Number, PositiveInt, check_value
from lib.utils.yaml_files import active_profile, first_seed

FARTHEST = 100.0  # from 0, of a pixel before it is cut to [0, 1]: networks that work come nowhere near
GLOBAL_NOISE = randn_like()
ScheduleIndex = Annotated[Number, Field(ge=0, le=999)]


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
        noise_share: share of the noise at level t that is added before the sampler, in [0, 1]; 1 but for students
            that were trained with less (`lib.distillation.label_purifier`).

    Raises:
        ValueError: for a setting of another type or out of its range; at a call, for images of other channels or
            another size than the network's config names.
    """

    def __init__(
        self,
        net: nn.Module,
        sampler: Sampler,
        t: Any,
        evaluations: Any,
        *,
        clamp: Any = True,
        extra: Any = 0.0,
        noise_share: Any = 1.0,
    ) -> None:
        super().__init__()
        self.net, self.sampler = net.eval().requires_grad_(False), sampler
        self.t = check_value("t", t, ScheduleIndex)
        self.evaluations = check_value("evaluations", evaluations, NonNegativeInt)
        self.clamp = check_value("clamp", clamp, bool)
        self.extra = check_value("extra, a standard deviation in pixel units,", extra, NonNegative)
        self.noise_share = check_value("noise_share", noise_share, NoiseShare)
        self.deterministic = self.noise_share == 0 and self.extra == 0 and self.evaluations <= 1

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
        z = add_noise(x, self.t, lambda like: self.noise_share * noise(like))
        if self.extra:
            z = z + 2 * self.extra * alpha_sigma(self.t)[0] * noise(x)  # a pixel's unit is half of [-1, 1]
        y = self.sampler(z, noise)
        return cast(Tensor, ClampStraightThrough.apply(y)) if self.clamp else y


class IdentityPurifier(nn.Module):
    """The purifier that leaves images as they are."""

    evaluations, deterministic = 0, True

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
    options |= {"noise_share": load_facts(models / kind).get("noise_share", 1.0)}
    return Purifier(net, consistency_sampler(net, scalings, steps, recipe), recipe.t, steps, **options)


def list_purifiers() -> list[str]:
    """Return the purifiers that come with the repository, for `load`, in one step; the number in a name says others."""
    pretrained = importlib.import_module("lib.pretrained")
    names = []
    for folder in pretrained.diffusion_names():
        models = pretrained.pretrained_folder(folder)
        kinds = [f"{kind}-1" for kind in purifier_kinds(models) if kind != "pd"]
        kinds += [name for name in _network_names(models) if name.startswith("pd-")]
        names += [f"{folder.rpartition('/')[0]}/{kind}" for kind in kinds]
    return sorted(names)


def load(name: str, **options: Any) -> Purifier:
    """Load a purifier that comes with the repository: `lib.purify.load("digits/clean-1")`.

    Weights are safetensors and checked against the SHA-256 of their card. `lib.pretrained`, which knows the folders, is
    imported by its name, so that no experiment, which loads none of these, depends on it.

    Args:
        name: `<data set>/<kind>-<steps>`; `list_purifiers` names the kinds.
        **options: see `load_purifier`.

    Returns:
        The purifier, frozen, on the CPU.

    Raises:
        FileNotFoundError: if there are no networks of the data set.
        ValueError: for another purifier, and files that were changed.
    """
    dataset, _, purifier = str(name).rpartition("/")
    pretrained = importlib.import_module("lib.pretrained")
    models = pretrained.pretrained_folder(f"{dataset or 'none'}/{pretrained.DIFFUSION_FOLDER}")
    if not models.is_dir():
        there = ", ".join(folder.rpartition("/")[0] for folder in pretrained.diffusion_names()) or "none"
        raise FileNotFoundError(f"expected a purifier such as digits/clean-1, of the data sets {there}, got {name!r}")
    return load_purifier(models, purifier, **options)


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
        ValueError: if `x` are no images in [0, 1], for another seed or batch size, and if what the purifier answers has
            another shape, is not finite or far outside.

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
    noise, answers = (randn_like(seeded_generator(seed, "purify", x.device)),) if takes_noise(purifier) else (), []
    with forked_noise(purifier, derive_seed(seed, "purify"), x.device):
        for part in tqdm(x.split(batch_size), desc="purify", unit="batch", disable=not progress):
            answers.append(purifier(part, *noise))
            check_purified(answers[-1], part)
    y = torch.cat(answers)
    if not (y.abs() <= FARTHEST).all():  # false for NaN as well
        broken = (~(y.abs() <= FARTHEST)).flatten(1).any(1).sum()
        raise ValueError(
            f"expected finite images near [0, 1] from the purifier, got NaN, infinity or numbers above {FARTHEST:g} in "
            f"{broken} of {len(y)}: its networks are broken"
        )
    return y.clamp(0, 1)


def main(arguments: list[str] | None = None) -> None:
    """Purify the image or the images of the folder IN and write PNG files to OUT.

    Folders inside IN and files of other names are left out, and named. Transparent pixels lie over white. Numbers whose
    white is not defined, animations and damaged files are refused, before anything is written.
    """
    print_in_any_locale()
    models = results_dir(active_profile(), "models") / f"diff-s{first_seed('diff')}"
    parser = argparse.ArgumentParser(prog="python -m lib.purify", description=main.__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help=f"an image or a folder of {', '.join(FORMATS)}")
    parser.add_argument("target", metavar="OUT", type=Path, help="a .png file for a file, a folder for a folder")
    parser.add_argument("--student", default="cd-2", help="<kind>-<steps>; sde-100 is DiffPure itself")
    parser.add_argument("--models", type=Path, default=models, help="folder of networks")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, at least 0")
    parser.add_argument("--resize", action="store_true", help=f"bring other sizes to the networks': {RESIZE_RULE}")
    args = parser.parse_args(arguments)
    try:
        seed = check_value("--seed", args.seed, NonNegativeInt)
        outputs = plan_outputs(args.source, args.target)
        purifier = load_purifier(args.models, args.student, clamp=False)  # `purify` sees what leaves [0, 1], then cuts
        config: Any = purifier.net.config
        size = config.sample_size
        every = [read_image(file, config.in_channels, None if args.resize else size) for file in outputs]
        x = torch.stack([fit_image(image, size) if args.resize else image for image in every])
        purified = purify(purifier.to(default_device()), x.to(default_device()), seed).cpu()
        for image, file in zip(purified, outputs.values(), strict=True):
            write_image(image, file)
        others = set(args.source.iterdir()) - set(outputs) if args.source.is_dir() else set()
        left_out = ", ".join(sorted(shown_path(Path(p.name)) for p in others if p.resolve() != args.target.resolve()))
        print(
            f"{len(x)} images purified by {args.student}: {shown_path(args.target)}"
            + (f"; left out of {shown_path(args.source)}: {left_out}" if left_out else "")
        )
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
