"""The quickstart in JupyterLab, in a headless Chromium: it runs top to bottom, and a slider changes the picture."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from lib.utils.files import ROOT
from tests.commands import browser

SHOTS = "DISTILL_SHOTS"  # a folder that gets the screenshots
PANEL = "[...window.jupyterapp.shell.widgets('main')].find(w => w.context?.path.endsWith('.ipynb'))"
CELLS = f"[...{PANEL}.content.model.cells].filter(c => c.type === 'code')"
PICTURE = "(document.querySelector('img.widget-image') || {}).src || ''"
HANDLE = "document.querySelectorAll('.widget-slider .noUi-handle')[{number}]"


@contextmanager
def jupyterlab(folder):
    """Run JupyterLab on a folder for the block; yields a function from a path to its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    options = {"ServerApp.port": port, "IdentityProvider.token": token, "ServerApp.root_dir": folder}
    options |= {"LabApp.expose_app_in_browser": True, "ServerApp.open_browser": False, "ServerApp.allow_root": True}
    homes = {f"JUPYTER_{name}_DIR": str(folder / f".{name}".lower()) for name in ("CONFIG", "RUNTIME")}
    environment = os.environ | homes | {"PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings")}
    environment |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces")}
    environment.pop("MPLBACKEND", None)  # the kernel draws inline
    command = [sys.executable, "-m", "jupyter", "lab", *(f"--{key}={value}" for key, value in options.items())]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + browser.PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                break
            except OSError:
                log_text = (folder / "server.log").read_text(encoding="utf-8")
                assert server.poll() is None and time.monotonic() < end, log_text
                time.sleep(0.5)
        yield lambda path: f"http://127.0.0.1:{port}/lab/tree/{path}?token={token}"
    finally:
        browser.end_process(server, 30)


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium")
def test_the_quickstart_runs_in_jupyterlab_and_a_slider_changes_the_picture(tmp_path):
    shutil.copy(ROOT / "notebooks" / "00_quickstart.ipynb", tmp_path)
    with jupyterlab(tmp_path) as address, browser.opened(address("00_quickstart.ipynb"), tmp_path / "chromium") as page:
        page.wait(f"!!window.jupyterapp && !!{PANEL}?.context.isReady")
        page.wait(f"{PANEL}.sessionContext.session?.kernel?.status === 'idle'")
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)  # the panel of the commands has the focus
        page.run(f"window.jupyterapp.shell.activateById({PANEL}.id)")
        page.wait("!!window.jupyterapp.shell.currentWidget")
        page.run("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait(f"{CELLS}.every(c => c.executionCount !== null)")
        kinds = page.run(f"{CELLS}.map(c => c.outputs.toJSON().map(o => o.output_type))")
        assert kinds and not any("error" in cell for cell in kinds)
        page.run(f"{PANEL}.content.scrollToItem({PANEL}.content.widgets.length - 1).then(() => true)")
        page.wait(f"!!{HANDLE.format(number=0)}")
        assert page.run(PICTURE) == "" or page.run("document.querySelector('img.widget-image').naturalWidth") == 0
        seen = [page.run(PICTURE)]
        for number in (0, 1):  # the radius, then the draws of each gradient
            handle = HANDLE.format(number=number)
            page.run(f"{handle}.focus()")
            page.key("ArrowRight")
            page.wait(f"({PICTURE}) !== {seen[-1]!r} && document.querySelector('img.widget-image').naturalWidth > 0")
            seen.append(page.run(PICTURE))
            text = page.run("Array.from(document.querySelectorAll('.widget-label')).map(e => e.textContent).join('|')")
            assert "right answers of 10" in text
        page.run("document.querySelector('img.widget-image').scrollIntoView({block: 'end'})")
        shot = tmp_path / "quickstart.png"
        page.screenshot(shot)
        assert shot.stat().st_size > 10_000 and len(set(seen)) == 3
        if folder := os.environ.get(SHOTS):
            os.makedirs(folder, exist_ok=True)
            shutil.copy(shot, folder)
