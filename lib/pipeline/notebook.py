"""Runs one notebook with checked parameters: `python -m lib.run notebooks/NN.ipynb OUT.ipynb [-p name value …]`.

papermill only logs a name it does not know and keeps text where a number is due; here both are refused before any work,
with the list of what is valid. `dvc.yaml` calls this, and so does a user for an ablation.
"""

import argparse
import ast
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml

from lib.pipeline.profile import fits_type, type_name
from lib.utils.code_hash import SOURCES, StaleCode, check_code
from lib.utils.files import ROOT, atomic_path, write_json

TAG = "parameters"
PACKAGES = ("torch", "diffusers", "torchattacks", "accelerate", "numpy", "scipy", "scikit-learn", "papermill", "dvc")
VOLATILE = ("execution", "papermill", "ExecuteTime")  # metadata in which papermill keeps the clock and paths


class BadParameter(ValueError):
    """A parameter that the notebook does not have, or a value of another type than its default."""


def notebook_defaults(notebook: Path) -> dict[str, Any]:
    """Returns the notebook's parameters and their default values, read from its one cell tagged `parameters`.

    Raises BadParameter unless there is exactly one such cell and each line of it assigns a literal.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [c for c in cells if c.cell_type == "code" and TAG in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise BadParameter(f"{notebook} has {len(tagged)} cells tagged `{TAG}`: exactly one is due")
    found = {}
    for node in ast.parse(tagged[0].source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        try:
            found[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise BadParameter(
                f"{notebook}: `{ast.unparse(node)}` in the {TAG} cell is no literal assignment"
            ) from None
    return found


def parse_value(name: str, text: str, default: Any) -> Any:
    """Returns command-line `text` as a value of the type of `default`; a fraction such as 8/255 is a float."""
    try:
        if isinstance(default, str):
            return text
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, float):
            return float(Fraction(text)) if "/" in text else float(text)
        return ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError, ZeroDivisionError):
        raise BadParameter(
            f"{name} is {text!r}: {type_name(default)} is due, such as the default {default!r}"
        ) from None


def check_parameters(values: dict[str, Any], valid: dict[str, Any], notebook: Path) -> dict[str, Any]:
    """Returns `values` when the notebook knows each name and each value has its default's type; else BadParameter."""
    for name, value in values.items():
        if name not in valid:
            listing = ", ".join(f"{k} ({type_name(v)}, {v!r})" for k, v in valid.items())
            raise BadParameter(f"{notebook.name} has no parameter {name!r}. Valid ones: {listing}")
        if not fits_type(value, valid[name]):
            raise BadParameter(
                f"{name} is {value!r} ({type(value).__name__}): {type_name(valid[name])} is due, such as {valid[name]!r}"
            )
    return {k: float(v) if isinstance(valid[k], float) else v for k, v in values.items()}


def gather_parameters(notebook: Path, sections: list[str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Returns the checked parameters: the sections of params.yaml with the profile's name, then the pairs over them."""
    valid, values = notebook_defaults(notebook), {}
    if sections:
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        for section in sections:
            if not isinstance(params.get(section), dict):
                names = ", ".join(k for k, v in params.items() if isinstance(v, dict))
                raise BadParameter(f"params.yaml has no section {section!r}: it has {names}")
            values |= params[section]
        values["profile"] = params["profile"]
    for name, text in pairs:
        values[name] = parse_value(name, text, valid[name]) if name in valid else text
    return check_parameters(values, valid, notebook)


def run_git(*arguments: str) -> str:
    """Returns git's answer, or an empty string where there is no git or no repository."""
    try:
        return subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def provenance(notebook: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Returns what a reader needs to trust a result: code, settings and versions, taken at the start."""
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return {
        "notebook": notebook.name,
        "parameters": notebook_defaults(notebook) | values,
        "seed": (notebook_defaults(notebook) | values).get("seed"),
        "git_commit": run_git("rev-parse", "HEAD") or "not a git repository",
        "git_dirty": bool(run_git("status", "--porcelain", "-uno", "--", "lib", "notebooks", "profiles")),
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES if p in installed},
        "python": platform.python_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name() -> str:
    """Returns what the notebook computes on; importing torch takes seconds, which the kernel's start hides."""
    import torch

    from lib.utils.device import use_gpu

    if use_gpu():
        return torch.cuda.get_device_name()
    return f"CPU, threads: {os.environ.get('OMP_NUM_THREADS') or torch.get_num_threads()}"


def strip_volatile(notebook: nbformat.NotebookNode) -> None:
    """Takes papermill's clock, paths and random cell ids out of an executed notebook: equal runs give equal bytes."""
    for holder in (notebook, *notebook.cells):
        for key in VOLATILE:
            holder.metadata.pop(key, None)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"run-{i:02d}"


def sign_notebook(notebook: nbformat.NotebookNode, record: dict[str, Any]) -> None:
    """Adds the record to an executed notebook, as metadata and as a last cell to read."""
    notebook.metadata["distill_run"] = record
    versions = ", ".join(f"{k} {v}" for k, v in record["packages"].items())
    dirty = " with uncommitted changes" if record["git_dirty"] else ""
    text = f"Run of `{record['notebook']}` at commit `{record['git_commit'][:12]}`{dirty}, seed {record['seed']}, "
    text += f"{record['device']}, Python {record['python']}, {record['wall_seconds']:.0f} s. {versions}."
    notebook.cells.append(nbformat.v4.new_markdown_cell(f"---\n{text}", id="provenance"))


def show_progress(path: Path, stop: threading.Event) -> None:
    """Shows on standard error what the notebook's progress bars write to `path` (see `lib.utils.progress`)."""
    with path.open() as stream:
        while True:
            ended = stop.is_set()
            sys.stderr.write(stream.read())
            sys.stderr.flush()
            if ended:
                return
            stop.wait(0.5)


def run_notebook(
    notebook: Path, out: Path, values: dict[str, Any], progress: bool = True, record_file: Path | None = None
) -> Path:
    """Executes `notebook` from the repository's root on kernel `python3` and writes `out` whole, or not at all.

    The record of the run goes into `out`, or into `record_file` when one is named: equal runs then give equal bytes.
    On an error or an interruption the partial notebook stays beside it as `<out>.failed.ipynb` and the error goes on.
    """
    record, begin = provenance(notebook, values), time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = out.with_name(out.stem + ".failed.ipynb")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as aside:
        bars, part = Path(temporary) / "progress", Path(temporary) / out.name
        bars.touch()
        # bars go to our terminal, not into the notebook; a kernel of the environment wins over one in the home folder
        os.environ |= {"DISTILL_PROGRESS": str(bars), "TQDM_DISABLE": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
        stop = threading.Event()
        shower = threading.Thread(target=show_progress, args=(bars, stop), daemon=True)
        machine = aside.submit(device_name)
        if progress:
            shower.start()
        try:
            papermill.execute_notebook(
                str(notebook), str(part), values, kernel_name="python3", cwd=str(ROOT), progress_bar=False
            )
        except BaseException:
            if part.exists():
                save_notebook(nbformat.read(part, as_version=4), failed)
                print(f"the partial notebook, error included, is {failed}", file=sys.stderr)
            raise
        finally:
            stop.set()
            for key in ("DISTILL_PROGRESS", "TQDM_DISABLE"):
                os.environ.pop(key)
            if progress:
                shower.join()
        executed = nbformat.read(part, as_version=4)
    record |= {"device": machine.result(), "wall_seconds": round(time.monotonic() - begin, 1)}
    strip_volatile(executed)
    if record_file:
        write_json(record_file, record)
    else:
        sign_notebook(executed, record)
    save_notebook(executed, out)
    failed.unlink(missing_ok=True)
    return out


def save_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Writes a notebook, without the version of the Python that ran it: equal results are equal files."""
    notebook.metadata.get("language_info", {}).pop("version", None)
    with atomic_path(path) as part:
        nbformat.write(notebook, part)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.run", description="Run a notebook with checked parameters.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter")
    parser.add_argument("--section", nargs="+", default=[], metavar="S", help="sections of params.yaml to take first")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads; 0, the default: torch's choice"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the run's record there, not in the notebook")
    parser.add_argument("--code", choices=SOURCES, help="refuse to run unless data/code/<CODE>.txt is up to date")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    if not options.notebook.exists():
        parser.error(f"{options.notebook} does not exist: notebooks are in {ROOT / 'notebooks'}")
    try:
        if options.code:
            check_code(options.code)
        values = gather_parameters(options.notebook, options.section, options.p)
    except (BadParameter, StaleCode) as error:
        parser.exit(2, f"lib.run: {error}\n")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the kernel
    try:
        print(f"wrote {run_notebook(options.notebook, options.out, values, not options.quiet, options.record)}")
    except papermill.PapermillExecutionError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
