"""The quickstart notebook runs without a browser, attacks in the ball, and shows what is recomputed here."""

import json
import re

import matplotlib.pyplot as plt
import nbformat
import papermill
import pytest
import torch

from lib.attacks.api import attack
from lib.commands import quick_look
from lib.commands.evaluate import evaluate_defence
from lib.data import load_dataset
from lib.evaluation.attack_plan import EvaluationSettings
from lib.experiments.samples import evaluation_images
from lib.models import accuracy
from lib.pretrained import load_classifier, pretrained_folder
from lib.purify import IdentityPurifier, PurifiedClassifier, load_purifier
from lib.utils.draws import MATCHED, NO_ATTACK, unpack_draws
from lib.utils.files import ROOT

NOTEBOOK = ROOT / "notebooks" / "00_quickstart.ipynb"
SMALL = {"images": 8, "image": 4, "steps": 4, "eot": 2, "draws": 10, "eps": 0.1, "seed": 0}
SAVE = "torch.save({name: globals()[name] for name in ('delta', 'x_grey', 'x_exact', 'results')}, {path!r})"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, run with small settings, its outputs by cell as text, and some of its variables."""
    folder = tmp_path_factory.mktemp("quickstart")
    source = nbformat.read(NOTEBOOK, as_version=4)
    save = SAVE.replace("{path!r}", repr(str(folder / "variables.pt")))
    source.cells.append(nbformat.v4.new_code_cell(save, id="variables"))
    nbformat.write(source, folder / "in.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # sums in the order that they have here
        patch.delenv("MPLBACKEND", raising=False)  # the kernel draws inline
        arguments = (str(folder / "in.ipynb"), str(folder / "out.ipynb"), SMALL)
        nb = papermill.execute_notebook(*arguments, cwd=ROOT, progress_bar=False, execution_timeout=120)
    shown = {}
    for cell in nb.cells:
        data = [output.get("data", {"text/plain": output.get("text", "")}) for output in cell.get("outputs", [])]
        shown[cell.id] = "\n".join(text for each in data for text in (each["text/plain"], each.get("text/html", "")))
    return nb, shown, torch.load(folder / "variables.pt", weights_only=False)


@pytest.fixture(scope="module")
def points():
    return evaluation_images(load_dataset("digits"), SMALL["images"], SMALL["seed"])


@pytest.fixture(scope="module")
def defences():
    natural, trades = load_classifier("digits/natural"), load_classifier("digits/trades")
    purifier = load_purifier(pretrained_folder("digits/diffusion"), "adaptive-1", clamp=False)
    return {
        "no purifier": PurifiedClassifier(IdentityPurifier(), natural),
        "adaptive-1": PurifiedClassifier(purifier, natural),
        "TRADES": PurifiedClassifier(IdentityPurifier(), trades),
    }


def text_of(executed, start):
    """What the one cell printed whose source begins so."""
    nb, shown, _ = executed
    (cell,) = (c for c in nb.cells if c.cell_type == "code" and c.source.startswith(start))
    return shown[cell.id]


def test_it_runs_without_a_browser_and_draws(executed):
    nb, _, _ = executed
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code) and not any(o.output_type == "error" for c in code for o in c.outputs)
    assert sum("image/png" in o.get("data", {}) for c in code for o in c.outputs) == 2
    (sliders,) = (o.data for o in code[-2].outputs)
    assert "application/vnd.jupyter.widget-view+json" in sliders


def test_all_attacks_stay_in_the_ball_and_climb(executed, points, defences):
    (x, y), _ = points
    variables = executed[2]
    one = x[SMALL["image"]][None]
    for before, after in ((one, one + variables["delta"]), (x, variables["x_grey"]), (x, variables["x_exact"])):
        assert 0 < (after - before).abs().max() <= SMALL["eps"] + 1e-6
        assert after.min() >= 0 and after.max() <= 1
    natural = defences["no purifier"].classifier
    label = y[SMALL["image"]][None]
    assert natural(one).argmax(1) == label != natural(one + variables["delta"]).argmax(1)
    means = []
    for images in (x, variables["x_exact"]):
        torch.manual_seed(0)
        means.append(torch.stack([defences["adaptive-1"](images).softmax(1) for _ in range(20)]).mean(0))
    sureness = [mean.gather(1, y[:, None]).mean() for mean in means]
    assert sureness[1] < sureness[0] - 0.05


def test_the_accuracies_that_it_prints_are_recomputed(executed, points, defences):
    (x, y), _ = points
    natural = defences["no purifier"].classifier
    x_grey = attack("pgd", natural, x, y, SMALL["eps"], steps=SMALL["steps"], progress=False)
    assert torch.equal(x_grey, executed[2]["x_grey"])
    wanted = f"accuracy {accuracy(natural, x, y):.1%}, under attack {accuracy(natural, x_grey, y):.1%}"
    assert wanted in text_of(executed, "x_grey = ")
    assert f"largest change {(x_grey - x).abs().max():.4f}" in text_of(executed, "x_grey = ")


def test_the_table_is_what_an_evaluation_gives(executed, points, defences):
    split, numbers = points
    table = text_of(executed, "defences = ")
    effort = quick_look.quick_effort(*(SMALL[k] for k in ("steps", "eot", "draws")))
    for name, defence in defences.items():
        at = EvaluationSettings(eps=SMALL["eps"], seed=SMALL["seed"], draws=10 if defence.random else 1)
        result, _ = evaluate_defence(defence, None, split, numbers, at, effort, False)
        assert result["outcomes"] == executed[2]["results"][name]["outcomes"], name
        clean, under = (unpack_draws(result["outcomes"]["correct"][k]) for k in (NO_ATTACK, MATCHED))
        measured = {"clean": clean.mean(), "robust": under.mean(), "attack_induced_loss": clean.mean() - under.mean()}
        if defence.random:  # of ten draws, all right
            measured |= {"control": clean.all(0).mean(), "worst_of_10": under.all(0).mean()}
        for key, value in measured.items():
            row = {end: 100 * result["measures"][key][end] for end in ("value", "low", "high")}
            assert row["value"] == pytest.approx(100 * value) and row["low"] <= row["value"] <= row["high"]
            assert "{value:.1f} [{low:.1f}, {high:.1f}]".format(**row) in table, (name, key)


def test_conclusions_follow_from_the_numbers(executed):
    results = executed[2]["results"]
    lines = text_of(executed, 'print("\\n".join(quick_look.quick').splitlines()
    assert lines[0].startswith(
        f"no purifier: right on {100 * results['no purifier']['measures']['clean']['value']:.1f}"
    )
    assert [line for line in lines if line] == quick_look.quick_conclusions(results)
    value, low, high = quick_look.loss_difference(results["adaptive-1"], results["no purifier"])
    assert low <= value <= high
    same = {"a": results["TRADES"], "b": results["TRADES"]}
    assert quick_look.compare_losses("a", "b", same).endswith("do not tell which loses more.")
    decided = text_of(executed, "decided = ")
    claims = {row["id"]: row for row in json.loads((ROOT / "data/digits/metrics/claims.json").read_text())["claims"]}
    names = re.findall(r"(?m)^(dp\.\w+) \((\w+)\): ", decided)
    assert len(names) == 4 and all(claims[name]["verdict"] == verdict for name, verdict in names)


def test_it_is_short_its_equations_are_numbered_and_no_result_is_typed():
    prose = "\n".join(c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "markdown")
    assert len(prose.split()) <= 700
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", prose)]
    assert numbers == list(range(1, len(numbers) + 1)) and 4 <= len(numbers) <= 8
    assert set(re.findall(r"[\d.]+ ?%", prose)) == {"95 %"}
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        assert (NOTEBOOK.parent / link).is_file()


def test_sliders_attack_anew_when_one_is_moved(points, defences):
    split, _ = points
    box = quick_look.explore(defences["no purifier"].classifier, split, steps=2, image=4)
    radius, eot, number, chosen, text, picture = box.children
    assert text.value == quick_look.HINT and not picture.value  # nothing runs before
    seen = []
    for control, value in ((eot, 2), (radius, 0.2), (number, 1), (chosen, "none-0")):
        control.value = value
        png = bytes(picture.value)
        assert png.startswith(b"\x89PNG") and png not in seen
        assert re.fullmatch(r"right answers of 10: \d+ without, \d+ under attack", text.value)
        seen.append(png)
    assert not plt.get_fignums()
    for name in quick_look.CHOICES.values():
        chosen.value = name
        assert picture.value


def test_figures_fit_a_page(points, defences):
    (x, y), _ = points
    view = quick_look.view_image("no attack", defences["adaptive-1"], x[:1], x[:1])
    assert view.draws.shape == (10, 10) and not view.delta.any()
    figure = quick_look.draw_views([view, view], int(y[0]), 0.1)
    assert figure.get_size_inches()[0] <= 7.25
    plt.close(figure)
