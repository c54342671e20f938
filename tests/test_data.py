"""The data sets: fixed stratified splits, subsets of train, and files that are verified before they are read."""

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import sys
import tarfile
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lib import data
from lib.data import check_images, dataset_summary, load_dataset, stratified_order
from lib.utils.seeds import seeded_generator

DEAD = "http://127.0.0.1:9"  # nothing listens on the discard port


def counts(split):
    return split.y.bincount(minlength=10).tolist()


def rows(split):
    """The distinct images of a split, as bytes (digits has no duplicates across the whole set)."""
    return {image.numpy().tobytes() for image in split.x}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test has its own `data/raw`, no mirror, and addresses that answer nothing."""
    monkeypatch.setattr(data, "RAW", tmp_path / "raw")
    monkeypatch.setattr(data, "ADDRESSES", {name: (f"{DEAD}/a", f"{DEAD}/b") for name in data.ADDRESSES})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("DISTILL_DATA_MIRROR", raising=False)
    data.prepared_dataset.cache_clear()
    yield
    data.prepared_dataset.cache_clear()


def idx(array):
    dims = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + dims + array.tobytes()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A synthetic mirror (60 + 20 images of MNIST, 100 + 20 of CIFAR-10) and the checksums that fit it."""
    rng = np.random.default_rng(0)
    contents = {}
    for part, n in (("train", 60), ("t10k", 20)):
        contents[f"mnist/{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, 28, 28), np.uint8))
        contents[f"mnist/{part}-labels-idx1-ubyte"] = idx((np.arange(n) % 10).astype(np.uint8))
    for name in data.SHA256["cifar10"]:
        batch = {b"data": rng.integers(0, 256, (20, 3072), np.uint8), b"labels": [i % 10 for i in range(20)]}
        contents[f"{data.BATCHES}/{name}"] = pickle.dumps(batch)
    for name, content in contents.items():
        dataset, file = name.replace(data.BATCHES, "cifar10").split("/")
        path = tmp_path / "mirror" / (name if dataset == "cifar10" else f"{name}.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if dataset == "cifar10" else gzip.compress(content))
        monkeypatch.setitem(data.SHA256[dataset], file, hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(data.SIZES, "mnist", (50, 10, 20))
    monkeypatch.setitem(data.SIZES, "cifar10", (80, 20, 20))
    monkeypatch.setenv("DISTILL_DATA_MIRROR", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


@pytest.fixture
def served(mirror, monkeypatch):
    """The synthetic mirror behind HTTP on this machine, as second address of each data set."""
    with tarfile.open(mirror / data.TARBALL, "w:gz") as tar:
        tar.add(mirror / data.BATCHES, data.BATCHES)
    monkeypatch.setattr(data, "TARBALL_MD5", hashlib.md5((mirror / data.TARBALL).read_bytes()).hexdigest())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(data.ADDRESSES, "mnist", (DEAD, f"{url}/mnist"))
        monkeypatch.setitem(data.ADDRESSES, "cifar10", (DEAD, url))
        monkeypatch.delenv("DISTILL_DATA_MIRROR")
        yield mirror
        server.shutdown()


# Splits


def test_digits_have_the_documented_splits():
    digits = load_dataset("digits")
    assert (digits.name, digits.in_channels, digits.size) == ("digits", 1, 8)
    assert digits.spec() == {"in_channels": 1, "size": 8, "classes": 10}
    for split, n in zip((digits.train, digits.val, digits.test), (1047, 250, 500), strict=True):
        assert split.x.shape == (n, 1, 8, 8) and split.x.dtype == torch.float32 and split.y.dtype == torch.int64
        check_images(split.x)
        assert split.x.min() == 0 and split.x.max() == 1


def test_splits_are_disjoint_and_complete():
    digits = load_dataset("digits")
    train, val, test = rows(digits.train), rows(digits.val), rows(digits.test)
    assert len(train | val | test) == len(train) + len(val) + len(test) == 1797
    images = torch.from_numpy(load_digits().images).float() / 16
    assert train | val | test == {image.numpy().tobytes() for image in images}


def test_images_keep_their_labels():
    digits = load_digits()
    label = {
        (image / 16).astype(np.float32).tobytes(): y for image, y in zip(digits.images, digits.target, strict=True)
    }
    ours = load_dataset("digits", n_labels=200, leave_out=(3,), seed=5)
    for split in (ours.train, ours.val, ours.test):
        assert [label[image.numpy().tobytes()] for image in split.x] == split.y.tolist()


def test_splits_are_stratified():
    digits = load_dataset("digits")
    total = [sum(n) for n in zip(counts(digits.train), counts(digits.val), counts(digits.test), strict=True)]
    for split in (digits.train, digits.val, digits.test):
        expected = [n * len(split.y) / 1797 for n in total]
        assert max(abs(a - b) for a, b in zip(counts(split), expected, strict=True)) < 1.5


def test_splits_are_fixed():
    """Every result of the project rests on these images: a change of the splits must be seen."""
    assert (
        dataset_summary(load_dataset("digits", seed=0))["sha256"]
        == dataset_summary(load_dataset("digits", seed=9))["sha256"]
    )
    assert {name: sha[:16] for name, sha in dataset_summary(load_dataset("digits"))["sha256"].items()} == {
        "train": "3a9cc8424818076c",
        "val": "98f276c2902efa50",
        "test": "be6bcc0d7315af7f",
    }


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_dataset("digits", n_labels=50)
    assert torch.equal(torch.rand(3), expected)


def test_changes_in_place_stay_with_the_caller():
    for n_labels in (None, 1047):
        ruined = load_dataset("digits", n_labels=n_labels)
        for split in (ruined.train, ruined.val, ruined.test):
            split.x.zero_()
            split.y.zero_()
        assert dataset_summary(load_dataset("digits"))["sha256"]["train"].startswith("3a9cc842")
        assert counts(load_dataset("digits").test)[0] == 50


# Subsets of train


def test_subset_is_balanced_nested_and_seeded():
    subsets = [load_dataset("digits", n_labels=n, seed=3) for n in (10, 100, 200, 205, 1047)]
    for small, large in itertools.pairwise(subsets):
        assert rows(small.train) < rows(large.train)
    assert [counts(s.train) for s in subsets[:3]] == [[1] * 10, [10] * 10, [20] * 10]
    assert sorted(counts(subsets[3].train)) == [20] * 5 + [21] * 5
    assert torch.equal(subsets[4].train.x, load_dataset("digits").train.x)
    assert torch.equal(subsets[1].train.x, load_dataset("digits", n_labels=100, seed=3).train.x)
    assert rows(subsets[1].train) != rows(load_dataset("digits", n_labels=100, seed=4).train)
    assert rows(subsets[4].train) == rows(load_dataset("digits").train)
    for subset in subsets:
        assert torch.equal(subset.test.x, subsets[0].test.x) and torch.equal(subset.val.x, subsets[0].val.x)


def test_leave_out_drops_classes_from_train_alone():
    full, part = load_dataset("digits"), load_dataset("digits", leave_out=(3, 7, 3))
    keep = (full.train.y != 3) & (full.train.y != 7)
    assert torch.equal(part.train.y, full.train.y[keep]) and torch.equal(part.train.x, full.train.x[keep])
    assert torch.equal(part.val.y, full.val.y) and torch.equal(part.test.y, full.test.y)
    assert part.spec()["classes"] == 10
    assert counts(load_dataset("digits", leave_out=[3], n_labels=90).train) == [10, 10, 10, 0, *[10] * 6]


labels = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(torch.tensor)


@settings(max_examples=100, deadline=None)
@given(y=labels, seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_prefix_of_balanced_order(y, seed, share):
    order = stratified_order(y, seeded_generator(seed, "labels"), balanced=True)
    assert order.sort().values.tolist() == list(range(len(y)))
    assert torch.equal(order, stratified_order(y, seeded_generator(seed, "labels"), balanced=True))
    available = y.bincount()
    taken = y[order[: round(share * len(y))]].bincount(minlength=len(available))
    short = (taken < available) & (available > 0)  # classes that have images left differ by one, others have no more
    assert not short.any() or taken.max() - taken[short].min() <= 1


@settings(max_examples=50, deadline=None)
@given(n=st.integers(5, 40), seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_prefix_of_proportional_order(n, seed, share):
    y = torch.arange(2).repeat_interleave(torch.tensor([n, 3 * n]))
    prefix = y[stratified_order(y, seeded_generator(seed, "split"))[: round(share * 4 * n)]]
    assert abs(prefix.sum() - 0.75 * len(prefix)) <= 1


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dataset": "svhn"}, ["'svhn'", "digits, mnist, fashion-mnist, cifar10"]),
        ({"n_labels": 1048}, ["1048", "10", "1047"]),
        ({"n_labels": 9}, ["got 9", "10", "1047"]),
        ({"n_labels": 8, "leave_out": (3,)}, ["got 8", "expected 9 "]),
        ({"n_labels": 1000, "leave_out": (3,)}, ["1000", "940"]),
        ({"leave_out": (2, 10)}, ["[10]", "0 to 9"]),
        ({"leave_out": (-1,)}, ["[-1]", "0 to 9"]),
        ({"leave_out": range(10)}, ["at least one"]),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        load_dataset(**{"dataset": "digits", **arguments})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 4, 4), r"\(2, 4, 4\)"),
        (torch.full((1, 1, 2, 2), 1.5), "max 1.5"),
        (torch.full((1, 1, 2, 2), -0.25), "min -0.25"),
        (torch.tensor([0.0, float("nan")]).reshape(1, 1, 1, 2), "nan"),
        (torch.tensor([0.0, float("inf")]).reshape(1, 1, 1, 2), "max inf"),
    ],
)
def test_check_images_refuses(images, words):
    with pytest.raises(ValueError, match=words):
        check_images(images)


def test_check_images_accepts():
    check_images(torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))
    check_images(torch.zeros(0, 1, 8, 8))


# Files


@pytest.mark.parametrize(("dataset", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_mirror_is_copied_and_then_not_needed(mirror, monkeypatch, dataset, shape):
    first = load_dataset(dataset)
    assert [len(s.y) for s in (first.train, first.val, first.test)] == list(data.SIZES[dataset])
    assert first.train.x.shape[1:] == shape and counts(first.test) == [2] * 10
    assert sorted(path.name for path in (data.RAW / dataset).iterdir()) == sorted(data.SHA256[dataset])
    monkeypatch.delenv("DISTILL_DATA_MIRROR")
    data.prepared_dataset.cache_clear()
    assert dataset_summary(load_dataset(dataset)) == dataset_summary(first)


def test_pixels_are_those_of_the_file(mirror):
    first = pickle.loads((mirror / data.BATCHES / "test_batch").read_bytes())[b"data"][0].reshape(3, 32, 32)
    assert torch.equal(load_dataset("cifar10").test.x[0], torch.from_numpy(first).float() / 255)
    content = gzip.decompress((mirror / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert torch.equal(
        load_dataset("mnist").test.x[0].flatten() * 255, torch.tensor(list(content[16 : 16 + 784])).float()
    )


def test_files_are_decoded_once(mirror, monkeypatch):
    load_dataset("mnist")
    monkeypatch.setattr(data, "fetch_files", lambda dataset: pytest.fail("read again"))
    load_dataset("mnist", n_labels=20)


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize("damage", [flipped, lambda content: content[: len(content) // 2], lambda content: b""])
def test_corrupt_file_in_the_mirror_is_named_and_kept(mirror, damage):
    path = mirror / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(bad := gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(OSError, match=rf"mnist: .*{path.name} is corrupt.*replace it"):
        load_dataset("mnist")
    assert path.read_bytes() == bad and not (data.RAW / "mnist" / path.stem).exists()
    assert not list(data.RAW.rglob("*.part"))
    path.write_bytes(bad[: len(bad) // 2])
    with pytest.raises(OSError, match=path.name):
        load_dataset("mnist")


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_fault_47_a_file_in_the_mirror_is_unpacked_no_further_than_the_largest_goes(mirror, monkeypatch, dataset):
    """A bomb of a few kB would fill the memory, before its hash could be taken."""
    monkeypatch.setattr(data, "MAX_BYTES", 2**20)
    path = mirror / "mnist/t10k-labels-idx1-ubyte.gz" if dataset == "mnist" else mirror / data.BATCHES / "test_batch"
    path.write_bytes(gzip.compress(bytes(2**28)) if dataset == "mnist" else bytes(2**28))
    tracemalloc.start()
    with pytest.raises(OSError, match=rf"{path.name} is corrupt \(truncated, altered or too long\): replace it"):
        load_dataset(dataset)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_no_file_is_longer_than_what_may_be_unpacked():
    """The longest: MNIST's training images, 60 000 of 28 × 28 bytes, after 16 bytes of header."""
    assert data.MAX_BYTES >= 16 + 60_000 * 28 * 28


def test_fault_47_a_download_is_unpacked_no_further_either(served, monkeypatch, capsys):
    path = served / "mnist/t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(2**22)))
    monkeypatch.setattr(data, "MAX_BYTES", 2**20)
    with pytest.raises(ConnectionError, match=f"{path.name}: .*expected at most {2**20} bytes of content, got more"):
        load_dataset("mnist")


def test_missing_file_in_the_mirror_is_named(mirror):
    (mirror / data.BATCHES / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3 is missing.*DISTILL_DATA_MIRROR"):
        load_dataset("cifar10")


@pytest.mark.parametrize("damage", [flipped, lambda content: content[: len(content) // 2]])
def test_corrupt_kept_file_is_named_and_removed(mirror, damage):
    load_dataset("mnist")
    data.prepared_dataset.cache_clear()
    path = data.RAW / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=rf"{path.name} was corrupt.*run again"):
        load_dataset("mnist")
    assert not path.exists() and len(list((data.RAW / "mnist").iterdir())) == 3
    assert load_dataset("mnist").size == 28


def test_pickles_are_opened_only_when_verified(mirror, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (mirror / data.BATCHES / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(OSError, match="data_batch_1 is corrupt"):
        load_dataset("cifar10")
    assert not (tmp_path / "owned").exists()


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.write_bytes(tmp_path / "folder" / "file", b"content")
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_second_address_is_tried(served, dataset, capsys):
    assert [len(s.y) for s in (load_dataset(dataset).train, load_dataset(dataset).test)] == [data.SIZES[dataset][0], 20]
    assert sorted(path.name for path in (data.RAW / dataset).iterdir()) == sorted(data.SHA256[dataset])
    assert DEAD in capsys.readouterr().out
    data.prepared_dataset.cache_clear()
    (data.RAW / dataset / list(data.SHA256[dataset])[1]).unlink()
    load_dataset(dataset)  # one file alone can be fetched again


@pytest.mark.parametrize(
    ("dataset", "archive"), [("mnist", "mnist/train-images-idx3-ubyte.gz"), ("cifar10", data.TARBALL)]
)
@pytest.mark.parametrize("damage", [flipped, lambda content: content[:100], lambda content: b"<html>not found</html>"])
def test_corrupt_download_is_refused(served, dataset, archive, damage):
    (served / archive).write_bytes(damage((served / archive).read_bytes()))
    with pytest.raises(OSError, match=f"{dataset}: no address has an intact {archive.split('/')[-1]}"):
        load_dataset(dataset)
    assert not list(data.RAW.rglob("*"))


def test_altered_content_in_a_sound_archive_is_refused(served, monkeypatch):
    path = served / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(flipped(gzip.decompress(path.read_bytes()))))
    with pytest.raises(OSError, match="SHA-256 of train-images-idx3-ubyte differs"):
        load_dataset("mnist")
    (served / data.BATCHES / "data_batch_2").write_bytes(b"altered")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(served / data.BATCHES, data.BATCHES)
    (served / data.TARBALL).write_bytes(buffer.getvalue())
    monkeypatch.setattr(data, "TARBALL_MD5", hashlib.md5(buffer.getvalue()).hexdigest())
    with pytest.raises(OSError, match="SHA-256 of data_batch_2 differs"):
        load_dataset("cifar10")
    assert not list(data.RAW.rglob("*"))


def test_offline_error_says_what_to_do():
    with pytest.raises(ConnectionError) as error:
        load_dataset("fashion-mnist")
    words = ["fashion-mnist:", f"{DEAD}/a/train-images-idx3-ubyte.gz", f"{DEAD}/b/", "DISTILL_DATA_MIRROR", "digits"]
    assert all(word in str(error.value) for word in words)


def test_mirror_needs_no_network(mirror, monkeypatch):
    monkeypatch.setattr(data, "download_url", lambda *_: pytest.fail("network used"))
    load_dataset("mnist")
    load_dataset("cifar10")


# Summary


def test_summary_is_written_by_the_command_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "digits.json"
    monkeypatch.setattr(sys, "argv", ["lib.data", "digits", str(out)])
    data.main()
    text = out.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert json.loads(text) == dataset_summary(load_dataset("digits"))
    assert capsys.readouterr().out.count("\n") == 1 and [path.name for path in out.parent.iterdir()] == ["digits.json"]


def test_command_line_reports_an_error_without_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lib.data", "mnist", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="error: mnist: no address"):
        data.main()
    assert not (tmp_path / "out.json").exists()


def test_summary_counts():
    report = dataset_summary(load_dataset("digits", leave_out=(3,)))
    assert report["size"] == {"train": 940, "val": 250, "test": 500} and report["shape"] == [1, 8, 8]
    assert report["per_class"]["train"][3] == 0 and sum(report["per_class"]["train"]) == 940
    x = load_dataset("digits", leave_out=(3,)).train.x.double()
    assert report["pixels"] == pytest.approx({"mean": x.mean().item(), "std": x.std(correction=0).item()}, abs=1e-6)


# The real files


@pytest.mark.parametrize(
    ("dataset", "shape", "mean", "test_counts"),
    [
        ("mnist", (1, 28, 28), 0.1307, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
        ("fashion-mnist", (1, 28, 28), 0.2860, [1000] * 10),
        ("cifar10", (3, 32, 32), 0.4734, [1000] * 10),
    ],
)
def test_real_files(real_mirror, monkeypatch, dataset, shape, mean, test_counts):
    monkeypatch.setenv("DISTILL_DATA_MIRROR", str(real_mirror))
    ours = load_dataset(dataset, n_labels=1000)
    x, y, (train, val, test) = data.prepared_dataset(dataset)
    assert (len(train), len(val), len(test)) == data.SIZES[dataset]
    assert sorted(torch.cat([train, val, test]).tolist()) == list(range(len(y)))
    for split in (ours.train, ours.val, ours.test):
        assert split.x.shape[1:] == shape and split.x.min() == 0 and split.x.max() == 1
    assert counts(ours.train) == [100] * 10 and counts(ours.test) == test_counts
    expected = y[:-10_000].bincount() * 5_000 / (len(y) - 10_000)
    assert (y[val].bincount() - expected).abs().max() < 1.5
    assert ours.test.x.mean().item() == pytest.approx(mean, abs=0.005)
    assert torch.equal(ours.test.x[0], x[test[0]].float() / 255) and test[0] == len(y) - 10_000
    data.prepared_dataset.cache_clear()


def test_class_names_of_cifar10(real_mirror):
    meta = pickle.loads((real_mirror / data.BATCHES / "batches.meta").read_bytes(), encoding="utf-8")
    assert tuple(meta["label_names"]) == data.CLASSES["cifar10"]


def test_one_flipped_byte_in_a_real_file(real_mirror, tmp_path, monkeypatch):
    folder, name = tmp_path / "mirror" / "fashion-mnist", "t10k-labels-idx1-ubyte"
    folder.mkdir(parents=True)
    for path in (real_mirror / "fashion-mnist").glob("*.gz"):
        (folder / path.name).symlink_to(path)
    content = gzip.decompress((folder / f"{name}.gz").read_bytes())
    (folder / f"{name}.gz").unlink()
    (folder / f"{name}.gz").write_bytes(gzip.compress(flipped(content), compresslevel=1))
    monkeypatch.setenv("DISTILL_DATA_MIRROR", str(folder.parent))
    with pytest.raises(OSError, match=f"fashion-mnist: .*{name}.gz is corrupt"):
        load_dataset("fashion-mnist")
    assert not (data.RAW / "fashion-mnist" / name).exists()
