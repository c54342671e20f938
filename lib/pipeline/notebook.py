"""Run one notebook with checked parameters: `python -m lib.run notebooks/NN.ipynb OUT.ipynb [-p name value …]`.

papermill only logs an unknown name and passes text where a number is expected; here both are refused before any work,
with the list of what is valid. `dvc.yaml` calls this for every stage, and a user for an ablation.

The only source of the pipeline's defaults is profiles/base.yaml: `--section` reads them from params.yaml, which
`lib.pipeline.profile` wrote. The values in a notebook's `parameters` cell are small ones for a run by hand: they define
the valid names and types, and decide no published result.
"""

import argparse
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
from pathlib import Path
from typing import Any

import nbformat
import papermill

from lib.pipeline.parameters import gather_parameters, notebook_defaults, protect_pairs, unprotect
from lib.utils.code_hash import SOURCES, check_code
from lib.utils.files import ROOT, atomic_path, compress_png, write_json

PACKAGES = ("torch", "diffusers", "torchattacks", "accelerate", "numpy", "scipy", "scikit-learn", "papermill", "dvc")
VOLATILE = ("execution", "papermill", "ExecuteTime")  # metadata in which papermill stores timings and paths


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
    pair = {"nargs": 2, "type": unprotect, "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", action="append", default=[], help="one parameter", **pair)
    parser.add_argument("--section", nargs="+", default=[], metavar="S", help="sections of params.yaml to take first")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads; 0, the default: torch's choice"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the run's record there, not into the notebook"
    )
    parser.add_argument("--code", choices=SOURCES, help="refuse to run unless data/code/<CODE>.txt is up to date")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(protect_pairs(sys.argv[1:] if arguments is None else arguments))
    if not options.notebook.exists():
        parser.error(f"{options.notebook}: no such file; notebooks are in {ROOT / 'notebooks'}")
    try:
        if options.code:
            check_code(options.code)
        values = gather_parameters(options.notebook, options.section, options.p)
    except ValueError as error:  # of parameters, and StaleCode
        parser.exit(2, f"lib.run: {error}\n")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the kernel
    try:
        print(f"wrote {run_notebook(options.notebook, options.out, values, not options.quiet, options.record)}")
    except papermill.PapermillExecutionError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
