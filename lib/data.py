"""Data sets: images in [0, 1] with labels, in fixed splits; each file is verified by SHA-256 before it is parsed.

Files are saved, decompressed, in `data/raw/<dataset>/`. A missing one is copied from the folder that the environment
variable `DISTILL_DATA_MIRROR` names (then without network), else downloaded by pooch. `digits` comes with scikit-learn.
The SHA-256 is of the uncompressed content, as mirrors compress it anew; a `.gz` is unpacked to `MAX_BYTES` at most.
"""

import argparse
import gzip
import hashlib
import json
import os
import pickle
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from lib.utils.files import ROOT, read_limited, write_bytes, write_text
from lib.utils.idx import parse_idx
from lib.utils.processes import exit_on_signals, print_in_any_locale
from lib.utils.seeds import seeded_generator

RAW = ROOT / "data" / "raw"

# Images in train, val, test. Only `digits` has no official test set: its 500 are sampled from all 1797.
SIZES = {
    "digits": (1047, 250, 500),
    "mnist": (55_000, 5_000, 10_000),
    "fashion-mnist": (55_000, 5_000, 10_000),
    "cifar10": (45_000, 5_000, 10_000),
}
CLASSES = {
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
ADDRESSES = {  # tried in turn
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist"),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    ),
    "cifar10": ("https://www.cs.toronto.edu/~kriz",),
}
TARBALL, TARBALL_MD5, BATCHES = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"
SHA256 = {  # of the uncompressed content, training files first
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "cifar10": {
        "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
        "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
    },
}
MAX_BYTES = 64 * 2**20  # more than any of these files has; nothing is unpacked beyond


class Split(NamedTuple):
    """Images `x` (float32, NCHW, in [0, 1]) and their labels `y` (int64, in range(classes))."""

    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in three disjoint splits; its tensors are copies that the caller may change in place."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    @property
    def in_channels(self) -> int:
        """Colour channels: 1 or 3."""
        return self.train.x.shape[1]

    @property
    def size(self) -> int:
        """Height, which is also the width, in pixels."""
        return self.train.x.shape[2]

    def spec(self) -> dict[str, int]:
        """Return the arguments of `lib.models.build_classifier` that depend on the data set."""
        return {"in_channels": self.in_channels, "size": self.size, "classes": len(self.classes)}


def check_images(x: Any) -> None:
    """Raise ValueError unless `x` is a floating-point NCHW batch whose pixels are finite and in [0, 1]."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
        got = f"{type(x).__name__} {getattr(x, 'dtype', '')} of shape {tuple(getattr(x, 'shape', ()))}"
        raise ValueError(f"images must be a floating-point NCHW torch.Tensor, got {got}")
    low, high = x.aminmax() if x.numel() else (0, 1)
    if not (low >= 0 and high <= 1):  # false for NaN as well
        raise ValueError(f"pixels must be finite and in [0, 1], got min {low:g} and max {high:g}")


def is_intact(dataset: str, file: str, content: bytes) -> bool:
    """Return whether `content` has the known SHA-256 of `file`."""
    return hashlib.sha256(content).hexdigest() == SHA256[dataset][file]


def read_mirror(dataset: str, files: list[str], mirror: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each file with its verified content from a local mirror.

    Raises FileNotFoundError or OSError, naming the mirror's file, when one is missing or corrupt.
    """
    for file in files:
        path = mirror / BATCHES / file if dataset == "cifar10" else mirror / dataset / f"{file}.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"{dataset}: {path} is missing: complete the mirror, or unset DISTILL_DATA_MIRROR to download"
            )
        try:
            content = read_limited(path, MAX_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile, ValueError):
            content = b""
        if not is_intact(dataset, file, content):
            cause = "is corrupt (truncated, altered or too long): replace it, or unset DISTILL_DATA_MIRROR to download"
            raise OSError(f"{dataset}: {path} {cause}")
        yield file, content


def download_files(dataset: str, files: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield each file with its verified content from the first address that has it, and show the progress.

    Raises ConnectionError, naming the addresses and the error of each, when none has it.
    """
    archives = {TARBALL: files} if dataset == "cifar10" else {f"{file}.gz": [file] for file in files}
    for archive, members in archives.items():
        failures = []
        for url in [f"{address}/{archive}" for address in ADDRESSES[dataset]]:
            try:
                contents = download_url(url, members)
                if altered := [file for file in members if not is_intact(dataset, file, contents.get(file, b""))]:
                    raise OSError(f"corrupt: the SHA-256 of {', '.join(altered)} differs")
            except (OSError, ValueError, EOFError, zlib.error, tarfile.TarError) as error:
                failures.append(f"\n  {url}: {error}")
                continue
            yield from contents.items()
            break
        else:
            raise ConnectionError(
                f"{dataset}: no address has an intact {archive}; tried:{''.join(failures)}\n"
                "Connect to the network and run again, set DISTILL_DATA_MIRROR to a folder that holds "
                f"{BATCHES if dataset == 'cifar10' else dataset}/, or use the profile digits, which needs no download."
            )


def download_url(url: str, members: list[str]) -> dict[str, bytes]:
    """Return the content of the members of CIFAR-10's tarball, or of the one file in a `.gz`, that `url` serves.

    The tarball is unpacked only if its MD5 is the known one, a `.gz` to `MAX_BYTES`: else ValueError. OSError: none.
    """
    print(f"downloading {url}", flush=True)
    downloader: Any = pooch.HTTPDownloader(progressbar=True, chunk_size=2**16)
    known = processor = None
    if url.endswith(TARBALL):
        known, processor = f"md5:{TARBALL_MD5}", pooch.Untar(members=[f"{BATCHES}/{file}" for file in members])
    pooch.get_logger().setLevel("WARNING")
    with tempfile.TemporaryDirectory() as folder:
        paths: Any = pooch.retrieve(url, known, path=folder, processor=processor, downloader=downloader)
        names = {members[0]: paths} if isinstance(paths, str) else {Path(path).name: path for path in paths or ()}
        return {name: read_limited(Path(path), MAX_BYTES) for name, path in names.items()}


def fetch_files(dataset: str) -> list[bytes]:
    """Return the verified content of every file in the order of `SHA256`, and save it in `data/raw/<dataset>/`.

    Raises OSError when a saved file is corrupt (it is removed), and the errors of `read_mirror` and `download_files`.
    """
    folder, mirror = RAW / dataset, os.environ.get("DISTILL_DATA_MIRROR")
    contents = {file: (folder / file).read_bytes() for file in SHA256[dataset] if (folder / file).exists()}
    if corrupt := [folder / file for file, content in contents.items() if not is_intact(dataset, file, content)]:
        for path in corrupt:
            path.unlink()
        raise OSError(
            f"{dataset}: {', '.join(map(str, corrupt))} was corrupt (truncated or altered) and has been removed: "
            "run again to fetch it afresh"
        )
    if missing := [file for file in SHA256[dataset] if file not in contents]:
        source = read_mirror(dataset, missing, Path(mirror).absolute()) if mirror else download_files(dataset, missing)
        for file, content in source:
            write_bytes(folder / file, content)
            contents[file] = content
    return [contents[file] for file in SHA256[dataset]]


def decode_dataset(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all images (uint8, NCHW; digits in 0..16, others in 0..255) and labels (uint8), official test last."""
    if dataset == "digits":
        from sklearn.datasets import load_digits  # half of this module's import time, which worker processes save

        digits: Any = load_digits()
        return digits.images[:, None].astype(np.uint8), digits.target.astype(np.uint8)
    if dataset == "cifar10":
        batches = [pickle.loads(content, encoding="bytes") for content in fetch_files(dataset)]
        x = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        return x, np.concatenate([batch[b"labels"] for batch in batches]).astype(np.uint8)
    x, y, test_x, test_y = map(parse_idx, fetch_files(dataset))
    return np.concatenate([x, test_x])[:, None], np.concatenate([y, test_y])


def stratified_order(y: Int[Tensor, " n"], rng: torch.Generator, balanced: bool = False) -> Int[Tensor, " n"]:
    """Return a random order of range(n) in which every prefix has the class proportions of `y`.

    If `balanced`, every prefix has equal numbers instead, as far as each class has images left.
    """
    order = torch.randperm(len(y), generator=rng)
    one_hot = F.one_hot(y[order])
    rank = (one_hot.cumsum(0) * one_hot).sum(1) - 1  # place among the images of its own class
    key = rank if balanced else (rank + 0.5) / one_hot.sum(0)[y[order]]
    return order[key.argsort(stable=True)]


@cache
def prepared_dataset(dataset: str) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, " n"], tuple[Int[Tensor, " m"], ...]]:
    """Return all images, all labels and the indices of train, val and test; decoded once, not to be changed.

    The splits are stratified and fixed: they depend on the data set's name alone.
    """
    images, labels = decode_dataset(dataset)
    x, y = torch.from_numpy(images), torch.from_numpy(labels).long()
    _, n_val, n_test = SIZES[dataset]
    rng = seeded_generator(0, f"split {dataset}")
    if dataset == "digits":
        test, rest = stratified_order(y, rng).tensor_split([n_test])
    else:
        test, rest = torch.arange(len(y) - n_test, len(y)), stratified_order(y[:-n_test], rng)
    val, train = rest.tensor_split([n_val])
    return x, y, tuple(index.sort().values for index in (train, val, test))


def load_dataset(dataset: str, *, n_labels: int | None = None, leave_out: Sequence[int] = (), seed: int = 0) -> Data:
    """Return a data set (a key of `SIZES`) with fixed splits; only the train split depends on the other arguments.

    `leave_out`: classes to drop from train (labels keep their numbers); `n_labels`: how many train images to keep, in
    equal numbers per class where possible, chosen by `seed` so that a smaller subset lies in every larger one.
    Raises ValueError for an unknown data set and for numbers out of range, OSError when no intact data is available.
    """
    if dataset not in SIZES:
        raise ValueError(f"unknown data set {dataset!r}: expected one of {', '.join(SIZES)}")
    classes = CLASSES[dataset]
    if unknown := [label for label in leave_out if label not in range(len(classes))]:
        raise ValueError(f"leave_out: expected labels of 0 to {len(classes) - 1}, got {unknown}")
    x, y, (train, val, test) = prepared_dataset(dataset)
    train = train[~torch.isin(y[train], torch.tensor(leave_out, dtype=torch.long))]
    n_classes = len(classes) - len(set(leave_out))
    if not n_classes:
        raise ValueError(f"leave_out: expected at least one of the labels 0 to {len(classes) - 1} to remain, got all")
    if n_labels is not None:
        if not n_classes <= n_labels <= len(train):
            raise ValueError(f"n_labels: expected {n_classes} (one per class) to {len(train)} (all), got {n_labels}")
        order = stratified_order(y[train], seeded_generator(seed, "labels"), balanced=True)
        train = train[order[:n_labels].sort().values]
    scale = 16 if dataset == "digits" else 255
    splits = [Split(x[index].float().div_(scale), y[index]) for index in (train, val, test)]
    return Data(dataset, classes, *splits)


def dataset_summary(data: Data) -> dict:
    """Return sizes, counts per class, image shape (CHW), mean and standard deviation of train's pixels (6 decimals)
    and the SHA-256 of each split's bytes (images, then labels): the same on every machine.
    """
    splits = {"train": data.train, "val": data.val, "test": data.test}
    std, mean = torch.std_mean(data.train.x, correction=0)
    hashes = {name: hashlib.sha256(x.numpy().data) for name, (x, _) in splits.items()}
    for name, (_, y) in splits.items():
        hashes[name].update(y.numpy().data)
    return {
        "dataset": data.name,
        "shape": list(data.train.x.shape[1:]),
        "size": {name: len(y) for name, (_, y) in splits.items()},
        "per_class": {name: y.bincount(minlength=len(data.classes)).tolist() for name, (_, y) in splits.items()},
        "pixels": {"mean": round(mean.item(), 6), "std": round(std.item(), 6)},
        "sha256": {name: sha.hexdigest() for name, sha in hashes.items()},
    }


def main() -> None:
    """Write the summary of a data set as JSON, and print one line."""
    parser = argparse.ArgumentParser(prog="python -m lib.data", description=main.__doc__)
    parser.add_argument("dataset", choices=SIZES)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    arguments = parser.parse_args()
    print_in_any_locale()
    exit_on_signals()
    try:
        report = dataset_summary(load_dataset(arguments.dataset))
        write_text(arguments.out, json.dumps(report, indent=2, sort_keys=True) + "\n")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    sizes = ", ".join(f"{name} {size}" for name, size in report["size"].items())
    print(f"{arguments.dataset}: {sizes}; shape {report['shape']}; summary in {arguments.out}")


if __name__ == "__main__":
    main()
