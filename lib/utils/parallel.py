"""Independent tasks in parallel processes: two cores are twice as fast where one small network fills neither."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from joblib import Parallel, delayed

from lib.utils.progress import tqdm


def run_with_threads(work: Callable, threads: int, arguments: tuple) -> Any:
    """Return `work(*arguments)`, with torch's number of threads set first."""
    torch.set_num_threads(threads)
    return work(*arguments)


def parallel_map(
    work: Callable, arguments: Sequence[tuple], jobs: int = 1, desc: str = "", progress: bool = True
) -> list:
    """Return [work(*a) for a in arguments], computed by `jobs` processes; 1 computes in this process.

    The processes divide this one's torch threads, at least one each. With one thread, as in the pipeline, the number of
    jobs changes no result. `work` and what it returns must be picklable. On one GPU more than 1 pays for small networks
    only. Raises ValueError when `jobs` is below 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1 process, got {jobs}")
    threads = max(1, torch.get_num_threads() // jobs)
    bar = tqdm(total=len(arguments), desc=desc, disable=not progress)
    pool = Parallel(n_jobs=jobs, return_as="generator")
    results = []
    with warnings.catch_warnings():  # of workers restarted since their memory grew; it would name a path
        warnings.filterwarnings("ignore", message="A worker stopped")
        for result in pool(delayed(run_with_threads)(work, threads, a) for a in arguments):
            results.append(result)
            bar.update()
    bar.close()
    return results
