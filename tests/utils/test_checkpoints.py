"""Files from which interrupted work goes on are whole, or set aside by name."""

import random

import pytest
import torch
from torch import nn

from lib.utils.checkpoints import load_checkpoint, remove_checkpoints, save_checkpoint, set_aside

CONTENT = {"a": torch.arange(9), "b": [1.5, None, "text", {"c": (1, 2)}], "net": nn.Linear(2, 2).state_dict()}


def test_what_is_saved_is_loaded_by_torch_too(tmp_path, capsys):
    file = tmp_path / "a.pt"
    save_checkpoint(file, CONTENT)
    for saved in (load_checkpoint(file), torch.load(file, weights_only=True)):
        assert saved is not None and torch.equal(saved["a"], CONTENT["a"]) and saved["b"] == CONTENT["b"]
    assert load_checkpoint(tmp_path / "none.pt") is None and capsys.readouterr().err == ""


def test_fault_43_every_flipped_bit_and_every_cut_is_noticed(tmp_path, capsys):
    file, rng = tmp_path / "a.pt", random.Random(0)
    save_checkpoint(file, CONTENT)
    content = file.read_bytes()
    for _ in range(200):
        place = rng.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        for bad in (bytes(changed), content[:place], content + b"x"):
            file.write_bytes(bad)
            assert load_checkpoint(file) is None and not file.exists()
            assert (tmp_path / "a.pt.broken").read_bytes() == bad
            assert capsys.readouterr().err.startswith(f"{file} was renamed to a.pt.broken, since ")


def test_a_folder_is_set_aside_in_place_of_an_earlier_one(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "net").mkdir()
        (tmp_path / "net" / "w").write_text(text)
        set_aside(tmp_path / "net", "broken", "it was changed")
    assert (tmp_path / "net.broken" / "w").read_text() == "second" and not (tmp_path / "net").exists()
    save_checkpoint(tmp_path / "a.pt", {})
    (tmp_path / "stays.json").touch()
    remove_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stays.json"]


def test_only_tensors_numbers_and_text_are_unpickled(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"code": print})
    with pytest.raises(Exception, match="Weights only"):
        load_checkpoint(tmp_path / "a.pt")
