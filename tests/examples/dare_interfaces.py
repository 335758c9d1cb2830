"""What examples/dare takes of DARE, as its code has it at commit 83ae8a3 (verl 0.3.1.dev inside), for tests without it.

Names, arguments, shapes and what is returned; the code is ours. Where DARE's is more, it does more.
"""

import abc
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

RECIPE = Path(__file__).parents[2] / "examples" / "dare"


class Config(dict):
    """A configuration as omegaconf has it: items, `get` and attributes."""

    __getattr__ = dict.__getitem__


class DataProto:
    """verl.DataProto: tensors by name with one first dimension, arrays of objects of as many rows, and meta_info."""

    def __init__(self, batch=None, non_tensor_batch=None, meta_info=None):
        self.batch, self.non_tensor_batch, self.meta_info = batch, non_tensor_batch or {}, meta_info or {}
        assert len({len(value) for value in (*batch.values(), *self.non_tensor_batch.values())}) == 1

    @classmethod
    def from_dict(cls, tensors, non_tensors=None, meta_info=None):
        assert all(isinstance(value, torch.Tensor) for value in tensors.values())
        return cls(dict(tensors), non_tensors, meta_info)

    def __len__(self):
        return len(next(iter(self.batch.values())))

    def repeat(self, times):  # interleave=True
        tensors = {name: value.repeat_interleave(times, dim=0) for name, value in self.batch.items()}
        return DataProto(tensors, {n: np.repeat(v, times, axis=0) for n, v in self.non_tensor_batch.items()})

    def union(self, other):
        """Both; what both have must be the same."""
        for name in self.batch.keys() & other.batch.keys():
            assert torch.equal(self.batch[name], other.batch[name]), name
        for name in self.meta_info.keys() & other.meta_info.keys():
            assert self.meta_info[name] == other.meta_info[name], name
        meta_info = {**self.meta_info, **other.meta_info}
        return DataProto({**self.batch, **other.batch}, {**self.non_tensor_batch, **other.non_tensor_batch}, meta_info)

    def reorder(self, indices):
        self.batch = {name: value[indices] for name, value in self.batch.items()}
        self.non_tensor_batch = {name: value[indices.numpy()] for name, value in self.non_tensor_batch.items()}


class DataParallelPPOActor:
    """verl.workers.actor.DataParallelPPOActor, as far as a subclass goes by it."""

    def __init__(self, config, actor_module, actor_optimizer=None):
        self.config, self.actor_module, self.actor_optimizer = config, actor_module, actor_optimizer

    def _optimizer_step(self):
        norm = torch.nn.utils.clip_grad_norm_(self.actor_module.parameters(), max_norm=self.config.grad_clip)
        self.actor_optimizer.step()
        return norm


class BaseRollout(abc.ABC):
    """verl.workers.rollout.base.BaseRollout."""

    @abc.abstractmethod
    def generate_sequences(self, prompts): ...


def modules():
    """The modules by name, those of the recipe where `install.py` puts them."""
    given = {
        "verl": {"DataProto": DataProto},
        "verl.trainer": {},
        "verl.trainer.ppo": {},
        "verl.utils": {},
        "verl.utils.device": {"get_torch_device": lambda: torch.cpu},  # get_torch_device().current_device()
        "verl.workers": {},
        "verl.workers.actor": {"DataParallelPPOActor": DataParallelPPOActor},
        "verl.workers.rollout": {},
        "verl.workers.rollout.base": {"BaseRollout": BaseRollout},
    }
    made = {}
    for name, content in given.items():
        made[name] = types.ModuleType(name)
        vars(made[name]).update(content)
    return made


def recipe(monkeypatch):
    """The recipe's modules loss, actor and rollout, imported behind these interfaces."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    found = {}
    for file, name in (
        ("dam_loss", "verl.trainer.ppo.dam_loss"),
        ("dam_actor", "verl.workers.actor.dam_actor"),
        ("dam_rollout", "verl.workers.rollout.dam_rollout"),
    ):
        spec = importlib.util.spec_from_file_location(name, RECIPE / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        found[file.removeprefix("dam_")] = module
    return types.SimpleNamespace(**found)
