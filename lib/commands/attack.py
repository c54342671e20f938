"""Attack a defence and write the images: `python -m lib attack MODEL OUT.npz`, see `--help`."""

import argparse
from pathlib import Path

from lib.commands import arguments
from lib.commands.arguments import RED
from lib.commands.evaluate import run_evaluation, save_adversarial
from lib.commands.measures import evaluation_lines
from lib.utils.files import shown_path


def main() -> int:
    """Attack a defence as evaluate does and write the worst image of each example to an .npz file.

    Arrays: x, x_adv (n, c, h, w), y and the images' numbers (n,), answers_x and answers_x_adv, the classes answered
    without and under the attack (draws, n), made_by, the attack that each image comes from (n,), and name, eps, norm,
    seed, attacks, commit, command. `--data OUT.npz` attacks the same images again, `--data OUT.npz:x_adv` starts from
    the attacked ones. Exit status: as of evaluate.
    """
    parser = argparse.ArgumentParser(prog="python -m lib attack", description=main.__doc__)
    arguments.add_subject(parser)
    parser.add_argument("target", metavar="OUT.npz", type=Path, help="the file to write")
    arguments.add_attack(parser)
    args = parser.parse_args()
    if args.target.suffix != ".npz":
        raise ValueError(f"expected a file name that ends in .npz, got {shown_path(args.target)}")
    arguments.check_outputs(args.target)
    result, worst, call = run_evaluation(args)
    save_adversarial(args.target, result, worst, call.points)
    print("\n".join([*evaluation_lines(result), f"{shown_path(args.target)}: {result['n']} attacked images"]))
    return RED if result["red"] else 0
