"""All commands behind one: `python -m lib COMMAND …`, installed as `distill`."""

import importlib
import sys

from lib.commands.installed import check_checkout, missing_package
from lib.utils.memory import keep_memory
from lib.utils.processes import exit_on_signals, print_in_any_locale

COMMANDS = {
    "evaluate": ("lib.commands.evaluate", "attack a defence and say what is left, with its control"),
    "check": ("lib.commands.check", "look for masked gradients and failed attacks"),
    "leaderboard": ("lib.commands.leaderboard", "rank evaluated defences, or check an entry"),
    "purify": ("lib.purify", "purify an image or a folder of images"),
    "claims": ("lib.claims", "print the claims of this repository and their verdicts"),
    "profile": ("lib.profile", "choose what `dvc repro` runs"),
    "run": ("lib.run", "run one notebook with changed parameters"),
    "pieces": ("lib.pipeline.pieces", "CIFAR-10 in pieces of minutes on one GPU"),
    "export": ("lib.commands.export", "write a purifier or classifier as an ONNX file, noise as an input"),
}
OF_CHECKOUT = ("claims", "profile", "run", "pieces")  # they read and write results of the repository
USAGE = "usage: python -m lib COMMAND …\n\n" + "\n".join(f"  {name:12}{words}" for name, (_, words) in COMMANDS.items())


def main() -> None:
    """Run the command that the first argument names; its `--help` says what it takes."""
    print_in_any_locale()
    exit_on_signals()
    keep_memory()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{USAGE}\n\n`python -m lib COMMAND --help` says more.")
        return
    if name not in COMMANDS:
        raise SystemExit(f"{USAGE}\n\nexpected one of these commands, got {name!r}")
    sys.argv = [name, *rest]
    try:
        if name in OF_CHECKOUT:
            check_checkout()
        raise SystemExit(importlib.import_module(COMMANDS[name][0]).main())
    except ImportError as error:
        raise SystemExit(f"python -m lib {name}: {missing_package(error)}") from None
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"python -m lib {name}: {error}") from None


if __name__ == "__main__":
    main()
