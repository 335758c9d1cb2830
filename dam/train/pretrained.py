"""Models and tokenizers by name or folder, adapters and folders that DAMTrainer saved among them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from dam.models.families import auto_class
from dam.train.releases import dtype_argument

CLASSES = ("AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, and how it is loaded.

    Args:
        name: a folder, a name on the hub, or an adapter (PEFT) of either kind, whose configuration names its model.
        auto_class: one of CLASSES; that of its family unless given (`dam.models.families.auto_class`).
        dtype: one of DTYPES, "auto" being the checkpoint's.
        trust_remote_code: runs code that comes with the model.
        attn_implementation: as transformers calls it: "sdpa", "eager", "flash_attention_2".
        revision: of a name on the hub.

    Raises:
        ValueError: an argument is none of these.
    """

    name: str
    auto_class: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.auto_class not in (None, *CLASSES):
            raise ValueError(f"the model's class must be one of {', '.join(CLASSES)}; got {self.auto_class!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")

    def _adapted(self) -> Source | None:
        """The model that this is an adapter of; None where it is none."""
        if find_adapter_config_file(self.name, revision=self.revision) is None:
            return None
        try:
            from peft import PeftConfig
        except ImportError as error:
            raise ImportError(
                f"{self.name} is an adapter, which needs peft: pip install 'discrete-adjoint-matching[peft]'"
            ) from error
        base = PeftConfig.from_pretrained(self.name, revision=self.revision).base_model_name_or_path
        if not base:
            raise ValueError(
                f"{self.name} is an adapter that does not say of which model: write base_model_name_or_path into its "
                "adapter_config.json"
            )
        return dataclasses.replace(self, name=str(base), revision=None)

    def config(self) -> Any:
        """The model's configuration; of an adapter its model's."""
        source = self._adapted() or self
        return AutoConfig.from_pretrained(
            source.name, trust_remote_code=source.trust_remote_code, revision=source.revision
        )

    def model(self, *, trainable: bool = False) -> Any:
        """The model in evaluation mode, with its adapter.

        Args:
            trainable: of the adapter, and nothing else.

        Raises:
            OSError, ValueError: there is none, or it cannot be loaded so.
        """
        base = self._adapted()
        if base is not None:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(base.model(), self.name, is_trainable=trainable, revision=self.revision)
            return adapted.eval()
        given: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
        if self.attn_implementation is not None:
            given["attn_implementation"] = self.attn_implementation
        dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        chosen = class_of(self.auto_class, self.config())
        return chosen.from_pretrained(self.name, **dtype_argument(dtype), **given).eval()

    def tokenizer(self) -> Any:
        """The tokenizer beside the model; of an adapter without one, its model's.

        Raises:
            OSError, ValueError: there is none.
        """
        base = self._adapted()
        if base is not None and os.path.isdir(self.name) and not has_tokenizer(self.name):
            return base.tokenizer()
        return AutoTokenizer.from_pretrained(
            self.name, trust_remote_code=self.trust_remote_code, revision=self.revision
        )


def has_tokenizer(folder: str) -> bool:
    """Whether a folder holds a tokenizer."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer_config.json", "tokenizer.json"))


def class_of(name: str | None, config: Any) -> Any:
    """The class of transformers that loads a model: the one named, or that of its family."""
    return getattr(transformers, name or auto_class(getattr(config, "model_type", None)))


def fingerprint(model: Any) -> str:
    """16 hexadecimal digits that tell one set of weights from another: of the first and last numbers of each tensor."""
    told = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        ends = torch.cat((flat[:16], flat[-16:])).double().cpu()
        told.update(f"{name} {list(value.shape)} ".encode() + ends.numpy().tobytes())
    return told.hexdigest()[:16]
