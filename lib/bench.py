"""What a clock says, kept apart from the results that must repeat: `make bench` writes `data/<profile>/bench/kd.json`.

The ratio within one run is what counts; milliseconds are those of one machine. `--readme` writes what was measured last
into README.md and measures nothing.
"""

import argparse
import json

import torch
import yaml

from lib import kd
from lib.claims import between_marks
from lib.data import load
from lib.models import Ensemble, build
from lib.paths import ROOT
from lib.results import folder, write_json, write_text


def kd_latency(params: dict, rounds: int = 5) -> dict:
    """Returns milliseconds per image of teacher, ensemble and student, and each one's median ratio to the student.

    The networks are those of the profile with initial weights, which cost what trained ones do; they take turns for
    `rounds` rounds, so that a machine that slows down slows all of them.
    """
    data, p = load(params["data"]["dataset"]), params["kd"]

    def net(arch, width, seed):
        return build(arch, **data.spec(), width=width, seed=seed).eval()

    teachers = [net(p["teacher"], p["teacher_width"], seed) for seed in range(p["members"])]
    networks = {"teacher": teachers[0], f"ensemble of {p['members']}": Ensemble(teachers)}
    networks |= {"student": net("cnn", p["student_width"], 0)}
    turns = [{name: kd.latency(n, data.test.x[:256]) for name, n in networks.items()} for _ in range(rounds)]
    table = {}
    for name in networks:
        table[name] = {}
        for key in turns[0][name]:
            values = torch.tensor([turn[name][key] for turn in turns])
            ratios = torch.tensor([turn[name][key] / turn["student"][key] for turn in turns])
            table[name] |= {key: values.median().item(), f"{key}, × student": ratios.median().item()}
    return {"threads": torch.get_num_threads(), "rounds": rounds, "networks": table}


def table(report: dict) -> str:
    """Returns the latencies as a Markdown table: milliseconds, and in brackets the ratio to the student."""
    rows = report["networks"]
    clocks = [key for key in rows["student"] if not key.endswith("student")]
    lines = [f"| network | {' | '.join(clocks)} |", "|---" * (1 + len(clocks)) + "|"]
    for name, row in rows.items():
        cells = [f"{row[key]:.2g} ({row[f'{key}, × student']:.1f} ×)" for key in clocks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.bench", description="Measure latencies of the active profile.")
    parser.add_argument("--readme", action="store_true", help="write what was measured last into README.md")
    options = parser.parse_args()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    path = folder(params["profile"], "bench") / "kd.json"
    if not options.readme:
        torch.set_num_threads(params["threads"] or torch.get_num_threads())
        write_json(path, kd_latency(params))
    report = table(json.loads(path.read_text()))
    print(report)
    if options.readme:
        readme = ROOT / "README.md"
        write_text(readme, between_marks(readme.read_text(), "bench", report))


if __name__ == "__main__":
    main()
