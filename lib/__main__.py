"""All commands behind one: `python -m lib COMMAND …`, installed as `distill`."""

import importlib
import signal
import sys

from lib.commands.installed import check_checkout, missing_package
from lib.utils.memory import keep_memory
from lib.utils.processes import exit_on_signals, print_in_any_locale

DEFENCE, BALL = "digits/natural --purifier digits/adaptive-1", "--data digits --eps 0.1"
COMMANDS = {  # module, what it does, an example
    "evaluate": (
        "lib.commands.evaluate",
        "attack a defence and say what is left, with its control",
        f"{DEFENCE} {BALL} --html report.html",
    ),
    "attack": ("lib.commands.attack", "attack a defence and write the attacked images", f"{DEFENCE} out.npz {BALL}"),
    "check": ("lib.commands.check", "look for masked gradients and failed attacks", f"{DEFENCE} {BALL}"),
    "report": ("lib.commands.report", "write the page of an evaluation from its JSON file", "out.json report.html"),
    "leaderboard": ("lib.commands.leaderboard", "rank evaluated defences, or check an entry", "--check out.json"),
    "purify": (
        "lib.commands.purify",
        "purify an image, a folder of images, or a data set",
        "digits purified.npz --purifier digits/adaptive-1 --images 8",
    ),
    "weights": ("lib.commands.weights", "list the networks that come with the repository", ""),
    "claims": ("lib.claims", "print the claims of this repository and their verdicts", "--profile digits"),
    "profile": ("lib.profile", "choose what `dvc repro` runs", "mnist"),
    "run": ("lib.run", "run one notebook with changed parameters", "notebooks/01_classic_kd.ipynb out.ipynb -p T 8"),
    "pieces": ("lib.pipeline.pieces", "CIFAR-10 in pieces of minutes on one GPU", "resnet18 --minutes 10"),
    "export": (
        "lib.commands.export",
        "write a purifier or classifier as an ONNX file, noise as an input",
        "digits/adaptive-1 purifier.onnx --classifier digits/natural",
    ),
}
OF_CHECKOUT = ("claims", "profile", "run", "pieces")  # they read and write results of the repository
USAGE = "usage: python -m lib COMMAND …\n\n" + "\n".join(f"  {name:12}{row[1]}" for name, row in COMMANDS.items())
HELP = ("-h", "--help")


def main() -> None:
    """Run the command that the first argument names; its `--help` says what it takes.

    Exit status: 0; 1 for an error, said in one line; 2 for arguments that a command does not have; 3 for red marks; 130
    for Ctrl-C, and 128 more than the number of another signal.
    """
    print_in_any_locale()
    exit_on_signals()
    keep_memory()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in HELP:
        print(f"{USAGE}\n\n`python -m lib COMMAND --help` says more.")
        return
    if name not in COMMANDS:
        raise SystemExit(f"{USAGE}\n\nexpected one of these commands, got {name!r}")
    sys.argv = [name, *rest]
    module, _, example = COMMANDS[name]
    try:
        if name in OF_CHECKOUT:
            check_checkout()
        raise SystemExit(importlib.import_module(module).main())
    except ImportError as error:
        raise SystemExit(f"python -m lib {name}: {missing_package(error)}") from None
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"python -m lib {name}: {error}") from None
    except KeyboardInterrupt:
        print(f"python -m lib {name}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if set(HELP) & set(rest):
            print(f"\nexample: python -m lib {name} {example}".rstrip())


if __name__ == "__main__":
    main()
