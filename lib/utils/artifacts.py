"""Where results live and how they are written: atomically, canonically, one set of files per experiment and seed.

`data/<profile>/metrics/<experiment>-s<seed>.json` holds the scalars, `records/…` the same with the arrays that figures
need, `models/…` the weights: all equal for equal seeds on one machine, bit for bit. What a clock measured goes to
`timing/…`, which neither git nor DVC tracks.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from lib.utils.files import ROOT, atomic_path, to_jsonable, write_json

SCRATCH = "scratch"  # the profile of notebooks run by hand: git ignores its outputs


def results_dir(profile: str, kind: str = "") -> Path:
    """Returns `data/<profile>/<kind>` under the repository's root."""
    return ROOT / "data" / profile / kind


def save_record(
    profile: str, experiment: str, seed: int, *, metrics: dict, arrays: dict, timing: dict | None = None
) -> dict:
    """Writes one experiment's results for one seed and returns the record that figures are drawn from."""
    name = f"{experiment}-s{seed}.json"
    record = to_jsonable(
        {"experiment": experiment, "seed": seed, "profile": profile, "metrics": metrics, "arrays": arrays}
    )
    write_json(results_dir(profile, "metrics") / name, metrics)
    write_json(results_dir(profile, "records") / name, record)
    if timing:
        write_json(results_dir(profile, "timing") / name, timing)
    return record


def load_records(profile: str, experiment: str, seeds: Sequence[int]) -> list[dict]:
    """Returns the records of the given seeds; FileNotFoundError names the stage to run when one is missing."""
    records = []
    for seed in seeds:
        name = f"{experiment}-s{seed}.json"
        path = results_dir(profile, "records") / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path.relative_to(ROOT)} is missing: run `dvc repro {experiment}@{profile}-{seed}`"
            )
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def write_weights(model: nn.Module, path: Path) -> Path:
    """Writes a model's weights to `path`, a safetensors file, atomically."""
    with atomic_path(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, part)
    return path


def save_model(model: nn.Module, profile: str, name: str) -> Path:
    """Writes a model's weights to `data/<profile>/models/<name>.safetensors`, atomically."""
    return write_weights(model, results_dir(profile, "models") / f"{name}.safetensors")


def load_model(model: nn.Module, profile: str, name: str) -> nn.Module:
    """Loads weights that `save_model` wrote into `model` and returns it in eval mode; safetensors only, no pickles."""
    path = results_dir(profile, "models") / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path.relative_to(ROOT)} is missing: run `dvc repro` for the experiment that trains it"
        )
    model.load_state_dict(load_file(path))
    return model.eval()
