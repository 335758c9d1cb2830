"""Who may read what a run leaves."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from dam.files import usual_modes


@pytest.fixture
def umask():
    """Sets the umask, and back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077], ids=oct)
def test_weights_are_as_private_as_the_umask_says(tmp_path, umask, mask):
    """Those written inside, into a new folder or over others; not what was there, nor what is no file of weights."""
    folder, tensors = tmp_path / "run", {"x": torch.zeros(2)}
    umask(mask)
    with usual_modes(folder):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    assert mode(folder / "model.safetensors") == mode(folder / "config.json") == 0o666 & ~mask
    save_file(tensors, folder / "kept.safetensors")
    (folder / "kept.safetensors").chmod(0o600)
    (folder / "token.txt").touch(0o600)
    with usual_modes(folder):
        save_file(tensors, folder / "model.safetensors")
    modes = {path.name: mode(path) for path in folder.iterdir()}
    assert modes == {
        "model.safetensors": 0o666 & ~mask,
        "config.json": 0o666 & ~mask,
        "kept.safetensors": 0o600,
        "token.txt": 0o600,
    }


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)
