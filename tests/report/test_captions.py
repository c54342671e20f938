"""Every figure has a caption, and its numbers are those of the records that the figure draws."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest

from lib.report import captions, claims, readme
from lib.report.figures import defensive, diffpure, diffusion_distillation, kd, robust_distillation
from lib.utils.artifacts import results_dir
from lib.utils.files import ROOT, read_json

spec = importlib.util.spec_from_file_location("diffpure_records", Path(__file__).with_name("diffpure_records.py"))
diffpure_records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diffpure_records)

FIGURES = {
    "kd": kd.FIGURES,
    "dd": defensive.FIGURES,
    "rd": robust_distillation.FIGURES,
    "diff": diffusion_distillation.FIGURES,
    "dp": diffpure.FIGURES,
}
ONE_SEED = ("kd_soft_label", "kd_telling_images", "dd_pictures", "diff_pictures")  # they show examples
OTHER_IMAGES = {  # those of the figure, where they are not the test images that are attacked
    "rd_dark_knowledge": "{} seeds, each with all test images",
    "diff_samples": "seed 4 of {} seeds; no test images",
    "dp_inheritance": "{} seeds × 31 test images",
    "dp_certified": "{} seeds × 23 test images",
    "dp_diagnosis": "{} seeds × 29 test images",
    "dp_pictures": "6 test images, the grey-box attack on them (Linf, ε = 0.375 in pixel units)",
}
WITHOUT_RADIUS = ("dd_why", "dp_certified")
NAMES = [(experiment, name) for experiment, figures in FIGURES.items() for name in figures]


def other_records(experiment: str, n_seeds: int) -> list[dict]:
    """Records with another number of seeds and images than any that is committed, and another radius."""
    if experiment == "dp":
        records = [diffpure_records.synthetic_record(seed, n=37) for seed in range(4, 4 + n_seeds)]
    else:
        first = read_json(min(results_dir("digits", "records").glob(f"{experiment}-s*.json")))
        records = [copy.deepcopy(first) | {"seed": seed} for seed in range(4, 4 + n_seeds)]
    for record in records:
        metrics = record["metrics"]
        metrics |= {"n_test": 37, "eps": 0.375, "n_inherited": 31, "n_diagnosed": 29}
        metrics.get("certified", {})["n"] = 23
        for network in metrics.get("models", {}).values():
            network["small"]["eps"], network["large"]["eps"] = 0.375, 0.625
    return records


@pytest.fixture(scope="module")
def written():
    return {n: captions.figure_captions({e: other_records(e, n) for e in FIGURES}, "a-data-set") for n in (1, 3)}


def test_every_figure_has_a_caption_and_no_other(written):
    assert sorted(written[3]) == sorted(name for _, name in NAMES)
    assert all(text.endswith(". Data set: a-data-set.") and "  " not in text for text in written[3].values())
    assert captions.figure_captions({"kd": [], "speed": [{}]}, "digits") == {}


@pytest.mark.parametrize("experiment, name", NAMES)
def test_a_caption_has_the_seeds_images_and_radius_of_its_records(experiment, name, written):
    one, three = written[1][name], written[3][name]
    usual = (
        "1 seed × 37 test images"
        if name in ONE_SEED
        else "{} seeds × 37 " + ("images" if experiment == "dp" else "test")
    )
    assert OTHER_IMAGES.get(name, usual).format(3) in three
    assert name in ONE_SEED or one != three
    assert "interval" in three or "no error bars" in three
    if experiment in ("dd", "rd", "dp") and name not in WITHOUT_RADIUS:
        assert "ε = 0.375" in three or "ε = 0.625" in three


def test_without_seeds_to_compare_there_are_no_error_bars(written):
    assert "no error bars, since there is one seed" in written[1]["kd_gain"] and "1 seed × 37" in written[1]["kd_gain"]
    assert "error bars 95 % t intervals over seeds" in written[3]["kd_gain"]


def test_captions_lie_beside_the_figures(monkeypatch, tmp_path, written):
    monkeypatch.setattr(captions, "ROOT", tmp_path)
    captions.save_captions("tiny", written[3])
    text = (tmp_path / "figures/tiny/captions.md").read_text(encoding="utf-8")
    assert all(f"![{name}]({name}.png)\n\n{caption}\n" in text for name, caption in written[3].items())


def test_the_committed_captions_are_those_of_the_committed_records(monkeypatch, tmp_path):
    monkeypatch.setattr(captions, "ROOT", tmp_path)
    captions.save_captions("digits", captions.figure_captions(claims.saved_records("digits"), "digits"))
    file = "figures/digits/captions.md"
    assert (tmp_path / file).read_text(encoding="utf-8") == (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", readme.PAGES)
def test_each_figure_of_a_page_has_its_caption_and_no_number_in_its_place(page, written):
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"!\[([^]]*)\]\((?:\.\./)*figures/digits/(\w+)\.png\)\n\n<!-- (\w+) -->", text)
    assert (
        [name for _, name, _ in shown]
        == [mark for _, _, mark in shown]
        == list(readme.caption_blocks(text, written[3]))
    )
    assert len(shown) == len(re.findall(r"!\[", text))
    assert not any(re.search(r"\d", alt) for alt, _, _ in shown)
    blocks = readme.caption_blocks(text, written[3])
    other = readme.replace_blocks(text, blocks)
    assert all(caption in other and caption not in text for caption in blocks.values())


def test_a_notebook_shows_the_captions_of_the_figures_that_it_names():
    record = other_records("kd", 1)[0]
    texts = captions.figure_captions({"kd": [record]}, "digits")
    assert captions.caption_text("kd", record, "digits", "kd_cost", "kd_gain") == (
        f"**kd_cost.** {texts['kd_cost']}\n\n**kd_gain.** {texts['kd_gain']}"
    )
    with pytest.raises(KeyError, match="rd_gain"):
        captions.caption_text("kd", record, "digits", "rd_gain")
