"""Teachers of others: a diffusion model in diffusers' format, from a folder or a hub, that purifies and is distilled.

    python -m lib.pipeline.adopt google/ddpm-cifar10-32 data/cifar10/models/ddpm

The scheduler's configuration says what the network predicts, and that its levels are those of DDPM's linear betas; the
recipe says the rest, and lies beside it, so that `lib.purify.load_purifier`, the trainings of students and all attacks
take it as one of ours.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lib.data import Data
from lib.diffusion.network import load_network, save_network
from lib.diffusion.schedule import ABAR
from lib.distillation.few_step import FewStepRecipe, save_config, scalings_of

HUB_FILES = ("*.json", "*.safetensors", "unet/*", "scheduler/*")


def download_model(name: str) -> Path:
    """Download the files of a model from the Hugging Face hub, or find them in its cache.

    Args:
        name: `<owner>/<model>`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: where it is not to be had; says why in one line.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # of the network, the hub, its client and the name
        problem = " ".join(str(error).split())[:160]
        raise FileNotFoundError(f"expected a folder or a model of the hub, got {name!r}: {problem}") from error


def find_model(source: str, download: Callable[[str], Path] = download_model) -> Path:
    """Return the folder of a model: `source` itself, or the files of that name on the hub.

    Args:
        source: a folder, or `<owner>/<model>`.
        download: returns the folder of a name on the hub.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: for what is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") != 1 or source.startswith((".", "/")) or source.endswith("/"):
        raise FileNotFoundError(f"expected a folder or a name such as google/ddpm-cifar10-32, got {source!r}")
    return download(source)


def _check_fit(net: nn.Module, data: Data) -> None:
    """Raise ValueError unless a network is one of images of a data set's channels and size."""
    config: Any = net.config
    if config.in_channels != data.in_channels:
        raise ValueError(f"expected a network of {data.in_channels} channels for {data.name}, got {config.in_channels}")
    if config.sample_size not in (None, data.size):
        raise ValueError(
            f"expected a network of {data.size} x {data.size} images for {data.name}, got {config.sample_size}"
        )


def adopt_teacher(source: str, models: Path, data: Data, recipe: FewStepRecipe) -> FewStepRecipe:
    """Take a diffusion model of others as the teacher in a folder of networks.

    Args:
        source: a folder in diffusers' format, a network or a pipeline, or a model's name on the Hugging Face hub.
        models: the folder, which must not hold a teacher yet.
        data: the data set that it is for.
        recipe: of students: all that the network does not decide.

    Returns:
        The recipe that was written: with the network's channels and target, and all levels, which it has learned.

    Raises:
        FileExistsError: where there is a teacher.
        FileNotFoundError: without a model.
        ValueError: for one of other images, another schedule, or files that are broken; names the file.
    """
    if (models / "teacher").exists():
        raise FileExistsError(f"expected a folder without a teacher, got {models}: choose another")
    net = load_network(find_model(source), foreign=True)
    _check_fit(net, data)
    config: Any = net.config
    adopted = replace(
        recipe,
        channels=tuple(config.block_out_channels),
        attention=any("Attn" in block for block in config.down_block_types),
        target=getattr(net, "prediction_target", None) or "epsilon",
        t_max=len(ABAR) - 1,
    )
    models.mkdir(parents=True, exist_ok=True)
    save_network(net, models / "teacher", {"history": [], "source": str(source)})
    save_config(models, adopted, scalings_of(data, adopted))
    return adopted
