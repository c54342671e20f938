"""Processes that end with their parent, and cleanly on a signal; output in any locale."""

import io
import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil

INTERVAL = 0.5  # seconds between two looks at the parent


def end_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Send this process `signum` as soon as it is no longer a child of the process `parent`.

    A daemon thread looks twice a second, so that any way in which the parent ends is seen, SIGKILL too.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(INTERVAL)
        os.kill(os.getpid(), signum)

    threading.Thread(target=look, name="end_with_parent", daemon=True).start()


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise SystemExit in the main thread, as Ctrl-C raises KeyboardInterrupt: files are closed.

    A signal that is ignored, as SIGHUP under nohup, stays so, and further ones do not interrupt the leaving. As a stage
    of DVC, the process also ends with dvc.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, leave)
    if "DVC_STAGE" in os.environ:  # dvc sets it for the commands of its stages
        if os.getppid() == 1 and not any("dvc" in word for word in psutil.Process(1).cmdline()):
            raise SystemExit(128 + signal.SIGTERM)  # dvc ended while this process began, and init has adopted it
        end_with_parent(os.getppid(), signal.SIGTERM)


def print_in_any_locale() -> None:
    """Let characters that the terminal's encoding lacks be printed as escapes, rather than end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
