"""Captions of all figures, computed from the records that they draw; the report writes them beside the figures."""

from collections.abc import Callable, Mapping, Sequence

from lib.report.figures.defensive import defensive_captions
from lib.report.figures.diffpure import diffpure_captions
from lib.report.figures.diffusion_distillation import diffusion_captions
from lib.report.figures.kd import kd_captions
from lib.report.figures.robust_distillation import robust_captions
from lib.utils.files import ROOT, write_text
from lib.utils.validation import Name, check_value

CAPTIONS: dict[str, Callable[[Sequence[dict]], dict[str, str]]] = {
    "kd": kd_captions,
    "dd": defensive_captions,
    "rd": robust_captions,
    "diff": diffusion_captions,
    "dp": diffpure_captions,
}


def figure_captions(records: Mapping[str, Sequence[dict]], dataset: str) -> dict[str, str]:
    """Return the caption of every figure, by its name.

    Args:
        records: of each experiment, one per seed; one without records has no figures.
        dataset: that the experiments are on.

    Returns:
        What is shown, seeds and images, error bars, radius and units, data set.
    """
    some = {name: captions for name, captions in CAPTIONS.items() if records.get(name)}
    texts = {figure: text for name, captions in some.items() for figure, text in captions(records[name]).items()}
    return {figure: f"{text} Data set: {dataset}." for figure, text in texts.items()}


def caption_text(experiment: str, record: dict, dataset: str, *figures: str) -> str:
    """Return the captions of some figures of one record, as Markdown, each after its figure's name.

    Raises KeyError for a figure that the experiment does not have.
    """
    texts = figure_captions({experiment: [record]}, dataset)
    return "\n\n".join(f"**{name}.** {texts[name]}" for name in figures)


def save_captions(
    profile: str, captions: Mapping[str, str], source: str = "the stage `report` from the records"
) -> None:
    """Write `figures/<profile>/captions.md`: every figure with its caption; `source`: what wrote them, in words."""
    parts = [f"## {name}\n\n![{name}]({name}.png)\n\n{text}\n" for name, text in captions.items()]
    head = f"# Figures of the profile {profile}\n\nWritten by {source}.\n"
    folder = ROOT / "figures" / check_value("a profile", profile, Name)
    write_text(folder / "captions.md", "\n".join([head, *parts]))
