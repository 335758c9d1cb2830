"""The model "dam" for EleutherAI's lm-eval, 0.4.9 and later: masked diffusion language models by dam's decoding.

    python -m dam.lm_eval --model dam --model_args pretrained=FOLDER,steps=128,block_length=32 --tasks gsm8k

takes all of lm-eval's options; in a program of your own `import dam.lm_eval` registers the model.

`generate_until` fills in a completion of max_gen_toks tokens, or max_completion_length where a task does not say, and
cuts it at the strings of `until`.

`loglikelihood` is an estimate from below: the mean, over `orders` random orders of unmasking, of the exact log p(x |
order) of the continuation, one position a network call unless `steps` says fewer (`dam.rollout.outcome_log_prob`). In
expectation that is the bound of masked diffusion models, which LLaDA's evaluation estimates at random numbers of masks;
here each order counts every position once, so that a continuation of one token is exact, and one of L tokens takes
orders * L calls. `is_greedy` says whether filling in by confidence at temperature 0 gives the continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(f"dam.lm_eval needs {error.name}: pip install 'discrete-adjoint-matching[lm-eval]'") from error

from dam.commands.completing import Completer, Law
from dam.commands.generate import loaded
from dam.decoding import Decoding
from dam.train.pretrained import Source

# Of a task's generation_kwargs; what else there is says something that is not done here, and is refused.
_KNOWN = ("until", "max_gen_toks", "max_tokens", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p")


@register_model("dam")
class DAM(TemplateLM):
    """A model folder or name, as `dam eval` takes it.

    Args:
        pretrained: the model, or an adapter.
        orders: of unmasking that a log-likelihood is a mean over.
        max_completion_length: of completions, where a task does not say.
        batch_size: sequences at once.
        model_class, dtype, trust_remote_code, attn, revision, device: of loading (`dam generate --help`).
        steps, block_length, order, temperature, threshold, top_k, top_p, guidance, seed: of decoding. What a task says
            of temperature, top_k and top_p comes first.
        mask_token_id, stop_token_ids: where the tokenizer does not have them; several of the latter as "1;2".
        max_batch_size: is not used.

    Raises:
        ValueError, OSError: the model cannot be had so.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        orders: int = 8,
        max_completion_length: int = 256,
        batch_size: int | str = 8,
        model_class: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        attn: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        steps: int | None = None,
        block_length: int | None = None,
        order: str = "confidence",
        temperature: float = 0.0,
        threshold: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 0.0,
        seed: int = 0,
        mask_token_id: int | None = None,
        stop_token_ids: str | int | Sequence[int] | None = None,
        max_batch_size: Any = None,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number, at least 1; got {batch_size!r}")
        if orders < 1:
            raise ValueError(f"orders must be at least 1; got {orders}")
        self._source = Source(pretrained, model_class, dtype, trust_remote_code, attn, revision)
        self.model, self.tokenizer = loaded(self._source, device)
        self._device = next(self.model.parameters()).device
        self._batch_size, self._orders = int(batch_size), orders
        decoding = Decoding(order, threshold, temperature, top_k, top_p, guidance)
        if isinstance(stop_token_ids, (str, int)):
            stop_token_ids = [int(token) for token in str(stop_token_ids).split(";")]
        self._law = Law(
            seed=seed,
            max_completion_length=max_completion_length,
            steps=steps,
            block_length=block_length,
            decoding=decoding,
            mask_token_id=mask_token_id,
            stop_token_ids=stop_token_ids,
        )
        self._completer = Completer(self.model, self.tokenizer, self._law)

    # Text

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token, with which an empty context begins")
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return self._source.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Without what a tokenizer puts behind a text, and with what it puts in front once, if at all."""
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        if add_special_tokens is False:
            return ids
        front = self._completer.front()
        return ids if ids[: len(front)] == front else [*front, *ids]

    # What lm-eval asks

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = [""] * len(requests)
        by_law: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            by_law.setdefault(self._asked(request.args[1]), []).append(number)
        for (length, temperature, top_k, top_p), numbers in by_law.items():
            completer = self._completer.of(length, temperature=temperature, top_k=top_k, top_p=top_p)
            for part in _parts(numbers, self._batch_size):
                jobs = [(n, 0, {"prompt": self.tok_encode(requests[n].args[0])}) for n in part]
                for n, made in zip(part, completer.complete(jobs), strict=True):
                    texts[n] = cut(made.completion, _until(requests[n].args[1]))
                    self.cache_hook.add_partial("generate_until", requests[n].args, texts[n])
        return texts

    def _asked(self, options: dict[str, Any]) -> tuple[Any, ...]:
        """Length and law of a request.

        Raises:
            ValueError: it asks for something that is not done here.
        """
        unknown = [name for name in options if name not in _KNOWN]
        if unknown:
            raise ValueError(
                f"generation_kwargs {', '.join(unknown)} are not known here; known are {', '.join(_KNOWN)}"
            )
        decoding = self._law.decoding
        lengths = [options[name] for name in ("max_gen_toks", "max_tokens", "max_new_tokens") if options.get(name)]
        length = int(lengths[0]) if lengths else self._law.max_completion_length
        if options.get("do_sample") is False:
            return length, 0.0, None, None
        given = (options.get(name) for name in ("temperature", "top_k", "top_p"))
        own = (decoding.temperature, decoding.top_k, decoding.top_p)
        return (length, *(mine if asked is None else asked for asked, mine in zip(given, own, strict=True)))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        for request in requests:
            if not request[2]:
                raise ValueError(f"there is nothing to score: {request[0]!r} has no token in its continuation")
        found: list[tuple[float, bool]] = []
        for part in _parts(range(len(requests)), self._batch_size):
            pairs = [(n, requests[n][1], requests[n][2]) for n in part]
            values, greedy = self._completer.log_probs(pairs, self._orders)
            for n, result in zip(part, zip(values.mean(dim=1).tolist(), greedy.tolist(), strict=True), strict=True):
                found.append(result)
                self.cache_hook.add_partial("loglikelihood", requests[n][0], result)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of texts as wholes, behind an end-of-text token; one that is longer than the model takes is refused."""
        wholes = [
            (("", request.args[0]), [self.prefix_token_id], self.tok_encode(request.args[0], add_special_tokens=False))
            for request in requests
        ]
        return [value for value, _ in self._loglikelihood_tokens(wholes)]


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _until(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def cut(text: str, until: Sequence[str]) -> str:
    """Text up to the first of the strings that end it."""
    ends = [text.find(end) for end in until if end and end in text]
    return text[: min(ends)] if ends else text


if __name__ == "__main__":
    # Not this module, which runs as __main__, is what others import.
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
