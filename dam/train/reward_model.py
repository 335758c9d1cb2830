"""Reward functions that are models: sequence classifiers with one output, given as such or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dam.train.rewards import RewardFunction
from dam.train.rows import is_conversation


class RewardModel:
    """The output of a sequence classifier for each prompt with its completion, as a reward function.

    A conversation goes through the chat template of the model's tokenizer, with the completion as its last message;
    a text is followed by its completion, and the tokenizer's special tokens are put around both.

    Args:
        model: of one output, num_labels=1; frozen, without dropout, and in its own precision, whatever the run's is.
        tokenizer: the model's; a padding token is set where it has none, its end of text.
        batch_size: completions per forward pass.
        chat_template_kwargs: passed to the tokenizer's apply_chat_template.

    Raises:
        TypeError, ValueError: it is no such model, or there is no tokenizer or token to pad with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        config = getattr(model, "config", None)
        if config is None:
            raise TypeError(
                f"a reward function that is a module must be a sequence classifier of transformers; "
                f"{type(model).__name__} has no config: call it in a function of your own"
            )
        path = str(getattr(config, "_name_or_path", ""))
        self.__name__ = path.rstrip("/").rpartition("/")[2] or type(model).__name__
        if config.num_labels != 1:
            raise ValueError(
                f"reward model {self.__name__} has {config.num_labels} outputs, of which none is known to be the "
                "reward: load it with num_labels=1, or call it in a function of your own"
            )
        if tokenizer is None:
            if not path:
                raise ValueError(
                    f"reward model {self.__name__} has no name to load its tokenizer by: pass reward_processing_classes"
                )
            tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    f"the tokenizer of reward model {self.__name__} has no token to pad with: set pad_token"
                )
            tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id  # by which classifiers find a sequence's last token
        self.model: nn.Module = model.eval().requires_grad_(False)
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._chat_template_kwargs = dict(chat_template_kwargs or {})

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rewards = [0.0] * len(texts)
        for chat in (False, True):
            places = [n for n, prompt in enumerate(prompts) if is_conversation(prompt) == chat]
            for start in range(0, len(places), self._batch_size):
                piece = places[start : start + self._batch_size]
                # A template has the special tokens in it.
                for n, reward in zip(piece, self._of([texts[n] for n in piece], special=not chat), strict=True):
                    rewards[n] = reward
        return rewards

    def _of(self, texts: list[str], *, special: bool) -> list[float]:
        device = next(self.model.parameters()).device
        inputs = self._tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=special
        ).to(device)
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            logits = self.model(**inputs).logits
        if logits.shape != (len(texts), 1):
            raise ValueError(f"its logits must be [{len(texts)}, 1]; got {list(logits.shape)}")
        return logits[:, 0].float().tolist()

    def _text(self, prompt: Any, completion: Any) -> str:
        if is_conversation(prompt):
            return self._tokenizer.apply_chat_template(
                [*prompt, *completion], tokenize=False, **self._chat_template_kwargs
            )
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise TypeError(
                f"a reward model reads text; got a prompt of type {type(prompt).__name__}: give prompts as text or "
                "conversations, or decode them in a function of your own"
            )
        return prompt + completion


def with_models(
    functions: Any,
    processing_classes: Any,
    *,
    reads_text: bool,
    batch_size: int,
    model_init_kwargs: Mapping[str, Any] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> list[RewardFunction]:
    """Reward functions, of which names and modules are made `RewardModel`s.

    Args:
        functions: one, or a list of them.
        processing_classes: the tokenizer of each that is a model, or of the only one; None loads it by the
            model's name.
        reads_text: whether completions are decoded.
        batch_size, chat_template_kwargs: of `RewardModel`.
        model_init_kwargs: of from_pretrained, for names.

    Raises:
        TypeError, ValueError: a model that does not fit, or not as many tokenizers as functions.
    """
    given = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    tokenizers = processing_classes if isinstance(processing_classes, (list, tuple)) else [processing_classes]
    if processing_classes is None:
        tokenizers = [None] * len(given)
    if len(tokenizers) != len(given):
        raise ValueError(
            f"reward_processing_classes must have one entry per reward function, {len(given)}; got {len(tokenizers)}"
        )
    made: list[RewardFunction] = []
    for function, tokenizer in zip(given, tokenizers, strict=True):
        if isinstance(function, str):
            function = AutoModelForSequenceClassification.from_pretrained(
                function, num_labels=1, **(model_init_kwargs or {})
            )
        if isinstance(function, nn.Module):
            if not reads_text:
                raise ValueError("a reward model reads text, but completions are token ids: pass processing_class")
            function = RewardModel(
                function, tokenizer, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs
            )
        made.append(function)
    return made


def move(functions: Sequence[RewardFunction], device: torch.device) -> None:
    """Puts the models among reward functions on a device."""
    for function in functions:
        if isinstance(function, RewardModel):
            function.model.to(device)
