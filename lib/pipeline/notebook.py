"""Run one notebook with checked parameters: `python -m lib.run notebooks/NN.ipynb OUT.ipynb [-p name value …]`.

papermill only logs an unknown name and passes text where a number is expected; here both are refused before any work,
with the list of what is valid. `dvc.yaml` calls this for every stage, and a user for an ablation.

The only source of the pipeline's defaults is profiles/base.yaml: `--section` reads them from params.yaml, which
`lib.pipeline.profile` wrote. The values in a notebook's `parameters` cell are small ones for a run by hand: they define
the valid names and types, and decide no published result.
"""

import argparse
import ast
import base64
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
from lib.utils.files import ROOT, atomic_path, compress_png, write_json

TAG = "parameters"
PACKAGES = ("torch", "diffusers", "torchattacks", "accelerate", "numpy", "scipy", "scikit-learn", "papermill", "dvc")
VOLATILE = ("execution", "papermill", "ExecuteTime")  # metadata in which papermill stores timings and paths


class BadParameter(ValueError):
    """A parameter that the notebook does not have, or a value of another type than its default."""


def notebook_defaults(notebook: Path) -> dict[str, Any]:
    """Return the notebook's parameters and their default values, read from its one cell tagged `parameters`.

    Raises BadParameter unless there is exactly one such cell and each line of it assigns a literal.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [c for c in cells if c.cell_type == "code" and TAG in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise BadParameter(f"{notebook}: expected one cell tagged `{TAG}`, got {len(tagged)}")
    defaults = {}
    for node in ast.parse(tagged[0].source).body:
        try:
            match node:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                    defaults[name] = ast.literal_eval(value)
                case _:
                    raise ValueError("no assignment of one name")
        except ValueError:
            raise BadParameter(
                f"{notebook}: expected literal assignments in the {TAG} cell, got `{ast.unparse(node)}`"
            ) from None
    return defaults


def parse_value(name: str, text: str, default: Any) -> Any:
    """Return command-line `text` as a value of the type of `default`; a fraction such as 8/255 is a float."""
    try:
        if isinstance(default, str):
            return text
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, float):
            return float(Fraction(text)) if "/" in text else float(text)
        return ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError, ZeroDivisionError):
        raise BadParameter(f"{name}: expected {type_name(default)}, such as {default!r}, got {text!r}") from None


def check_parameters(values: dict[str, Any], valid: dict[str, Any], notebook: Path) -> dict[str, Any]:
    """Return `values` in the types of the defaults; BadParameter for an unknown name or a value of another type."""
    for name, value in values.items():
        if name not in valid:
            listing = ", ".join(f"{k} ({type_name(v)}, {v!r})" for k, v in valid.items())
            raise BadParameter(f"{notebook.name} has no parameter {name!r}. Valid ones: {listing}")
        if not fits_type(value, valid[name]):
            kind, example = type_name(valid[name]), valid[name]
            raise BadParameter(f"{name}: expected {kind}, such as {example!r}, got {value!r} ({type(value).__name__})")
    return {k: float(v) if isinstance(valid[k], float) else v for k, v in values.items()}


def gather_parameters(notebook: Path, sections: list[str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the checked parameters: sections of params.yaml with the profile's name, overridden by the pairs."""
    valid, values = notebook_defaults(notebook), {}
    if sections:
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        for section in sections:
            if not isinstance(params.get(section), dict):
                names = ", ".join(k for k, v in params.items() if isinstance(v, dict))
                raise BadParameter(f"params.yaml: expected one of the sections {names}, got {section!r}")
            values |= params[section]
        values["profile"] = params["profile"]
    for name, text in pairs:
        values[name] = parse_value(name, text, valid[name]) if name in valid else text
    return check_parameters(values, valid, notebook)


def run_git(*arguments: str) -> str:
    """Return the output of a git command, or an empty string where there is no git or no repository."""
    try:
        return subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def provenance(notebook: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return what a result depends on, taken at the start: commit, parameters, versions."""
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
    """Return the name of the device; importing torch takes seconds, so this runs while the kernel starts."""
    import torch

    from lib.utils.device import use_gpu

    if use_gpu():
        return torch.cuda.get_device_name()
    return f"CPU, threads: {os.environ.get('OMP_NUM_THREADS') or torch.get_num_threads()}"


def strip_volatile(notebook: nbformat.NotebookNode) -> None:
    """Remove papermill's timings, paths and random cell ids from an executed notebook, and make its figures small.

    Equal runs give equal bytes.
    """
    for holder in (notebook, *notebook.cells):
        for key in VOLATILE:
            holder.metadata.pop(key, None)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"run-{i:02d}"
        for output in cell.get("outputs", []):
            if image := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = base64.b64encode(compress_png(base64.b64decode(image))).decode()


def sign_notebook(notebook: nbformat.NotebookNode, record: dict[str, Any]) -> None:
    """Add the record to an executed notebook, as metadata and as a last cell to read."""
    notebook.metadata["distill_run"] = record
    versions = ", ".join(f"{k} {v}" for k, v in record["packages"].items())
    dirty = " with uncommitted changes" if record["git_dirty"] else ""
    text = f"Run of `{record['notebook']}` at commit `{record['git_commit'][:12]}`{dirty}, seed {record['seed']}, "
    text += f"{record['device']}, Python {record['python']}, {record['wall_seconds']:.0f} s. {versions}."
    notebook.cells.append(nbformat.v4.new_markdown_cell(f"---\n{text}", id="provenance"))


def show_progress(path: Path, stop: threading.Event) -> None:
    """Copy to standard error what the notebook's progress bars write to `path` (see `lib.utils.progress`)."""
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
    """Execute `notebook` from the repository's root on kernel `python3` and write `out` atomically.

    The record of the run goes into `out`, or into `record_file` if given: equal runs then give equal bytes. On an error
    or an interruption the partial notebook is saved as `<out>.failed.ipynb` and the error is raised again.
    """
    record, begin = provenance(notebook, values), time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = out.with_name(out.stem + ".failed.ipynb")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as executor:
        bars, part = Path(temporary) / "progress", Path(temporary) / out.name
        bars.touch()
        # bars go to this terminal, not into the notebook; a kernel of the environment wins over one in the home folder
        os.environ |= {"DISTILL_PROGRESS": str(bars), "TQDM_DISABLE": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
        stop = threading.Event()
        display = threading.Thread(target=show_progress, args=(bars, stop), daemon=True)
        device = executor.submit(device_name)
        if progress:
            display.start()
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
                display.join()
        executed = nbformat.read(part, as_version=4)
    record |= {"device": device.result(), "wall_seconds": round(time.monotonic() - begin, 1)}
    strip_volatile(executed)
    if record_file:
        write_json(record_file, record)
    else:
        sign_notebook(executed, record)
    save_notebook(executed, out)
    failed.unlink(missing_ok=True)
    return out


def save_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook atomically, without the Python version that ran it: equal results are equal files."""
    notebook.metadata.get("language_info", {}).pop("version", None)
    with atomic_path(path) as part:
        nbformat.write(notebook, part)


def main(arguments: list[str] | None = None) -> None:
    """Run a notebook with checked parameters."""
    parser = argparse.ArgumentParser(prog="python -m lib.run", description=main.__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter")
    parser.add_argument("--section", nargs="+", default=[], metavar="S", help="sections of params.yaml to take first")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads; 0, the default: torch's choice"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the run's record there, not into the notebook"
    )
    parser.add_argument("--code", choices=SOURCES, help="refuse to run unless data/code/<CODE>.txt is up to date")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    if not options.notebook.exists():
        parser.error(f"{options.notebook}: no such file; notebooks are in {ROOT / 'notebooks'}")
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
