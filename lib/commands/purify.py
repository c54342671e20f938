"""Purify images: `python -m lib purify IN OUT`, see `--help`; files of images are left to `lib.purify`."""

import argparse
from pathlib import Path

from lib import purify
from lib.commands import named
from lib.commands.image_sources import write_adversarial
from lib.utils.device import default_device
from lib.utils.files import check_writable, shown_path
from lib.utils.images import RESIZE_RULE
from lib.utils.validation import NonNegativeInt, PositiveInt, check_value


def purify_source(source: str, target: Path, purifier: str, count: int, seed: int) -> str:
    """Purify images of a data set, an .npz file, class folders or a Dataset, and write them as an .npz file.

    Args:
        source: see `lib.commands.named.draw_images`.
        target: the file, with x, y, numbers, and x_purified (n, c, h, w).
        purifier: see `lib.commands.named.purifier_place`.
        count: at most so many images, drawn by the seed.
        seed: of the draw and of the noise.

    Returns:
        What was done, in one line.

    Raises:
        ValueError: for what is no purifier, and images that it does not take.
        FileNotFoundError: for what is not there.
    """
    check_writable(target)
    models, name = named.purifier_place(purifier)
    net = purify.load_purifier(models, name, clamp=False).to(default_device())  # `purify` sees what leaves [0, 1]
    points, numbers, facts = named.draw_images(source, count, seed, *named.image_form("", purifier))
    arrays = {"x": points.x, "y": points.y, "numbers": numbers, "x_purified": purify.purify(net, points.x, seed)}
    write_adversarial(target, arrays | {"purifier": purifier, "seed": seed})
    resized = f", {facts['resized']} of them resized: {RESIZE_RULE}" if facts["resized"] else ""
    return f"{len(numbers)} images purified by {purifier}{resized}: {shown_path(target)}"


def main() -> int:
    """Purify an image, a folder of images, or images with labels.

    Images: OUT is a .png file or a folder. With labels (a data set, an .npz file, a folder of class folders, or
    module:function of a torch Dataset): OUT ends in .npz and gets x, x_purified (n, c, h, w), y and numbers (n,).
    Exit status: 0; 1 for an error.
    """
    parser = argparse.ArgumentParser(prog="python -m lib purify", description=main.__doc__)
    parser.add_argument("source", metavar="IN", help="an image, a folder of images, or images with labels")
    parser.add_argument("target", metavar="OUT", type=Path, help="a .png file, a folder, or an .npz file")
    parser.add_argument("--purifier", help="digits/adaptive-1, or FOLDER/adaptive-1")
    parser.add_argument("--student", help="with --models: <kind>-<steps>, such as cd-2; sde-100 is DiffPure itself")
    parser.add_argument("--models", help="folder of networks (default: those of the active profile)")
    parser.add_argument("--resize", action="store_true", help=f"files of images: {RESIZE_RULE}; always so with labels")
    parser.add_argument("--images", type=int, default=10**6, help="with labels: at most so many, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, at least 0")
    args = parser.parse_args()
    own = {"--student": args.student, "--models": args.models}
    if args.purifier is not None and any(own.values()):
        raise ValueError("expected either --purifier or --student and --models, got both")
    seed = check_value("--seed", args.seed, NonNegativeInt)
    if args.target.suffix == ".npz":
        if args.purifier is None:
            raise ValueError("expected --purifier, such as digits/adaptive-1, for an .npz file OUT, got none")
        count = check_value("--images", args.images, PositiveInt)
        print(purify_source(args.source, args.target, args.purifier, count, seed))
        return 0
    if args.purifier is not None:
        own["--models"], own["--student"] = map(str, named.purifier_place(args.purifier))
    options = [word for option, value in own.items() if value is not None for word in (option, value)]
    purify.main([args.source, str(args.target), "--seed", str(seed), *options, *["--resize"] * args.resize])
    return 0
