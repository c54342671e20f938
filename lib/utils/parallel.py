"""Independent tasks in parallel processes: two cores are twice as fast where one small network fills neither."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any

import torch
from joblib import Parallel, delayed

from lib.utils.processes import end_with_parent
from lib.utils.progress import tqdm

watch_parent = cache(end_with_parent)  # once in a worker, however many tasks it gets


def run_with_threads(work: Callable, threads: int, parent: int, arguments: tuple) -> Any:
    """Return `work(*arguments)`, with torch's number of threads set first; a worker ends with the process `parent`."""
    torch.set_num_threads(threads)
    if os.getpid() != parent:
        watch_parent(parent)
    return work(*arguments)


def parallel_map(
    work: Callable, arguments: Sequence[tuple], jobs: int = 1, desc: str = "", progress: bool = True
) -> list:
    """Return [work(*a) for a in arguments], computed by `jobs` processes; 1 computes in this process.

    The processes divide this one's torch threads, at least one each. With one thread, as in the pipeline, the number of
    jobs changes no result. They end with this process, even if it is killed. `work` and what it returns must be
    picklable. On one GPU more than 1 pays for small networks only. Raises ValueError when `jobs` is below 1, and
    MemoryError when the system killed a process, which it does where memory is short.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1 process, got {jobs}")
    threads = max(1, torch.get_num_threads() // jobs)
    bar = tqdm(total=len(arguments), desc=desc, disable=not progress)
    pool = Parallel(n_jobs=jobs, return_as="generator")
    results = []
    with warnings.catch_warnings():  # of workers restarted since their memory grew; it would name a path
        warnings.filterwarnings("ignore", message="A worker stopped")
        try:
            for result in pool(delayed(run_with_threads)(work, threads, os.getpid(), a) for a in arguments):
                results.append(result)
                bar.update()
        except BrokenProcessPool as error:
            raise MemoryError(
                f"{desc or 'parallel work'}: expected {jobs} processes, got one killed by the system, most often for "
                "memory: run with fewer `jobs`"
            ) from error
    bar.close()
    return results
