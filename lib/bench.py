"""What a clock says, kept apart from the results that must repeat: `make bench` writes `data/<profile>/bench/kd.json`.

The ratio within one run is what counts; milliseconds are those of one machine.
"""

import argparse

import torch
import yaml

from lib import kd
from lib.data import load
from lib.models import Ensemble, build
from lib.paths import ROOT
from lib.results import folder, write_json


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


def main() -> None:
    argparse.ArgumentParser(prog="python -m lib.bench", description="Measure latencies of the profile in params.yaml.")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    report = kd_latency(params)
    write_json(folder(params["profile"], "bench") / "kd.json", report)
    for name, row in report["networks"].items():
        print(f"{name:16}", ", ".join(f"{key}: {value:.3g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
