"""Results on disk, one set of files per profile, experiment and seed, written atomically.

`data/<profile>/metrics/<experiment>-s<seed>.json` holds the numbers, `records/…` the same with the arrays that figures
need and the protocol that they were made under, `models/…` the weights: on one machine, equal seeds give equal bytes.
Timings go to `timing/…`, which neither git nor DVC tracks. Each `save_…` has its `load_…`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.utils.files import ROOT, atomic_path, read_json, to_jsonable, write_json
from lib.utils.protocol import protocol_state
from lib.utils.validation import Name, NonNegativeInt, check_value

SCRATCH = "scratch"  # the profile of notebooks run by hand: git ignores its outputs


def results_dir(profile: str, kind: str = "") -> Path:
    """Return `data/<profile>/<kind>` under the repository's root; BadSetting for a profile that is no plain name."""
    return ROOT / "data" / check_value("a profile", profile, Name) / kind


def record_name(experiment: str, seed: int) -> str:
    """Return the file name of one experiment's results for one seed; BadSetting for what is no name or no seed."""
    return f"{check_value('an experiment', experiment, Name)}-s{check_value('a seed', seed, NonNegativeInt)}.json"


def model_file(profile: str, name: str) -> Path:
    """Return the file of a model's weights; a name may have several parts, with / between them."""
    for part in name.split("/"):
        check_value("each part of a model's name", part, Name)
    return results_dir(profile, "models") / f"{name}.safetensors"


def save_record(
    profile: str,
    experiment: str,
    seed: int,
    *,
    metrics: dict,
    arrays: dict,
    outcomes: dict | None = None,
    timing: dict | None = None,
) -> dict:
    """Write one experiment's results for one seed and return the record that figures are drawn from.

    `outcomes`: which test images each defence classifies correctly under each condition, in the form of
    `lib.experiments.samples.record_outcomes`; older records have none.
    """
    name = record_name(experiment, seed)
    record = {"experiment": experiment, "seed": seed, "profile": profile, "metrics": metrics, "arrays": arrays}
    record |= {"protocol": protocol_state()} | ({} if outcomes is None else {"outcomes": outcomes})
    record = to_jsonable(record)
    write_json(results_dir(profile, "metrics") / name, metrics)
    write_json(results_dir(profile, "records") / name, record)
    if timing:
        write_json(results_dir(profile, "timing") / name, timing)
    return record


def load_record(profile: str, experiment: str, seed: int) -> dict:
    """Return the record of one seed; FileNotFoundError names the stage to run when it is missing."""
    path = results_dir(profile, "records") / record_name(experiment, seed)
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing: run `dvc repro {experiment}@{profile}-{seed}`")
    return read_json(path)


def load_records(profile: str, experiment: str, seeds: Sequence[int]) -> list[dict]:
    """Return the records of all given seeds (see `load_record`)."""
    return [load_record(profile, experiment, seed) for seed in seeds]


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError, which names file and weight, for weights that are not all finite."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{path}: expected finite weights, got NaN or infinity in {name}: train the network again")


def save_weights(model: nn.Module, path: Path) -> Path:
    """Write a model's weights to `path`, a safetensors file, and return the path; ValueError unless all are finite."""
    check_finite(model.state_dict(), path)
    with atomic_path(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, part)
    return path


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load weights that `save_weights` wrote into `model` and return it.

    Raises ValueError, which names the file, for one that is broken, and for weights of another network: other names,
    shapes or dtypes, or not finite.
    """
    remedy = "delete it and run the stage that writes it again"
    try:
        weights = load_file(path)
    except SafetensorError as error:
        problem = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: expected safetensors, got a broken file ({problem}): {remedy}") from error
    kinds = [{k: (tuple(v.shape), v.dtype) for k, v in state.items()} for state in (model.state_dict(), weights)]
    if wrong := sorted(name for name in kinds[0] | kinds[1] if kinds[0].get(name) != kinds[1].get(name)):
        expected, got = (kind.get(wrong[0], "no such weight") for kind in kinds)
        raise ValueError(f"{path}: expected {wrong[0][:80]} to be {expected}, got {got}: {remedy}")
    check_finite(weights, path)
    model.load_state_dict(weights)
    return model


def save_model(model: nn.Module, profile: str, name: str) -> Path:
    """Write a model's weights to `data/<profile>/models/<name>.safetensors` and return the path."""
    return save_weights(model, model_file(profile, name))


def load_model(model: nn.Module, profile: str, name: str) -> nn.Module:
    """Load weights that `save_model` wrote into `model` and return it in eval mode."""
    path = model_file(profile, name)
    if not path.exists():
        raise FileNotFoundError(
            f"{path.relative_to(ROOT)} is missing: run `dvc repro` for the experiment that trains it"
        )
    return load_weights(model, path).eval()
