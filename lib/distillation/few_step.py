"""Few-step students of one diffusion model: recipe, samplers, and how networks are saved and loaded.

A `Sampler` is the reverse process from noisy z at level t* to images in pixels: the teacher by any solver in any number
of steps, or a student in few. All start from the same z, so that they can be compared image by image.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from lib.data import Data
from lib.diffusion.network import build_unet, denoising_loss, eps_model, load_facts, load_network
from lib.diffusion.network_files import RECIPE, bind_to_recipe, read_object, refuse
from lib.diffusion.schedule import alpha_sigma, t_to_sigma, time_grid, to_model_range, to_pixel_range
from lib.diffusion.solvers import reverse_process
from lib.distillation.consistency import (
    ConsistencyScalings,
    EMATarget,
    PreconditionedTeacher,
    consistency_loss,
    consistency_sample,
    image_distance,
)
from lib.distillation.progressive import progressive_loss, student_steps
from lib.utils.checkpoints import remove_checkpoints
from lib.utils.device import default_device
from lib.utils.files import dump_canonical, to_jsonable, write_bytes
from lib.utils.random_state import RandnLike, randn_like
from lib.utils.seeds import seeded_generator
from lib.utils.specs import StudentSpec
from lib.utils.validation import BelowOne, Integer, Positive, PositiveInt, check_fields, check_settings, check_value

Sampler = Callable[[Tensor, RandnLike], Tensor]
Samplers = dict[str, tuple[int, Sampler]]  # by name: network evaluations per image, and the sampler
STEP_COUNTS = (4, 2, 1)  # of the students that claims are about
REFERENCE_STEPS = 100  # of the teacher: DiffPure's, and those of the path that students imitate


@dataclass(frozen=True)
class FewStepRecipe:
    """Settings of teacher and students; their values are those of a profile, section `diff` (profiles/base.yaml).

    Args:
        channels: of the U-Net, one per level.
        attention: self-attention in the lowest level.
        target: what the network predicts, one of `lib.diffusion.network.PREDICTION_TARGETS`.
        t: t*, the level from which samplers start, an index of the schedule.
        t_max: the last level that the teacher learns, at least t*.
        batch_size: of all trainings.
        teacher_ema: decay of the teacher's averaged weights.
        student_ema: decay of the students' averaged weights; a slow average holds each student back at its teacher.
        teacher_epochs: of the teacher.
        teacher_lr: learning rate of the teacher.
        first: steps of the teacher of the first progressive student: a power of 2.
        weight: of the progressive loss, one of `lib.distillation.progressive.SNR_WEIGHTS`.
        round_epochs: of each progressive student.
        round_lr: learning rate of each progressive student.
        cd_epochs: of the consistency student.
        cd_lr: learning rate of the consistency student.
        levels: of the consistency student's grid at the beginning and at the end of its training.
        solver: of the consistency student's teacher, "heun" or "ddim".
        cd_weight: of the consistency loss, one of `lib.distillation.consistency.CONSISTENCY_WEIGHTS`.
        measure: distance of the consistency loss, "huber" or "l2".
        decay: of the average that gives the consistency student's targets; 0 for the student itself.
        skip: whether the consistency student has the skip connection.

    Raises:
        ValueError: for a value of another type or out of its range.
    """

    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    attention: bool
    target: Literal["epsilon", "v"]
    t: Annotated[Positive, Field(le=999)]
    t_max: Annotated[Integer, Field(ge=0, le=999)]
    batch_size: PositiveInt
    teacher_ema: BelowOne
    student_ema: BelowOne
    teacher_epochs: PositiveInt
    teacher_lr: Positive
    first: Annotated[Integer, Field(ge=2)]
    weight: Literal["uniform", "truncated", "snr+1", "capped"]
    round_epochs: PositiveInt
    round_lr: Positive
    cd_epochs: PositiveInt
    cd_lr: Positive
    levels: tuple[PositiveInt, PositiveInt]
    solver: Literal["heun", "ddim"]
    cd_weight: Literal["inverse", "uniform"]
    measure: Literal["huber", "l2"]
    decay: BelowOne
    skip: bool

    def __post_init__(self) -> None:
        check_fields(self)


def few_step_recipe(settings: Mapping[str, Any]) -> FewStepRecipe:
    """Build a recipe from settings by name, such as a profile's section `diff`.

    Args:
        settings: a value for each field of `FewStepRecipe`; other names are ignored, lists become tuples.

    Returns:
        The recipe.

    Raises:
        ValueError: for a missing field, a value of another type and one out of its range.
    """
    names = [f.name for f in fields(FewStepRecipe)]
    if missing := [name for name in names if name not in settings]:
        raise ValueError(f"expected a value for every field of the recipe, got none for {', '.join(missing)}")
    values: dict[str, Any] = {
        name: tuple(settings[name]) if isinstance(settings[name], list) else settings[name] for name in names
    }
    return FewStepRecipe(**check_settings(FewStepRecipe, values))


def check_recipe(recipe: FewStepRecipe, steps: Sequence[int], size: int) -> None:
    """Check settings before any training.

    Args:
        recipe: of teacher and students.
        steps: in which samplers are to be compared.
        size: height and width of the images.

    Returns:
        None.

    Raises:
        ValueError: for settings that could only fail later.
    """
    if missing := sorted(set(STEP_COUNTS) - set(steps)):
        raise ValueError(f"expected 4, 2 and 1 among steps, got {list(steps)} without {', '.join(map(str, missing))}")
    if student_steps(recipe.first)[0] < STEP_COUNTS[0]:
        raise ValueError(f"expected first to be at least {2 * STEP_COUNTS[0]} steps, got first {recipe.first}")
    if not 0 < recipe.t <= recipe.t_max:
        raise ValueError(
            f"expected 0 < t <= t_max, since the teacher must learn all levels up to t, "
            f"got t {recipe.t}, t_max {recipe.t_max}"
        )
    build_unet(size=size, channels=recipe.channels, attention=recipe.attention, seed=0)
    denoising_loss(recipe.target, recipe.t_max)
    image_distance(recipe.measure)
    EMATarget(nn.Identity(), recipe.decay)
    progressive_loss(lambda z, t: z, 1, t=recipe.t, weight=recipe.weight)
    scalings = ConsistencyScalings(t_to_sigma(recipe.t), sigma_data=0.5)
    options = {"levels": recipe.levels, "solver": recipe.solver, "weight": recipe.cd_weight}
    consistency_loss(lambda z, t: z, scalings, epochs=1, **options)


def solver_sampler(net: nn.Module, steps: int, recipe: FewStepRecipe, solver: str = "ddim") -> Sampler:
    """Return the sampler of the teacher, or of a progressive student, by a solver of `lib.diffusion.solvers`.

    Args:
        net: a diffusion network.
        steps: of the solver.
        recipe: of the network.
        solver: "ddim", as progressive students are trained for, "heun", "sde" or "ddpm".

    Returns:
        A function of z (n, c, h, w) at level t* and a source of noise to images in [0, 1], not clamped.
    """
    model, times = eps_model(net, recipe.target), time_grid(recipe.t, steps)
    return lambda z, randn_like: to_pixel_range(reverse_process(model, z, times, solver, randn_like))


def precondition(net: nn.Module, scalings: ConsistencyScalings, recipe: FewStepRecipe) -> nn.Module:
    """Return a diffusion network as the F of a consistency model.

    Args:
        net: the diffusion network.
        scalings: of the consistency model.
        recipe: of the network.

    Returns:
        The network, preconditioned where f has the skip connection; its weights are shared.
    """
    return PreconditionedTeacher(net, scalings, recipe.target) if scalings.skip else net


def unwrap(net: nn.Module) -> nn.Module:
    """Return the diffusion network inside the result of `precondition`."""
    return net.net if isinstance(net, PreconditionedTeacher) else net


def consistency_sampler(net: nn.Module, scalings: ConsistencyScalings, steps: int, recipe: FewStepRecipe) -> Sampler:
    """Return the sampler of a consistency student; it takes the same z as the others.

    Args:
        net: the student's diffusion network.
        scalings: of the student, with its own `skip`, see `load_consistency_student`.
        steps: evaluations of the network per image, 1 to 40.
        recipe: of the student.

    Returns:
        A function of z (n, c, h, w) at level t* and a source of noise to images in [0, 1], not clamped.
    """
    check_value("steps", steps, PositiveInt)
    f, alpha_t = precondition(net, scalings, recipe), alpha_sigma(recipe.t)[0]
    return lambda z, randn_like: to_pixel_range(consistency_sample(f, z / alpha_t, scalings, steps, randn_like))


@torch.no_grad()
def run_sampler(
    sampler: Sampler, z: Tensor, seed: int = 0, purpose: str = "restored", batch_size: int = 256
) -> Float[Tensor, "n c h w"]:
    """Run a sampler batch by batch, with the noise of one purpose.

    Args:
        sampler: of z and a source of noise.
        z: noisy images (n, c, h, w) at level t*.
        seed: of the noise.
        purpose: of the noise; other purposes have independent noise.
        batch_size: images per batch; it decides the order in which noise is drawn.

    Returns:
        Images (n, c, h, w) in [0, 1], clamped, on the CPU.
    """
    noise = randn_like(seeded_generator(seed, purpose, default_device()))
    return torch.cat([sampler(part.to(default_device()), noise).clamp(0, 1).cpu() for part in z.split(batch_size)])


def mse(images: Float[Tensor, "n c h w"], reference: Float[Tensor, "n c h w"]) -> float:
    """Return the mean squared difference per pixel of images in [0, 1]."""
    return (images - reference).square().mean().item()


def scalings_of(data: Data, recipe: FewStepRecipe) -> ConsistencyScalings:
    """Return the consistency student's scalings: σ* of the recipe, σ_data measured on the training images."""
    return ConsistencyScalings(t_to_sigma(recipe.t), to_model_range(data.train.x).std().item(), skip=recipe.skip)


def load_history(folder: Path) -> list[dict[str, Any]]:
    """Return the history that was saved with a network, one dict per epoch."""
    return load_facts(folder)["history"]


def load_consistency_student(models: Path, kind: str) -> tuple[nn.Module, ConsistencyScalings]:
    """Load a consistency student: its network and the function that it stands for.

    Args:
        models: a folder with the configuration that `save_config` wrote.
        kind: name of the network, such as "cd" or "noskip".

    Returns:
        The network in eval mode, and the scalings with its own `skip`: that of its facts, else that of the recipe.

    Raises:
        FileNotFoundError: without the network or the configuration.
        ValueError: for a name of no consistency student, and for files that are not those of the student's card.
    """
    if kind in ("teacher", "sampler") or kind.startswith("pd-"):
        raise ValueError(f"expected the name of a consistency student, such as cd, got {kind[:40]!r}")
    folder, (recipe, scalings) = models / str(StudentSpec.parse(kind)), load_config(models)
    net = load_network(folder, target=recipe.target)
    skip = check_value(f"skip in {folder / 'facts.json'}", load_facts(folder).get("skip", scalings.skip), bool)
    return net, replace(scalings, skip=skip)


def save_config(folder: Path, recipe: FewStepRecipe, scalings: ConsistencyScalings) -> None:
    """Write recipe and σ_data of the networks in a folder, for `load_config`; the networks' cards state them, too.

    Args:
        folder: of the networks.
        recipe: of teacher and students.
        scalings: of the consistency student.

    Returns:
        None.
    """
    content = dump_canonical(to_jsonable(asdict(recipe) | {"sigma_data": scalings.sigma_data})) + "\n"
    bind_to_recipe(folder, content.encode())
    write_bytes(folder / RECIPE, content.encode())


def load_config(folder: Path) -> tuple[FewStepRecipe, ConsistencyScalings]:
    """Load what `save_config` wrote.

    Args:
        folder: of networks, e.g. data/digits/models/diff-s0.

    Returns:
        Recipe and scalings, with the recipe's `skip`; a student's own is in `load_consistency_student`.

    Raises:
        FileNotFoundError: without it.
        ValueError: for missing or unknown entries and values of another type or out of range; names the file.
    """
    path = Path(folder) / RECIPE
    if not path.exists():
        raise FileNotFoundError(f"expected {RECIPE} in {folder}: run `dvc repro` for the experiment that trains it")
    settings = read_object(path)
    names = {f.name for f in fields(FewStepRecipe)} | {"sigma_data"}
    if unknown := sorted(set(settings) - names):
        refuse(path, f"expected the fields of a recipe, got {', '.join(unknown)[:80]}")
    try:
        recipe = few_step_recipe(settings)
        sigma_data = check_value("sigma_data", settings.get("sigma_data"), Annotated[Positive, Field(le=2)])
        return recipe, ConsistencyScalings(t_to_sigma(recipe.t), sigma_data, skip=recipe.skip)
    except ValueError as error:
        refuse(path, str(error))


def publish(work: Path, target: Path) -> Path:
    """Move all networks of a run to `target`, in place of what was there; checkpoints and leftovers are deleted.

    Args:
        work: folder of the run, or `target` itself, where nothing is left to do: a cell may be run again.
        target: where other experiments load them.

    Returns:
        `target`.
    """
    if work != target:
        remove_checkpoints(work)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work, target)
    return target
