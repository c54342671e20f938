"""Run one notebook with checked parameters: `python -m lib.run notebooks/NN.ipynb OUT.ipynb [-p name value …]`.

papermill only logs an unknown name and passes text where a number is expected; here both are refused before any work,
with the list of what is valid. `dvc.yaml` calls this for every stage, and a user for an ablation.

The only source of the pipeline's defaults is profiles/base.yaml: `--section` reads them from params.yaml, which
`lib.pipeline.profile` wrote. The values in a notebook's `parameters` cell are small ones for a run by hand: they define
the valid names and types, and decide no published result.

The executed notebook stays in this process until it is saved: neither a killed kernel nor a full disk loses it. The
kernel ends with this process, and its workers with it (`lib.utils.processes`). Of several processes that a launcher
begins, the first one runs the notebook (`lib.pipeline.launch`).
"""

import argparse
import base64
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from lib.pipeline.code import check_pipeline_code, is_interactive
from lib.pipeline.launch import leave_group, process_rank
from lib.pipeline.parameters import gather_parameters, protect_pairs, unprotect
from lib.pipeline.provenance import device_name, provenance, provenance_text
from lib.utils.code_hash import SOURCES
from lib.utils.files import ROOT, atomic_path, check_writable, compress_png, write_json
from lib.utils.memory import KEEP_MEMORY
from lib.utils.processes import exit_on_signals, print_in_any_locale

VOLATILE = ("execution", "papermill", "ExecuteTime")  # metadata in which papermill stores timings and paths
START = "from lib.utils.processes import end_with_parent; end_with_parent({pid})"  # the kernel's first line
EXPLAINED = ("OSError", "FileNotFoundError", "PermissionError", "MemoryError", "BadSetting")  # need no traceback


def strip_volatile(notebook: nbformat.NotebookNode) -> None:
    """Remove timings, paths (also of warnings) and random cell ids from an executed notebook, and shrink its figures.

    Equal runs give equal bytes, wherever they were made.
    """
    for holder in (notebook, *notebook.cells):
        for key in VOLATILE:
            holder.metadata.pop(key, None)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"run-{i:02d}"
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "cell", output.text.replace(f"{ROOT}/", ""))
            if image := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = base64.b64encode(compress_png(base64.b64decode(image))).decode()


def sign_notebook(notebook: nbformat.NotebookNode, record: dict[str, Any]) -> None:
    """Add the record to an executed notebook, as metadata and as a last cell to read."""
    notebook.metadata["distill_run"] = record
    notebook.cells.append(nbformat.v4.new_markdown_cell(f"---\n{provenance_text(record)}", id="provenance"))


def show_progress(path: Path, stop: threading.Event) -> None:
    """Copy to standard error what the notebook's progress bars write to `path` (see `lib.utils.progress`)."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        while True:
            ended = stop.is_set()
            sys.stderr.write(stream.read())
            sys.stderr.flush()
            if ended:
                return
            stop.wait(0.5)


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Let the bars of a kernel that starts meanwhile go to this terminal if `show`, not into the notebook."""
    with tempfile.TemporaryDirectory() as temporary:
        bars, stop = Path(temporary) / "progress", threading.Event()
        bars.touch()
        display = threading.Thread(target=show_progress, args=(bars, stop), daemon=True)
        os.environ |= {"DISTILL_PROGRESS": str(bars), "TQDM_DISABLE": "1"}
        if show:
            display.start()
        try:
            yield
        finally:
            stop.set()
            for key in ("DISTILL_PROGRESS", "TQDM_DISABLE"):
                os.environ.pop(key)
            if show:
                display.join()


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run a notebook in place, from the repository's root, on a kernel that ends with this process.

    Cells with the tag `lib.pipeline.code.INTERACTIVE` are left as they are.
    """
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # a kernel of the environment wins over one in the home folder
    start = f"--IPKernelApp.exec_lines={START.format(pid=os.getpid())}"
    client = NotebookClient(notebook, kernel_name="python3", timeout=None, startup_timeout=300, extra_arguments=[start])
    client.raise_on_iopub_timeout = True
    with client.setup_kernel(cwd=str(ROOT)):
        try:
            for index, cell in enumerate(notebook.cells):
                if not is_interactive(cell):
                    client.execute_cell(cell, index)
            reply: Any = client.wait_for_reply(client.kc.kernel_info()) if client.kc else None
            notebook.metadata["language_info"] = reply["content"]["language_info"]
            client.set_widgets_metadata()
        except BaseException:
            client.shutdown_kernel = "immediate"
            if pending := client.task_poll_for_reply:  # of the interrupted cell: that its kernel dies now is no news
                pending.get_loop().set_exception_handler(lambda loop, context: None)
            raise


def failed_path(out: Path) -> Path:
    """Return where the partial notebook of a failed run is saved."""
    return out.with_name(out.stem + ".failed.ipynb")


def check_targets(notebook: Path, out: Path, record_file: Path | None = None) -> None:
    """Raise ValueError or OSError, before the run, unless its files may be written and none is the notebook itself."""
    if out.suffix != ".ipynb":
        raise ValueError(f"expected OUT to be a notebook, *.ipynb, got {out}: give it that ending")
    targets = [out, failed_path(out), *([record_file] if record_file else [])]
    for target in targets:
        check_writable(target)
        if target.exists() and target.samefile(notebook):
            raise ValueError(f"expected OUT beside the notebook, got {target}, the notebook itself: give another name")
    if record_file and record_file.absolute() in [target.absolute() for target in targets[:2]]:
        raise ValueError(f"expected a file of its own for the record, got {record_file}: give another name")


def run_notebook(
    notebook: Path, out: Path, values: dict[str, Any], progress: bool = True, record_file: Path | None = None
) -> Path:
    """Execute `notebook` from the repository's root on kernel `python3` and write `out` atomically.

    The record of the run goes into `out`, or into `record_file` if given: equal runs then give equal bytes. On an error
    or an interruption the partial notebook is saved as `<out>.failed.ipynb` and the error is raised again.
    """
    check_targets(notebook, out, record_file)
    record, begin = provenance(notebook, values), time.monotonic()
    executed = load_notebook_node(str(notebook))
    if values:
        executed = parameterize_notebook(executed, values, kernel_name="python3", language="python")
    with ThreadPoolExecutor(1) as executor:
        device = executor.submit(device_name)
        try:
            with progress_bars(progress):
                execute(executed)
        except BaseException:
            path = save_executed(executed, failed_path(out))
            print(f"the partial notebook, error included, is {path}", file=sys.stderr)
            raise
    record |= {"device": device.result(), "wall_seconds": round(time.monotonic() - begin, 1)}
    strip_volatile(executed)
    if not record_file:
        sign_notebook(executed, record)
    path = save_executed(executed, out)
    if path != out:
        raise OSError(f"{out} cannot be written; the executed notebook is {path}: free space, then move it there")
    if record_file:
        write_json(record_file, record)
    failed_path(out).unlink(missing_ok=True)
    return out


def save_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook atomically, without the Python version that ran it: equal results are equal files."""
    notebook.metadata.get("language_info", {}).pop("version", None)
    with atomic_path(path) as part:
        nbformat.write(notebook, part)


def save_executed(notebook: nbformat.NotebookNode, path: Path) -> Path:
    """Save a notebook and return where: where its disk is full, in the folder of temporary files or in the home folder.

    Raises OSError or ValueError when none of them takes it.
    """
    try:
        save_notebook(notebook, path)
        return path
    except (OSError, ValueError) as error:
        print(f"lib.run: {error}", file=sys.stderr)
        for folder in (Path(tempfile.gettempdir()), Path.home()):
            with suppress(OSError, ValueError):
                rescued = folder / f"{path.stem}.{os.getpid()}.ipynb"
                save_notebook(notebook, rescued)
                return rescued
        raise


def describe_failure(error: Exception, notebook: Path) -> str:
    """Return what ended a run as a line that names the notebook, the cause and, where there is one, the remedy.

    An error of a cell that does not explain itself comes with its traceback before.
    """
    if isinstance(error, CellExecutionError):
        line = f"{notebook}: {error.ename}: {error.evalue}"
        return line if error.ename in EXPLAINED else f"{error.traceback}\nlib.run: {line}"
    if isinstance(error, NoSuchKernel):
        return (
            f"{notebook}: expected the Jupyter kernel {error.name}, got none: run `python -m lib.pipeline.environment`"
        )
    if isinstance(error, RuntimeError):  # nbclient's, DeadKernelError among them
        cause = "the kernel died, most often killed by the system for memory"
        return (
            f"{notebook}: {cause} ({error}): free memory, or run with fewer `jobs` or a smaller batch, then run again"
        )
    return str(error)


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
    print_in_any_locale()
    exit_on_signals()
    if not options.notebook.exists():
        parser.error(f"{options.notebook}: no such file; notebooks are in {ROOT / 'notebooks'}")
    if options.threads < 0:
        parser.error(f"--threads: expected 0 or more, got {options.threads}")
    try:
        if options.code:
            check_pipeline_code(options.code)
        values = gather_parameters(options.notebook, options.section, options.p)
        check_targets(options.notebook, options.out, options.record)
    except (ValueError, OSError) as error:  # of parameters, files, and StaleCode
        parser.exit(2, f"lib.run: {error}\n")
    if rank := process_rank():
        print(f"lib.run: process {rank} leaves: process 0 of the launcher runs the notebook, alone", file=sys.stderr)
        return
    leave_group()
    for key, value in KEEP_MEMORY.items():  # for the kernel, as is the next
        os.environ.setdefault(key, value)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        print(f"wrote {run_notebook(options.notebook, options.out, values, not options.quiet, options.record)}")
    except KeyboardInterrupt:
        parser.exit(130, "lib.run: interrupted\n")
    except (CellExecutionError, NoSuchKernel, RuntimeError, OSError, ValueError) as error:
        parser.exit(1, f"lib.run: {describe_failure(error, options.notebook)}\n")


if __name__ == "__main__":
    main()
