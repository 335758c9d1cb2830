"""Canvases by vLLM's sampler with our hook: those of `dam.canvas.rollout`, whatever shares a batch."""

import itertools
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("transformers.models.diffusion_gemma", reason="transformers has no DiffusionGemma")

from safetensors.torch import load_file

from dam.canvas import rollout
from dam.ctmc import Geometric, UniformCTMC
from dam.engines import EngineError, StaleWeights, VLLMCanvasEngine, served_parameters
from dam.models import as_denoiser
from tests.engines import sglang_interface, vllm_interface
from tests.engines.stubs import wheel_of
from tests.models.test_diffusion_gemma import CANVAS, PROCESS, VOCABULARY, small_model, tokens

WHEEL = wheel_of("vllm", vllm_interface.VERSION)
NO_WHEEL = pytest.mark.skipif(WHEEL is None, reason="no wheel of vLLM: DAM_ENGINE_WHEELS names no folder that has it")
STEPS, SLOTS = 4, 6


@NO_WHEEL
@pytest.mark.full
def test_the_wheel_is_as_recorded():
    recorded = vllm_interface.ROOT, vllm_interface.SIGNATURES, vllm_interface.LINES
    assert sglang_interface.differences(WHEEL, *recorded) == []


@pytest.fixture(scope="module", params=["recorded", pytest.param("wheel", marks=[pytest.mark.full, NO_WHEEL])])
def hook(request, tmp_path_factory):
    """dam.engines.vllm_canvas, on vLLM's classes as recorded or on those of its own file."""
    wheel = WHEEL if request.param == "wheel" else None
    before = set(sys.modules)
    finder = vllm_interface.install(wheel, tmp_path_factory.mktemp("vllm"))
    import dam.engines.vllm_canvas as module

    yield module
    sys.meta_path.remove(finder)
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "vllm" or name == "dam.engines.vllm_canvas":
            del sys.modules[name]


class LLM:
    """vLLM's, around a small DiffusionGemma: slots, prompts that come to an end, a sampler call each network call."""

    def __init__(self, hook, waits=()):
        from vllm.model_executor.models import diffusion_gemma

        self.model, self.waits, self.hook = small_model(seed=9), waits, hook
        states = diffusion_gemma.DiffusionGemmaRequestStates(SLOTS, CANVAS, VOCABULARY, 8, torch.device("cpu"), 16, 2)
        self.states, self.drafts = states, torch.zeros(SLOTS, CANVAS, dtype=torch.int64)
        own = types.SimpleNamespace(
            req_states=types.SimpleNamespace(draft_tokens=self.drafts),
            logprobs_mode="raw_logprobs",
            sampling_states=types.SimpleNamespace(add_request=lambda *_: None),
            logprob_token_ids_state=types.SimpleNamespace(add_request=lambda *_: None),
        )
        self.sampler = diffusion_gemma.DiffusionSampler(
            sampler=own,
            diffusion_config=types.SimpleNamespace(canvas_length=CANVAS),
            vocab_size=VOCABULARY,
            diffusion_states=states,
            t_min=0.4,
            t_max=0.8,
            entropy_bound=0.1,
            confidence_threshold=0.005,
            embed_weight=torch.zeros(VOCABULARY, 16),
            normalizer=torch.ones(()),
        )
        reload = lambda worker, weights_path: self.model.load_state_dict(  # noqa: E731
            load_file(f"{weights_path}/model.safetensors"), strict=False
        )
        self.worker = type("Worker", (hook.WorkerExtension,), {"reload_weights": reload})()

    def collective_rpc(self, method, args=()):
        return [getattr(self.worker, method)(*args)]

    def reset_prefix_cache(self):
        return True

    def generate(self, prompts, params):
        """The n-th begins `waits[n]` network calls after the first."""
        free, running, done = list(range(SLOTS)), {}, {}
        waits = dict(itertools.zip_longest(range(len(prompts)), self.waits, fillvalue=0))
        for call in range(100):
            if len(done) == len(prompts):
                break
            new = [n for n, wait in waits.items() if wait <= call and n not in running and n not in done]
            for n in new[: len(free)]:
                running[n] = free.pop()  # any order
                self.states.add_request(running[n])
                self.sampler.add_request(running[n], params[n])
                running[n] = running[n], True
            batch = sorted(running)
            output = self.sampler(*self._call(prompts, {n: running[n] for n in batch}))
            self._read(output, batch, running, done, free)
        return [types.SimpleNamespace(outputs=[done[n]]) for n in sorted(done)]

    def _call(self, prompts, running):
        """Logits of canvases, none of those whose prompt is gone through, and the batch."""
        slots = np.array([slot for slot, _ in running.values()])
        widths = [0 if is_new else int(self.states.canvas_width_np[slot]) for slot, is_new in running.values()]
        denoiser, logits = as_denoiser(self.model), [torch.zeros(0, VOCABULARY)]
        for n, width in zip(running, widths, strict=True):
            if width:
                with torch.no_grad():
                    prompt = torch.tensor([prompts[n]["prompt_token_ids"]])
                    canvas = self.drafts[running[n][0], :width][None]
                    logits.append(denoiser.head().logits(denoiser.conditioned(prompt).hidden_states(canvas))[0])
        lengths = np.array([width or 7 for width in widths])
        starts = np.concatenate(([0], np.cumsum(lengths)))
        return torch.cat(logits), types.SimpleNamespace(
            num_reqs=len(running),
            idx_mapping_np=slots,
            idx_mapping=torch.tensor(slots),
            cu_num_logits_np=np.concatenate(([0], np.cumsum(widths))),
            num_draft_tokens=sum(widths),
            query_start_loc_np=starts,
            query_start_loc=torch.tensor(starts),
            num_computed_prefill_tokens_np=np.zeros(len(slots), dtype=int),
            num_scheduled_tokens=lengths,
            prefill_len_np=np.zeros(len(slots), dtype=int),
        )

    def _read(self, output, batch, running, done, free):
        told, offset = output.logprobs_tensors, 0
        for place, n in enumerate(batch):
            slot, is_new = running[n]
            running[n] = slot, False
            count = int(output.num_sampled[place])
            if is_new or count == 0:
                assert is_new or count == 0
                continue
            assert told.cu_num_generated_tokens[place] == offset
            rows = [x[offset : offset + count] for x in told[:2]]
            width, offset = rows[0].shape[1], offset + count
            flat = types.SimpleNamespace(
                start_indices=list(range(0, count * width, width)),
                end_indices=list(range(width, (count + 1) * width, width)),
                token_ids=rows[0].flatten().tolist(),
                logprobs=rows[1].flatten().tolist(),
            )
            ids = output.sampled_token_ids[place, :count].tolist()
            done[n] = types.SimpleNamespace(token_ids=ids, logprobs=flat)
            free.append(running.pop(n)[0])


PROMPT = tokens(5, 9, seed=2)
MASK = torch.ones_like(PROMPT)
for row, pad in enumerate((0, 2, 5, 0, 1)):
    MASK[row, :pad] = 0
IDS = torch.tensor([4, -7, 2**61, 0, 1])
ARGUMENTS = {"steps": STEPS, "seed": 2**64 - 5, "row_ids": IDS, "attention_mask": MASK}


def engine_of(hook, folder, model, version=1, **more):
    engine = VLLMCanvasEngine(LLM(hook, **more), folder)
    engine.update(served_parameters(model), version)
    return engine


def assert_same(ours, theirs):
    assert torch.equal(ours.times, theirs.times) and torch.equal(ours.canvas, theirs.canvas)
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=0.0, atol=2e-4)  # sums of float32, of 5 positions


@pytest.mark.parametrize(("temperature", "waits"), [(0.7, (0, 2, 1, 5, 0)), (0.0, ())])
def test_draws_are_those_of_this_process_whoever_shares_a_batch(hook, tmp_path, temperature, waits):
    model = small_model()
    given = {**ARGUMENTS, "temperature": temperature, "canvas_length": CANVAS}
    engine = engine_of(hook, tmp_path, model, waits=waits)
    assert_same(engine.rollout(PROMPT, PROCESS, **given), rollout(as_denoiser(model), PROMPT, PROCESS, **given))
    # Its states are as vLLM's own leave them: no signal of the step before, and as many steps as were made.
    assert not getattr(engine._llm.states, "self_conditioning_embeds", torch.zeros(1)).any()


def test_a_narrower_canvas_is_drawn_as_it_is(hook, tmp_path):
    model = small_model()
    given = {**ARGUMENTS, "canvas_length": 3}
    assert_same(
        engine_of(hook, tmp_path, model).rollout(PROMPT, PROCESS, **given),
        rollout(as_denoiser(model), PROMPT, PROCESS, **given),
    )


def test_new_weights_are_used_and_others_refused(hook, tmp_path):
    model, given = small_model(), {**ARGUMENTS, "canvas_length": CANVAS}
    engine = engine_of(hook, tmp_path, model)
    before = engine.rollout(PROMPT, PROCESS, **given)
    with torch.no_grad():
        model.model.decoder.norm.weight.mul_(0.2)
    engine.update(served_parameters(model), 2)
    after = engine.rollout(PROMPT, PROCESS, **given)
    assert not torch.equal(before.canvas, after.canvas)
    assert_same(after, rollout(as_denoiser(model), PROMPT, PROCESS, **given))
    engine._llm.worker._dam_version = 1
    with pytest.raises(StaleWeights, match=r"have weights \{1\}, and 2 were sent last"):
        engine.rollout(PROMPT, PROCESS, **given)
    with pytest.raises(EngineError, match="no weights"):
        VLLMCanvasEngine(LLM(hook), tmp_path).rollout(PROMPT, PROCESS, **given)


def test_what_cannot_be_drawn_is_refused(hook, tmp_path):
    engine = engine_of(hook, tmp_path, small_model())
    given = {**ARGUMENTS, "canvas_length": CANVAS}
    for process, changes, message in (
        (PROCESS, {"steps": 9}, "9 steps are asked for, and the server makes at most 8"),
        (UniformCTMC(VOCABULARY + 1), {}, "the process has 41 values, and the server's model 40 tokens"),
        (UniformCTMC(VOCABULARY, Geometric(2e-4)), {}, "the schedule that UniformCTMC has"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.rollout(PROMPT, process, **{**given, **changes})


SPOILED = {
    "gave 4 tokens and 5 rows": lambda answer: answer.token_ids.pop(),
    "5 tokens and 0 rows of log-probabilities": lambda answer: setattr(answer, "logprobs", None),
    "ends in other tokens": lambda answer: answer.logprobs.token_ids.__setitem__(0, 1 + answer.token_ids[0]),
    "lacks log-probabilities": lambda answer: answer.logprobs.logprobs.__setitem__(3, float("nan")),
    "other canvases": lambda answer: answer.logprobs.token_ids.__setitem__(1, 1 + answer.logprobs.token_ids[1]),
}


def test_an_answer_that_is_none_is_an_error_that_says_what(hook, tmp_path):
    engine = engine_of(hook, tmp_path, small_model())
    generate = engine._llm.generate
    for message, spoil in SPOILED.items():

        def spoiled(*given, spoil=spoil):
            answers = generate(*given)
            spoil(answers[0].outputs[0])
            return answers

        engine._llm.generate = spoiled
        with pytest.raises(EngineError, match=message):
            engine.rollout(PROMPT, PROCESS, canvas_length=CANVAS, **ARGUMENTS)


def test_other_requests_in_a_batch_are_refused(hook, tmp_path):
    engine = engine_of(hook, tmp_path, small_model())
    generate = engine._llm.generate

    def with_another(prompts, params):
        params[1].extra_args = {k: v for k, v in params[1].extra_args.items() if not k.startswith("dam")}
        return generate(prompts, params)

    engine._llm.generate = with_another
    with pytest.raises(RuntimeError, match=r"requests of dam\.engines and others are in one batch"):
        engine.rollout(PROMPT, PROCESS, canvas_length=CANVAS, **ARGUMENTS)
