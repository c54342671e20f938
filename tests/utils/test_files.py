"""Atomic writes: what they refuse to replace, what a failure leaves, and the leftovers of killed processes."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from lib.diffusion.network import build_unet, save_network
from lib.utils import files
from lib.utils.files import ROOT, atomic_path, check_writable, part_path, sweep_leftovers, write_text


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_file_is_written_whole_and_overwritten(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("one", "two"):
        write_text(path, text)
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


def test_fault_41_what_is_no_regular_file_is_not_replaced(tmp_path):
    folder, link, dangling, pipe, end = (tmp_path / name for name in ("folder", "link", "dangling", "pipe", "socket"))
    folder.mkdir()
    (tmp_path / "real").write_text("real")
    link.symlink_to("real")
    dangling.symlink_to("nowhere")
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(end))
    for path, words in (
        (folder, "a folder: give the name of a file"),
        (link, "a symbolic link to real: name that file itself"),
        (dangling, "a symbolic link to nowhere"),
        (pipe, "a pipe"),
        (end, "a socket"),
        (files.Path("/dev/null"), "a device"),
        (files.Path("."), "a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            write_text(path, "text")
        assert os.path.lexists(path) and (path == link or not path.is_file())
    assert link.is_symlink() and link.read_text() == "real" and not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match="real, which is none: name another folder"):
        check_writable(tmp_path / "real" / "sub" / "a.txt")
    (tmp_path / "linked").symlink_to(folder)  # a folder on another disk is nobody's mistake
    write_text(tmp_path / "linked" / "a.txt", "text")
    assert (folder / "a.txt").read_text() == "text"


def test_fault_41_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match=r"free space there, then run again.*a\.txt"):
            write_text(path, "new")
    with pytest.raises(OSError, match=r"a\.txt") as error, atomic_path(path) as part:
        (part / "sub").write_text("text")
    assert ".part" not in str(error.value).replace(f"{part.name}/sub", "") and path.read_text() == "old"
    full = type("usage", (), {"free": 0})()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match="No space left on device"), atomic_path(path):
        raise RuntimeError("PytorchStreamWriter failed")  # what torch.save says then
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_fault_41_a_limit_on_the_size_of_files_is_reported_as_such(tmp_path):
    path, (soft, hard) = tmp_path / "a.txt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_text(path, "old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match=r"File too large, nothing was written.*a\.txt"):
            write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_another_error_of_the_writer_stays_as_it_is(tmp_path):
    with pytest.raises(KeyError, match="mine"), atomic_path(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise KeyError("mine")
    assert not list(tmp_path.iterdir())


def test_fault_42_leftovers_of_dead_processes_are_swept_and_those_of_living_ones_stay(tmp_path, dead):
    living = subprocess.Popen(["sleep", "60"])
    try:
        for name in (f"a.txt.{dead}.part", f"b.txt.{dead}.part", f"a.txt.{living.pid}.part", "a.part", "a.0.part"):
            (tmp_path / name).write_text("half")
        (tmp_path / f"adaptive.{dead}.part").mkdir()
        (tmp_path / f"adaptive.{dead}.part" / "config.json").write_text("{}")
        (tmp_path / f"link.{dead}.part").symlink_to(tmp_path / "a.part")
        write_text(tmp_path / "a.txt", "whole")
        assert not (tmp_path / f"a.txt.{dead}.part").exists() and (tmp_path / f"b.txt.{dead}.part").exists()
        swept = [path.name for path in sweep_leftovers(tmp_path)]
        assert swept == [f"adaptive.{dead}.part", f"b.txt.{dead}.part", f"link.{dead}.part"]
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
            ["a.0.part", "a.part", "a.txt", f"a.txt.{living.pid}.part"]
        )
        os.utime(tmp_path / f"a.txt.{living.pid}.part", (0, time.time() - 3600))  # of a process of the same number
        assert sweep_leftovers(tmp_path) and not sweep_leftovers(tmp_path / "no such folder")
    finally:
        living.kill()
        living.wait()


def test_fault_42_two_processes_write_one_file_at_the_same_time(tmp_path):
    path = tmp_path / "a.txt"
    code = f"from lib.utils.files import write_text\nfor _ in range(100): write_text({str(path)!r}, 'x' * 5000)"
    writers = [subprocess.Popen([sys.executable, "-c", code.replace("'x'", f"'{c}'")], cwd=ROOT) for c in "ab"]
    while any(writer.poll() is None for writer in writers):
        assert not path.exists() or len(set(path.read_text())) == 1
        time.sleep(0.005)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(path.read_text()) == 5000 and list(tmp_path.iterdir()) == [path]


def test_names_as_long_as_the_file_system_takes_and_of_any_characters_are_written(tmp_path):
    for name in ("x" * 251 + ".png", "é" * 127, "new\nline", os.fsdecode(b"\xff\xfe")):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
        assert files.LEFTOVER.fullmatch(part_path(tmp_path / name).name)
    assert len(list(tmp_path.iterdir())) == 4 and "\n" not in files.shown_path(tmp_path / "new\nline")


def test_a_leftover_of_this_process_is_no_part_of_what_it_writes(tmp_path):
    """Numbers of processes come again, in containers often."""
    path = tmp_path / "a.pt"
    part_path(path).mkdir()
    with atomic_path(path) as part:
        torch.save({"a": 1}, part)
    assert torch.load(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_fault_42_a_network_is_saved_in_place_of_a_killed_runs_leftover(tmp_path, dead):
    (tmp_path / f"adaptive.{dead}.part").mkdir()
    (tmp_path / f"adaptive.{dead}.part" / "config.json").write_text("{}")
    save_network(build_unet(1, 8, (8,), seed=0), tmp_path / "adaptive")
    assert [p.name for p in tmp_path.iterdir()] == ["adaptive"]
