"""Stages through a launcher: `LAUNCH="python -m lib.pipeline.launch srun --gres=gpu:1" dvc repro -s …`.

srun, accelerate and torchrun do not notice that dvc has ended; what they began would go on. The command here stands
between: it begins the launcher and ends it with dvc, or on a signal.

A notebook is run by one process, whatever a launcher begins: seeds and stages are what is spread over processes. So
results do not depend on the number of processes, to the bit.
"""

import os
import subprocess
import sys

import psutil

from lib.utils.processes import exit_on_signals

PATIENCE = 40.0  # seconds that a launcher has to end what it began: torchrun takes 30 before it kills
RANKS = ("RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # torchrun, srun, MPI
GROUP_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PLACES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def process_rank() -> int:
    """Return the number of this process among those that a launcher began, 0 for the first or the only one."""
    ranks = (os.environ.get(name, "") for name in RANKS)
    return next((int(rank) for rank in ranks if rank.isdecimal()), 0)


def leave_group() -> None:
    """Take this process, and those that it will begin, out of the launcher's group: it computes alone."""
    for name in (*RANKS, *GROUP_SIZES, *PLACES):
        os.environ.pop(name, None)


def end_processes(children: list[psutil.Process], patience: float = PATIENCE) -> None:
    """End processes: by SIGTERM, which launchers pass on, and then by force, with their children."""
    for child in children:
        child.terminate()
    _, alive = psutil.wait_procs(children, timeout=patience)
    for process in [p for child in alive for p in (*child.children(recursive=True), child)]:
        process.kill()


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status; it ends with dvc and with this process.

    Raises:
        SystemExit: without a command, for one that cannot be run, and on SIGTERM or SIGHUP.
    """
    command = sys.argv[1:] if arguments is None else arguments
    if not command:
        raise SystemExit('expected a launcher, got none: LAUNCH="python -m lib.pipeline.launch srun …"')
    exit_on_signals()
    try:
        status = subprocess.Popen(command).wait()
    except OSError as error:
        raise SystemExit(f"expected a launcher, got {command[0]!r}: {error.strerror}") from None
    except BaseException:  # a signal, or Ctrl-C
        end_processes(psutil.Process().children())
        raise
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
