"""Take a diffusion model of others as teacher: `python -m lib.pipeline.adopt SOURCE MODELS`."""

import argparse
from pathlib import Path

from lib.data import load_dataset
from lib.distillation.adopted_teacher import adopt_teacher
from lib.distillation.few_step import few_step_recipe
from lib.pipeline.profile import compose_profile
from lib.utils.files import shown_path
from lib.utils.processes import print_in_any_locale


def main(arguments: list[str] | None = None) -> None:
    """Write the network of SOURCE, a folder in diffusers' format or a name on the hub, to MODELS as its teacher.

    Then `python -m lib.purify IN OUT --models MODELS --student sde-100` purifies with it.
    """
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.adopt", description=main.__doc__)
    parser.add_argument("source", metavar="SOURCE", help="such as google/ddpm-cifar10-32")
    parser.add_argument("models", metavar="MODELS", type=Path, help="folder of networks, which need not exist")
    parser.add_argument("--profile", default="cifar10", help="of the data set and the students (default: cifar10)")
    args = parser.parse_args(arguments)
    try:
        settings = compose_profile(args.profile)
        data = load_dataset(settings["data"]["dataset"])
        recipe = adopt_teacher(args.source, args.models, data, few_step_recipe(settings["diff"]))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(f"{shown_path(args.models)}: teacher of {args.source}, predicts {recipe.target}, channels {recipe.channels}")


if __name__ == "__main__":
    main()
