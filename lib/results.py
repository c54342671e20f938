"""Where results live and how they are written: atomically, canonically, one set of files per experiment and seed.

`data/<profile>/metrics/<experiment>-s<seed>.json` holds the scalars, `records/…` the same with the arrays that figures
need, `models/…` the weights: all equal for equal seeds on one machine, bit for bit. What a clock measured goes to
`timing/…`, which neither git nor DVC tracks.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from lib.paths import ROOT, whole

SCRATCH = "scratch"  # the profile of notebooks run by hand: git ignores its outputs


def folder(profile: str, kind: str = "") -> Path:
    """Returns `data/<profile>/<kind>` under the repository's root."""
    return ROOT / "data" / profile / kind


def plain(value: Any) -> Any:
    """Returns `value` with tensors, arrays and paths turned into JSON's types; NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    return str(value)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that `path` always holds a whole one."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes canonical JSON: sorted keys, one line end, no NaN; nested lists of numbers stay on one line."""
    write_text(path, _dumps(plain(value), "") + "\n")


def _dumps(value: Any, indent: str) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    inner = indent + "  "
    rows = [f"{inner}{json.dumps(k, ensure_ascii=False)}: {_dumps(v, inner)}" for k, v in sorted(value.items())]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


def save(profile: str, experiment: str, seed: int, *, metrics: dict, arrays: dict, timing: dict | None = None) -> dict:
    """Writes one experiment's results for one seed and returns the record that figures are drawn from."""
    name = f"{experiment}-s{seed}.json"
    record = plain({"experiment": experiment, "seed": seed, "profile": profile, "metrics": metrics, "arrays": arrays})
    write_json(folder(profile, "metrics") / name, metrics)
    write_json(folder(profile, "records") / name, record)
    if timing:
        write_json(folder(profile, "timing") / name, timing)
    return record


def load(profile: str, experiment: str, seeds: Sequence[int]) -> list[dict]:
    """Returns the records of the given seeds; FileNotFoundError names the stage to run when one is missing."""
    records = []
    for seed in seeds:
        name = f"{experiment}-s{seed}.json"
        path = folder(profile, "records") / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path.relative_to(ROOT)} is missing: run `dvc repro {experiment}@{profile}-{seed}`"
            )
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def save_model(model: nn.Module, profile: str, name: str) -> Path:
    """Writes a model's weights to `data/<profile>/models/<name>.safetensors`, atomically."""
    path = folder(profile, "models") / f"{name}.safetensors"
    with whole(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, part)
    return path


def load_model(model: nn.Module, profile: str, name: str) -> nn.Module:
    """Loads weights that `save_model` wrote into `model` and returns it in eval mode; safetensors only, no pickles."""
    path = folder(profile, "models") / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path.relative_to(ROOT)} is missing: run `dvc repro` for the experiment that trains it"
        )
    model.load_state_dict(load_file(path))
    return model.eval()
