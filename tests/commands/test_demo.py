"""The page docs/demo: its files belong to the networks, and in a browser it answers what Python does."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from lib.commands import demo
from lib.commands.arguments import Effort
from lib.commands.onnx_benchmark import CLASSIFIER, EPS, PURIFIER
from lib.commands.onnx_files import PARITY, OnnxFile, named_parts, parity
from lib.data import load_dataset
from lib.evaluation.matched_attacks import AttackEffort, MeasuringDraws
from lib.utils.files import ROOT, read_json
from lib.utils.images import write_image
from tests.commands import browser

PAGE = ROOT / demo.DEMO
TINY = Effort(AttackEffort(2, 1, 4, 1, 1), MeasuringDraws(1, 1, 1, 10), 2, 2, 4, 2)
NETWORKS = {"pair": (PURIFIER, CLASSIFIER), "classifier": (CLASSIFIER, None)}
STATE = "JSON.stringify({...window.demo, noise: Array.from(window.demo.noise)})"


@pytest.mark.parametrize("name", NETWORKS)
def test_committed_networks_are_those_of_the_repository(name):
    file, parts = OnnxFile(PAGE / f"{name}.onnx"), named_parts(*NETWORKS[name])
    assert {k: v for k, v in file.about.items() if "sha256" in k} == {
        k: v for k, v in parts.about.items() if "sha256" in k
    }, "run `python -m lib.commands.demo`"
    assert parity(file, parts, rounds=1).difference <= PARITY


def test_stored_perturbations_break_the_classifier_and_keep_to_the_ball():
    stored, data = read_json(PAGE / "demo.json"), load_dataset("digits")
    x = torch.tensor(stored["sixteenths"]).view(-1, 1, 8, 8) / 16
    assert (
        torch.equal(x, data.test.x[stored["numbers"]]) and data.test.y[stored["numbers"]].tolist() == stored["labels"]
    )
    assert sorted(stored["labels"]) == [c for c in range(10) for _ in range(2)]
    for name in ("classifier", "pair"):
        delta = torch.tensor(stored["perturbations"][name]).view_as(x) / stored["stored"]
        assert delta.abs().max() <= EPS + 1e-6 and stored["eps"] == EPS and (delta != 0).flatten(1).any(1).all()
    delta = torch.tensor(stored["perturbations"]["classifier"]).view_as(x) / stored["stored"]
    z = OnnxFile(PAGE / "classifier.onnx").run((x + delta).clamp(0, 1))["logits"]
    assert (z.argmax(-1) != torch.tensor(stored["labels"]))[1::2].sum() >= 9  # the second of each class is one of these
    measured = stored["measured"]
    assert measured == demo.measured_facts() and measured["pair"]["accuracy"] < measured["trades"]["accuracy"]


def test_the_page_is_written_anew(tmp_path):
    written = demo.write_demo(tmp_path, count=120, effort=TINY)
    assert sorted(p.name for p in written) == ["classifier.onnx", "demo.json", "pair.onnx"]
    assert len(read_json(tmp_path / "demo.json")["labels"]) == 20


def test_the_page_names_no_other_host_and_is_small():
    texts = {p.name: p.read_text(encoding="utf-8") for p in PAGE.iterdir() if p.suffix in (".html", ".js", ".json")}
    assert {name for name, text in texts.items() if re.search(r"(https?:)?//\w+\.\w|resolved", text)} == set()
    assert "omit-lockfile-registry-resolved=true" in (PAGE / ".npmrc").read_text(encoding="utf-8")
    facts = re.findall(r'data-fact="(\w+)\.(\w+)"', texts["index.html"])
    assert all(key in json.loads(texts["demo.json"])["measured"][name] for name, key in facts) and len(facts) == 6
    files = [p for p in PAGE.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 1.5e6
    assert not (PAGE / "screenshot.png").exists() or (PAGE / "screenshot.png").stat().st_size <= 150_000


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the page with onnxruntime from npm, once."""
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules", "build"))
    if (PAGE / "build").is_dir():
        shutil.copytree(PAGE / "build", folder / "build")
        return folder
    if shutil.which("npm") is None:
        pytest.skip("no npm: apt-get install npm")
    for command in (("npm", "ci"), ("npm", "run", "build")):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@torch.no_grad()
def python_answers(state):
    """Returns probabilities of the image, the attacked image and each purified draw, by torch."""
    parts = named_parts(PURIFIER, CLASSIFIER)
    x, attacked = (torch.tensor(state[k], dtype=torch.float32).view(1, 1, 8, 8) for k in ("image", "attacked"))
    noise = torch.tensor(state["noise"], dtype=torch.float32).view(1, -1, 1, 8, 8)
    y, z = parts(attacked.expand(noise.shape[1:]), noise)
    return {
        "clean": parts.classifier(x).softmax(-1)[0],
        "broken": parts.classifier(attacked).softmax(-1)[0],
        "draws": z.softmax(-1),
        "mean": z.softmax(-1).mean(0),
        "purified": y.flatten(1),
    }


def shown_state(page):
    """Returns what the page shows after all its calls, and checks it against torch on the same noise."""
    page.wait("window.demo.busy === 0")
    state = json.loads(page.run(STATE))
    for name, answer in python_answers(state).items():
        assert np.abs(np.array(state[name]) - answer.numpy()).max() <= 1e-3, name
    return state


@pytest.mark.slow
def test_a_digit_is_attacked_and_purified_in_a_browser(built, tmp_path):
    with browser.served(built) as address, browser.opened(address, tmp_path / "profile") as page:
        page.wait("!!window.demo?.ready || !!document.querySelector('#status.error')")
        assert page.run("document.getElementById('status').className") == ""
        first = shown_state(page)
        assert first["attacked"] == first["image"] and len(first["draws"]) == 10

        page.run("""(() => { const s = document.getElementById("digit"); s.value = "5";
            s.dispatchEvent(new Event("change")); })()""")
        plain = shown_state(page)
        assert plain["label"] == read_json(PAGE / "demo.json")["labels"][5] == int(np.argmax(plain["clean"]))

        for kind in ("pair", "classifier"):
            page.run(f"""document.querySelector('input[value="{kind}"]').click()""")
            attacked = shown_state(page)
            change = np.array(attacked["attacked"]) - attacked["image"]
            assert 0.05 < np.abs(change).max() <= EPS + 1e-6
        assert np.argmax(attacked["broken"]) != attacked["label"]

        page.run("document.getElementById('purify').click()")
        again = shown_state(page)
        assert again["seed"] == attacked["seed"] + 1 and again["noise"] != attacked["noise"]
        noise = np.array(again["noise"])
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
        assert "of 10 draws" in page.run("document.getElementById('status').textContent")
        assert not page.run("document.documentElement.scrollWidth > innerWidth")
        page.screenshot(tmp_path / "demo.png")
        assert (tmp_path / "demo.png").stat().st_size > 20_000

        page.run("document.getElementById('clear').click()")
        box = page.run("(({x, y}) => [x, y])(document.getElementById('image').getBoundingClientRect())")
        page.mouse("Pressed", box[0] + 100, box[1] + 30)
        page.mouse("Moved", box[0] + 100, box[1] + 150)
        page.mouse("Released", box[0] + 100, box[1] + 150)
        page.run("document.getElementById('image').focus()")
        page.key("ArrowDown")
        page.key(" ", " ")
        drawn = shown_state(page)
        assert drawn["label"] is None and drawn["image"].count(1) == 3  # by mouse at two places, by the keyboard at one

        image = torch.tensor(plain["image"]).view(1, 8, 8)
        write_image(1 - image.repeat_interleave(20, 1).repeat_interleave(20, 2), tmp_path / "loaded.png")
        node = page.call("Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
        page.call("DOM.setFileInputFiles", objectId=node, files=[str(tmp_path / "loaded.png")])
        page.wait(f"Math.abs(window.demo.image[2] - {plain['image'][2]}) < 0.02 && window.demo.busy === 0")
        loaded = shown_state(page)  # dark ink on white, 160 x 160: the digit again, but for the edges of scaled pixels
        assert np.abs(np.array(loaded["image"]) - plain["image"]).max() < 0.1 and loaded["label"] is None
        assert int(np.argmax(loaded["clean"])) == plain["label"]

        page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        assert not page.run("document.documentElement.scrollWidth > innerWidth")
        assert page.errors == []
        assert page.requests and {r for r in page.requests if not r.startswith((address, "data:", "blob:"))} == set()
    shutil.copy(tmp_path / "demo.png", built / "last.png")
