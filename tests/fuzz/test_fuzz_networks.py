"""Random edits of a folder of networks: the same purified image as before, or a refusal that names the file."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lib import purify
from tests.fuzz.common import check_refusal, examples

PURIFIERS = {"cd-1": "cd", "pd-1": "pd-1", "ddim-2": "teacher"}
FILES = ("config.json", "facts.json", "card.json", "diffusion_pytorch_model.safetensors", "../recipe.json")
SCHEDULER = {"beta_schedule": "linear", "prediction_type": "v_prediction", "num_train_timesteps": 1000}
X = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 2000), st.floats(), st.sampled_from(["v", "x0", "99", "linear", ""])
)


@pytest.fixture(scope="module")
def outputs(models):
    return {name: purify.purify(purify.load_purifier(models, name), X, progress=False) for name in PURIFIERS}


def edit_file(folder, data):
    """Flips a bit, cuts a file off, or changes an entry of a JSON file."""
    path = folder / data.draw(st.sampled_from(FILES))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "entry"]))
    if kind == "entry" and path.suffix == ".json":
        settings = json.loads(content)
        key = data.draw(st.sampled_from([*sorted(settings), "more"]))
        path.write_text(json.dumps(settings | {key: data.draw(VALUES)}))
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)


def exchange_folders(folder, data):
    """Puts another network in the folder's place."""
    other = folder.parent / data.draw(st.sampled_from(["teacher", "sampler", "cd", "pd-2"]))
    copy = shutil.copytree(other, folder.parent / "copy")
    shutil.rmtree(folder)
    copy.rename(folder)


def add_scheduler(folder, data):
    """Puts a scheduler's configuration into the folder."""
    key = data.draw(st.sampled_from([*SCHEDULER, "beta_end", "clip_sample"]))
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | {key: data.draw(VALUES)}))


def change_weights(folder, data):
    """Changes dtype or size of the weights, or of a foreign network's, which has no card."""
    path = folder / "diffusion_pytorch_model.safetensors"
    change = data.draw(
        st.sampled_from([lambda v: v.int(), lambda v: v * 1e30, lambda v: v * float("nan"), lambda v: v[:1].clone()])
    )
    save_file({k: change(v) for k, v in load_file(path).items()}, path)
    if data.draw(st.booleans()):
        (folder / "card.json").unlink()
        (folder / "facts.json").unlink()


@examples(40)
@given(data=st.data())
def test_an_edited_folder_gives_the_same_images_or_a_refusal(models, outputs, tmp_path_factory, data):
    work = tmp_path_factory.mktemp("fuzz") / "work"
    shutil.copytree(models, work)
    name = data.draw(st.sampled_from(sorted(PURIFIERS)))
    change = data.draw(st.sampled_from([edit_file, edit_file, exchange_folders, add_scheduler, change_weights]))
    change(work / PURIFIERS[name], data)
    try:
        result = purify.purify(purify.load_purifier(work, name), X, progress=False)
    except (ValueError, FileNotFoundError) as error:
        check_refusal(error)
        assert str(work.name) in str(error), error
    else:
        assert torch.equal(result, outputs[name])
    finally:
        shutil.rmtree(work.parent)
