"""Memory is again: large tensors take no new pages after the first, in this process and in one that it starts."""

import os
import subprocess
import sys

import pytest

from lib.utils.files import ROOT
from lib.utils.memory import KEEP_MEMORY

FAULTS = """
import resource, sys, torch
from lib.diffusion.network import build_unet
from lib.utils.memory import keep_memory
torch.set_num_threads(1)
if "keep" in sys.argv:
    assert keep_memory()
net, x = build_unet(1, 28, (8, 8, 16), seed=0), torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    net(x, 50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    total = sum(float(net(x, 50).sample.double().sum()) for _ in range(2))
print(repr(total), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(*arguments, **environment):
    plain = {k: v for k, v in os.environ.items() if k not in KEEP_MEMORY}
    command = [sys.executable, "-c", FAULTS, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=plain | environment, capture_output=True, text=True, check=True)
    total, pages = done.stdout.split()
    return total, int(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_serves_once_more():
    """Pages of a network's tensors, and its answers, which are equal to the bit."""
    total, returned = new_pages()
    assert returned > 2000
    for again in (new_pages("keep"), new_pages(**KEEP_MEMORY)):
        assert again[0] == total and again[1] < returned / 5, (again, returned)
