"""Families of diffusion language models: the law that each has by its own code is the law that dam samples and trains.

Of those whose code is not in transformers on stand-ins (tests/models/standins).
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from dam.ctmc import MaskedCTMC
from dam.decoding import Decoding
from dam.models import Blocks, MaskedLM, Tabular, as_denoiser, blocks_of, families, register
from dam.rollout import log_prob_over_orders, rollout
from dam.train import DAMConfig, DAMTrainer
from tests.architectures import QWEN, of_transformers, past_masks, small_sizes
from tests.covering import full
from tests.models import standins
from tests.models.standins import a2d, dream, llada, llada2, sdar
from tests.models.standins.trunk import HEADS, MASK, PAD, SIZE, VOCABULARY, filled_in

PROCESS = MaskedCTMC(mask_token=MASK)


@dataclasses.dataclass
class Family:
    """A model, how its own code gives logits of tokens at their positions, how it generates, and its blocks."""

    make: Callable[[], nn.Module]
    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    generate: Callable[[Any, torch.Tensor], torch.Tensor]
    blocks: Blocks | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def model(self, seed=0):
        torch.manual_seed(seed)
        return self.make().eval()

    def denoiser(self, model, **more):
        return as_denoiser(model, **self.options, **more)


def in_place(model, tokens):
    return model(input_ids=tokens).logits


def one_by_one(model, prompt, gen_length=8):
    """The likeliest token of a call, anywhere."""
    x = nn.functional.pad(prompt, (0, gen_length), value=MASK)
    for _ in range(gen_length):
        x = filled_in(x, in_place(model, x), x == MASK, 1)
    return x


def by_blocks(mask, **changes):
    """Logits of whole blocks from position 0, by the mask that a family's generation builds."""

    def logits(model, tokens):
        batch, length = tokens.shape
        block_length = changes["block_length"]
        whole = nn.functional.pad(tokens, (0, -length % block_length), value=MASK)
        built = mask(whole.shape[1], block_length)
        built = built.expand(batch, *built.shape[1:])
        built = built[:, None] if built.dim() == 3 else built
        built = built[..., :length, :length]
        return model(tokens, attention_mask=built, position_ids=torch.arange(length).expand(batch, -1)).logits

    return logits


def from_the_end(model, tokens, block_length=4):
    batch, length = tokens.shape
    block = (torch.arange(length) - length) // block_length
    seen = torch.where(block[None, :] <= block[:, None], 0.0, torch.finfo(torch.float32).min)
    return model(tokens, attention_mask=seen.expand(batch, 1, -1, -1)).logits


def transformers_model(cls, config, **changes):
    sizes = {**small_sizes(VOCABULARY), "pad_token_id": PAD, "initializer_range": 0.3, "max_position_embeddings": 64}
    sizes.update(changes)
    return lambda: of_transformers(cls)(of_transformers(config)(**sizes))


def llada_model(**config):
    def make():
        model = standins.LLaDAModelLM(llada.LLaDAConfig(**config))
        if config.get("scale_logits") and not config.get("weight_tying"):
            model.get_output_embeddings().weight.data *= 4.0  # what is scaled is large, and not only nearly uniform
        return model

    return make


def qwen_logits(model, tokens):
    seen = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
    return model(tokens, attention_mask=past_masks(seen)).logits


def qwen_generate(model, prompt, gen_length=8):
    x = nn.functional.pad(prompt, (0, gen_length), value=MASK)
    for _ in range(gen_length):
        x = filled_in(x, qwen_logits(model, x), x == MASK, 1)
    return x


BERT_LIKE = {"cls_token_id": None, "sep_token_id": None}
qwen_model = transformers_model(f"{QWEN}ForCausalLM", f"{QWEN}Config", num_key_value_heads=1, head_dim=SIZE // HEADS)
FAMILIES = {
    "RoBERTa": Family(transformers_model(RobertaForMaskedLM, RobertaConfig), in_place, one_by_one),
    "ModernBERT": Family(
        transformers_model(ModernBertForMaskedLM, ModernBertConfig, **BERT_LIKE), in_place, one_by_one
    ),
    "EuroBERT": Family(transformers_model("EuroBertForMaskedLM", "EuroBertConfig"), in_place, one_by_one),
    "ESM": Family(
        transformers_model(EsmForMaskedLM, EsmConfig, position_embedding_type="rotary", mask_token_id=MASK),
        in_place,
        one_by_one,
    ),
    "Qwen": Family(
        qwen_model,
        qwen_logits,
        qwen_generate,
        options={"attention": "full"},
    ),
    "LLaDA": Family(llada_model(), in_place, one_by_one),
    "LLaDA scaled": Family(llada_model(scale_logits=True), in_place, one_by_one),
    "LLaDA tied": Family(llada_model(weight_tying=True), in_place, one_by_one),
    "LLaDA tied and scaled": Family(llada_model(weight_tying=True, scale_logits=True), in_place, one_by_one),
    "LLaDA-MoE": Family(lambda: standins.LLaDAMoEModelLM(standins.lladamoe.LLaDAMoEConfig()), in_place, one_by_one),
    "Dream": Family(
        lambda: standins.DreamModel(dream.DreamConfig()),
        lambda model, tokens: dream.shifted(in_place(model, tokens)),
        dream.generate,
    ),
    "LLaDA 2": Family(
        lambda: standins.LLaDA2MoeModelLM(llada2.LLaDA2MoeConfig()),
        by_blocks(llada2.block_mask, block_length=32),
        llada2.generate,
        Blocks(32, "sequence"),
    ),
    "LLaDA 2 by 4": Family(
        lambda: standins.LLaDA2MoeModelLM(llada2.LLaDA2MoeConfig()),
        by_blocks(llada2.block_mask, block_length=4),
        lambda model, prompt, **sizes: llada2.generate(model, prompt, block_length=4, **sizes),
        Blocks(4, "sequence"),
        {"block_length": 4},
    ),
    "SDAR": Family(
        lambda: standins.SDARForCausalLM(sdar.SDARConfig()),
        by_blocks(sdar.block_mask, block_length=4),
        sdar.generate,
        Blocks(4, "sequence"),
    ),
    "SDAR by 8": Family(
        lambda: standins.SDARForCausalLM(sdar.SDARConfig(block_size=8)),
        by_blocks(sdar.block_mask, block_length=8),
        lambda model, prompt, **sizes: sdar.generate(model, prompt, block_length=8, **sizes),
        Blocks(8, "sequence"),
    ),
    "A2D": Family(lambda: standins.A2DLMHeadModel(a2d.A2DConfig()), in_place, one_by_one),
    "A2D by 4": Family(
        lambda: standins.A2DLMHeadModel(a2d.A2DConfig()),
        from_the_end,
        a2d.generate,
        Blocks(4, "completion"),
        {"block_length": 4},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def tokens_of(rows, length, seed=1):
    tokens = torch.randint(PAD, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, ::3] = MASK
    return tokens


@torch.no_grad()
def log_probs(denoiser, tokens, attention_mask=None):
    return denoiser.head().logits(denoiser.hidden_states(tokens, attention_mask)).log_softmax(dim=-1)


def padded(rows):
    """Rows of tokens [L_i] padded on the left: tokens and attention mask."""
    length = max(len(row) for row in rows)
    missing = [length - len(row) for row in rows]
    tokens = torch.stack([nn.functional.pad(row, (n, 0), value=PAD) for row, n in zip(rows, missing, strict=True)])
    return tokens, (torch.arange(length) >= torch.tensor(missing)[:, None]).long()


@torch.no_grad()
def test_log_probabilities_are_the_model_s_own(family):
    model, tokens = family.model(), tokens_of(3, 13)
    expected = family.logits(model, tokens).log_softmax(dim=-1)
    for mask in (None, torch.ones_like(tokens)):
        # The same numbers in float32, summed in another order: of logits up to 20.
        torch.testing.assert_close(log_probs(family.denoiser(model), tokens, mask), expected, rtol=0, atol=1e-4)


def test_a_row_alone_is_the_row_in_a_batch_padded_on_the_left(family):
    denoiser = family.denoiser(family.model())
    rows = [tokens_of(1, length, seed=length)[0] for length in (13, 6, 11, 1)]
    together = log_probs(denoiser, *padded(rows))
    for row, found in zip(rows, together, strict=True):
        # Rotations by other angles, in float32.
        torch.testing.assert_close(found[len(found) - len(row) :], log_probs(denoiser, row[None])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen", "Dream", "LLaDA 2", "SDAR", "A2D by 4"])
def test_positions_that_are_handed_in_do_not_count_padding(name):
    """Rotations tell only how far apart two positions are, but their scaling may go by how far they reach."""
    family, given = FAMILIES[name], []
    model = family.model()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get("position_ids")), with_kwargs=True
    )
    denoiser = family.denoiser(model)
    tokens, mask = padded([tokens_of(1, length, seed=length)[0] for length in (6, 4)])
    denoiser.hidden_states(tokens, mask)
    assert given[-1].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]


def test_blocks_are_the_family_s_own(family):
    """What is behind a position's block changes nothing there, and what is in it does."""
    denoiser = family.denoiser(family.model())
    assert blocks_of(denoiser) == family.blocks
    length = 38  # no whole number of blocks
    tokens = tokens_of(1, length)
    before = log_probs(denoiser, tokens)[0]
    number = torch.zeros(length) if family.blocks is None else family.blocks.numbers(tokens)[0]
    for changed in (0, 7, 8, 31, 33, 37):
        other = tokens.clone()
        other[0, changed] = (tokens[0, changed] + 1) % PAD
        moved = (log_probs(denoiser, other)[0] - before).abs().amax(dim=1) > 1e-4
        assert not moved[number < number[changed]].any()
        if family.blocks is not None or "attention" in family.options:
            assert moved[number >= number[changed]].all()
        assert moved[number == number[changed]].any()


@pytest.mark.parametrize("prompt_length", [1, 6, 8])
def test_a_greedy_rollout_is_the_family_s_own_generation(family, prompt_length):
    model = family.model()
    whole = 1 if family.blocks is None else family.blocks.length
    start = 0 if family.blocks is None or family.blocks.origin == "completion" else prompt_length
    gen_length = -(-(start + 8) // whole) * whole - start  # to the end of a block, where they agree
    prompt = tokens_of(1, prompt_length)
    prompt[prompt == MASK] = 0
    tokens = nn.functional.pad(prompt, (0, gen_length), value=MASK)
    found = rollout(family.denoiser(model), tokens, PROCESS, order="confidence", temperature=0.0, seed=0)
    assert found.network_calls == gen_length
    assert found.final.tolist() == family.generate(model, prompt, gen_length=gen_length).tolist()
    # And with a longer one in the batch.
    longer = nn.functional.pad(tokens_of(1, prompt_length + 3).clamp(max=PAD - 1), (0, gen_length), value=MASK)
    both, mask = padded([tokens[0], longer[0]])
    found = rollout(
        family.denoiser(model), both, PROCESS, attention_mask=mask, order="confidence", temperature=0.0, seed=0
    )
    assert found.final[0, 3:].tolist() == family.generate(model, prompt, gen_length=gen_length)[0].tolist()


def lively(model, scale=10.0):
    """Weights so large that predictions are not of one or two tokens, whatever the prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() == 2 else 1.0)
    return model


def completions_of_8(*lengths):
    """Prompts padded on the left, and sequences of them and 8 masks, each with its attention mask."""
    prompts, mask = padded([tokens_of(1, length, seed=length)[0].clamp(max=PAD - 1) for length in lengths])
    return prompts, mask, nn.functional.pad(prompts, (0, 8), value=MASK), nn.functional.pad(mask, (0, 8), value=1)


@pytest.mark.parametrize(("steps", "block_length"), [(8, 8), (8, 4), (4, 8), (5, 8), (3, 8), (6, 4), (2, 4)])
def test_llada_generates_with_steps_and_blocks(steps, block_length):
    """Several positions a call, where they do not divide a block too."""
    model = lively(FAMILIES["LLaDA"].model())
    prompts, mask, tokens, seen = completions_of_8(6, 4, 5)
    expected = llada.generate(model, prompts, mask, steps=steps, block_length=block_length)
    options = {"attention_mask": seen, "steps": steps, "block_length": block_length}
    greedy = Decoding(order="confidence", temperature=0.0)
    found = rollout(as_denoiser(model), tokens, PROCESS, decoding=greedy, seed=0, **options)
    assert found.network_calls == steps
    assert found.final.tolist() == expected.tolist()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_llada_generates_with_guidance(scale):
    """Padding is not behind mask tokens, which it hides anyway."""
    model = lively(FAMILIES["LLaDA"].model())
    prompts, mask, tokens, seen = completions_of_8(6, 4, 5)
    expected = llada.generate(model, prompts, mask, steps=4, cfg_scale=scale)
    decoding = Decoding(order="confidence", temperature=0.0, guidance=scale)
    options = {"attention_mask": seen, "steps": 4, "block_length": 4}
    found = rollout(as_denoiser(model), tokens, PROCESS, decoding=decoding, seed=0, **options)
    assert found.final.tolist() == expected.tolist()
    assert expected.tolist() != llada.generate(model, prompts, mask, steps=4).tolist()


@pytest.mark.parametrize(
    ("alg", "order"), [("maskgit_plus", "confidence"), ("entropy", "entropy"), ("topk_margin", "margin")]
)
@pytest.mark.parametrize("law", [{}, {"top_k": 4}, {"top_p": 0.97}], ids=str)
def test_dream_generates_from_prompts_padded_on_the_left(alg, order, law):
    model = lively(FAMILIES["Dream"].model(), 4.0)  # no two positions equal, as those that have one token left are
    prompts, mask, tokens, seen = completions_of_8(6, 4, 5)
    decoding = Decoding(order=order, temperature=0.0, **law)
    found = rollout(as_denoiser(model), tokens, PROCESS, attention_mask=seen, decoding=decoding, seed=0)
    assert found.final.tolist() == dream.generate(model, prompts, mask, alg=alg, **law).tolist()


def lora_on(model, **more):
    """On every linear layer below the last one."""
    peft = pytest.importorskip("peft", reason="needs the package peft")
    last = model.get_output_embeddings()
    targets = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not last]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **more)).eval()


def test_the_base_of_an_adapter_is_the_model_without_it(family):
    model, tokens = family.model(), tokens_of(2, 9)
    expected = log_probs(family.denoiser(model), tokens)
    adapted = lora_on(copy.deepcopy(model), init_lora_weights=False)
    with torch.no_grad(), adapted.disable_adapter():
        own = family.logits(adapted.get_base_model(), tokens).log_softmax(dim=-1)
    torch.testing.assert_close(log_probs(family.denoiser(adapted, adapter=False), tokens), own, rtol=0, atol=1e-4)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        on = family.logits(adapted.get_base_model(), tokens).log_softmax(dim=-1)
    torch.testing.assert_close(log_probs(family.denoiser(adapted), tokens), on, rtol=0, atol=1e-4)
    assert not torch.allclose(on, own, atol=1e-2)


def low(completion_ids, **_):
    return [sum(token < 9 for token in ids) / len(ids) for ids in completion_ids]


def config_for(output, **changes):
    values = {
        "beta": 0.05,
        "num_generations": 128,
        "per_device_train_batch_size": 4 * 128,
        "per_device_eval_batch_size": 64,
        "num_iterations": 1,
        "replay_size": 4,
        "replay_batch_size": 4,
        "max_steps": 5,
        "max_completion_length": 6,
        "mask_token_id": MASK,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "eval_temperature": 1.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DAMConfig(output_dir=str(output), **{**values, **changes})


# Trained by the code of another family, or of the same one with other settings; what is their own is tested above.
TWINS = {"EuroBERT", "LLaDA scaled", "LLaDA tied", "LLaDA tied and scaled", "LLaDA 2", "SDAR", "A2D"}
PROMPTS = [{"prompt": [1 + n % 7] * (2 + n % 3)} for n in range(64)]  # of several lengths, so padded


def rewarded(denoiser):
    """Probability of tokens that are rewarded, at the first call of each prompt."""
    rows = [torch.tensor(row["prompt"] + [MASK] * 6) for row in PROMPTS]
    return float(log_probs(denoiser, *padded(rows))[:, -6:, :9].exp().sum(dim=-1).mean())


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        *(full(name, False) if name in TWINS else (name, False) for name in FAMILIES),
        full("LLaDA tied", True),
        ("Dream", True),
        full("SDAR", True),
    ],
)
def test_five_steps_raise_a_reward(name, adapter, tmp_path):
    """And the comparison with the model's own logits at the start of the run passes."""
    family = FAMILIES[name]
    model = lora_on(family.model()) if adapter else family.model()
    config = config_for(tmp_path, learning_rate=0.05 if adapter else 0.015)
    trainer = DAMTrainer(model, low, config, PROMPTS[:8], denoiser=family.denoiser)
    before = rewarded(family.denoiser(model.eval()))
    trainer.train()
    groups = trainer.progress.replay.batch(torch.arange(4))
    # Trained at the states of paths, where they have blocks.
    assert bool(trainer._of_exact_chain(groups["states"]).any()) == (family.blocks is None)
    kl = [entry["kl_path"] for entry in trainer.state.log_history if "kl_path" in entry]
    assert abs(kl[0]) < 1e-5  # nothing is trained yet: the sum of six differences of equal numbers in float32
    after = rewarded(family.denoiser(model.eval()))
    # With a reward of zero it changes by 0.05, the standard deviation over families.
    assert after > before + 0.09


def test_rows_padded_on_the_left_are_refused_where_positions_are_absolute(tmp_path):
    model = transformers_model(BertForMaskedLM, BertConfig)().eval()
    rows = [tokens_of(1, length, seed=length)[0] for length in (13, 6)]
    tokens, mask = padded(rows)
    message = "BertForMaskedLM predicts other tokens for a row that is padded on the left .* sequences of one length"
    with pytest.raises(ValueError, match=message):
        as_denoiser(model).hidden_states(tokens, mask)
    with pytest.raises(ValueError, match=message):
        rollout(as_denoiser(model), tokens, PROCESS, attention_mask=mask, seed=0)
    as_denoiser(model).hidden_states(tokens[:1], mask[:1])
    # Before the first step, where it is seen that some will be.
    worked = []

    def reward(completion_ids, **_):
        worked.append(1)
        return low(completion_ids)

    given = [{"input_ids": [1, MASK, MASK]}, {"input_ids": [1, MASK]}]
    changes = {"per_device_train_batch_size": 128, "max_steps": 1}
    with pytest.raises(ValueError, match=message):
        DAMTrainer(model, reward, config_for(tmp_path, **changes), given).train()
    assert not worked
    DAMTrainer(model, reward, config_for(tmp_path, **changes), given[:1] * 2).train()
    assert worked


def test_a_model_that_does_not_heed_its_mask_is_refused_padded_rows():
    model = llada_model(heeds_mask=False)().eval()
    tokens, mask = padded([tokens_of(1, length, seed=length)[0] for length in (13, 6)])
    with pytest.raises(ValueError, match="LLaDAModelLM predicts other tokens for a row that is padded on the left"):
        as_denoiser(model).hidden_states(tokens, mask)


def test_padding_is_tried_without_dropout_and_the_model_left_as_it_was():
    torch.manual_seed(0)
    changes = {"attention_dropout": 0.5, "embedding_dropout": 0.5, "mlp_dropout": 0.5}
    model = transformers_model(ModernBertForMaskedLM, ModernBertConfig, **BERT_LIKE, **changes)().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokens, mask = padded([tokens_of(1, length, seed=length)[0] for length in (13, 6)])
    as_denoiser(model).hidden_states(tokens, mask)
    assert [module.training for module in model.modules()] == modes
    assert not all(modes)
    assert any(modes)


@pytest.mark.parametrize("name", ["LLaDA 2 by 4", "SDAR", "A2D by 4"])
def test_rollouts_fill_the_blocks_of_the_attention(name):
    family = FAMILIES[name]
    denoiser, base = family.denoiser(family.model()), family.denoiser(family.model(seed=1))
    rows = [torch.cat((tokens_of(1, n, seed=n)[0].clamp(max=PAD - 1), torch.full((9,), MASK))) for n in (6, 3, 4)]
    tokens, mask = padded(rows)
    options = {"attention_mask": mask, "seed": 3}
    paths = rollout(denoiser, tokens, PROCESS, base=base, **options)
    block = family.blocks.numbers(tokens, mask).gather(1, paths.position)
    assert (block.diff(dim=1) >= 0).all()
    for row, (count, prompt) in enumerate(zip(block, (6, 3, 4), strict=True)):
        sizes = count.unique_consecutive(return_counts=True)[1].tolist()
        first = 1 if family.blocks.origin == "completion" else 4 - prompt % 4  # what the prompt leaves of its block
        assert sizes[0] == first, (row, sizes)
        assert all(size == 4 for size in sizes[1:-1])
    # A call ends with its block.
    few = rollout(denoiser, tokens, PROCESS, steps=2, **options)
    block = family.blocks.numbers(tokens, mask).gather(1, few.position)
    for row in range(3):
        for call in range(few.network_calls):
            assert len(block[row][few.call[row] == call].unique()) <= 1
    # Each of its log-probabilities is that of the state that the call saw, and of other orders too.
    alone = rollout(denoiser, rows[1][None], PROCESS, base=base, seed=3, row_ids=torch.tensor([1]))
    torch.testing.assert_close(alone.log_prob, paths.log_prob[1:2], rtol=0, atol=1e-4)
    over = log_prob_over_orders(denoiser, base, paths, PROCESS, orders=3, **options)
    again = log_prob_over_orders(denoiser, base, alone, PROCESS, orders=3, seed=3, row_ids=torch.tensor([1]))
    torch.testing.assert_close(over.log_prob[1:2], again.log_prob, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["LLaDA 2 by 4", "SDAR", "A2D by 4"])
def test_what_cannot_be_right_with_blocks_is_refused_by_name(name, tmp_path):
    family = FAMILIES[name]
    denoiser, tokens = family.denoiser(family.model()), torch.full((1, 8), MASK)
    rollout(denoiser, tokens, PROCESS, block_length=4, seed=0)
    with pytest.raises(ValueError, match="block_length is 2, but the model's attention has blocks of 4"):
        rollout(denoiser, tokens, PROCESS, block_length=2, seed=0)
    with pytest.raises(ValueError, match=r"the base's attention has Blocks\(length=2.*, the model's Blocks\(length=4"):
        rollout(denoiser, tokens, PROCESS, base=as_denoiser(family.model(), block_length=2), seed=0)
    for changes in ({"normalizer": "state"}, {"estimator": "first_jump"}, {"estimator": "first_jump_one"}):
        with pytest.raises(ValueError, match='a model whose attention has blocks goes with estimator "posterior"'):
            DAMTrainer(family.model(), low, config_for(tmp_path, **changes), PROMPTS, denoiser=family.denoiser)
    with pytest.raises(ValueError, match="block_length is 2, but the model's attention has blocks of 4"):
        DAMTrainer(family.model(), low, config_for(tmp_path, block_length=2), PROMPTS, denoiser=family.denoiser)


def test_sdar_is_not_run_again_in_the_backward_pass():
    model = FAMILIES["SDAR"].model().train()
    model.model.gradient_checkpointing = True  # as transformers sets it in modules that have it
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        as_denoiser(model).hidden_states(tokens_of(1, 5))
    model.model.gradient_checkpointing = False
    as_denoiser(model).hidden_states(tokens_of(1, 5))
    assert all(module.training for module in model.modules())


def test_a_denoiser_of_one_s_own_may_have_blocks_and_refuse_padding():
    class Own(Tabular):
        blocks = Blocks(2, "sequence")
        left_padding = False

    torch.manual_seed(0)
    own = Own(torch.randn(81, 4, 2), tokens=3)
    tokens, process = torch.full((20, 4), 2), MaskedCTMC(mask_token=2)
    tokens[:, 0] = 0
    paths = rollout(own, tokens, process, seed=0)
    assert (paths.position[:, 0] == 1).all()
    assert sorted(set(paths.position[:, 1].tolist())) == [2, 3]
    mask = torch.ones_like(tokens)
    rollout(own, tokens, process, attention_mask=mask, seed=0)
    mask[3, 0] = 0
    with pytest.raises(ValueError, match="Own predicts other tokens for a row that is padded on the left"):
        rollout(own, tokens, process, attention_mask=mask, seed=0)


# Options and the registry


def test_options_are_those_of_the_family():
    with pytest.raises(
        TypeError, match="type 'llada2_moe' have no option shift; they have block_length, mask_token_id"
    ):
        as_denoiser(FAMILIES["LLaDA 2"].model(), shift=1)
    with pytest.raises(TypeError, match="type 'roberta' have no option blocks; they have attention, block_length"):
        as_denoiser(FAMILIES["RoBERTa"].model(), blocks=4)
    with pytest.raises(ValueError, match="attention must be one of own, full, block-causal; got 'causal'"):
        as_denoiser(FAMILIES["Qwen"].model(), attention="causal")
    with pytest.raises(ValueError, match="block_length must be at least 1; got 0"):
        as_denoiser(FAMILIES["Qwen"].model(), block_length=0)
    with pytest.raises(ValueError, match="block_origin must be one of completion, sequence; got 'end'"):
        as_denoiser(FAMILIES["A2D"].model(), block_length=2, block_origin="end")
    with pytest.raises(ValueError, match="blocks go with block-causal"):
        as_denoiser(FAMILIES["Qwen"].model(), attention="full", block_length=2)
    with pytest.raises(ValueError, match="shift must be 0 or 1; got 2"):
        as_denoiser(FAMILIES["Dream"].model(), shift=2)
    own = as_denoiser(FAMILIES["Qwen"].model())
    with pytest.raises(TypeError, match="MaskedLM is a Denoiser itself and takes no options; got shift"):
        as_denoiser(own, shift=1)


def test_any_language_model_can_be_told_what_it_is():
    """By options, a causal language model is one that the families know."""
    torch.manual_seed(0)
    model, tokens = qwen_model().eval(), tokens_of(2, 9)
    told = as_denoiser(model, block_length=4, block_origin="completion", shift=1, mask_token_id=3)
    assert blocks_of(told) == Blocks(4, "completion")
    assert told.mask_token_id == 3
    with torch.no_grad():
        expected = dream.shifted(from_the_end(model, tokens)).log_softmax(dim=-1)
    torch.testing.assert_close(log_probs(told, tokens), expected, rtol=0, atol=1e-4)


def test_a_family_of_one_s_own_is_registered(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    model = transformers_model(RobertaForMaskedLM, RobertaConfig)().eval()
    tokens = tokens_of(2, 9)

    def mine(model, *, adapter, turned=False):
        return MaskedLM(model, adapter=adapter, shift=int(turned))

    register("roberta", mine)
    with torch.no_grad():
        expected = dream.shifted(in_place(model, tokens)).log_softmax(dim=-1)
    torch.testing.assert_close(log_probs(as_denoiser(model, turned=True), tokens), expected, rtol=0, atol=1e-4)
    with pytest.raises(TypeError, match="have no option shift; they have turned"):
        as_denoiser(model, shift=1)


def test_families_are_known_through_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **arguments):
            return self.module(**arguments)

    pytest.importorskip("peft", reason="needs the package peft")
    for name in ("Dream", "SDAR", "LLaDA tied"):
        model = FAMILIES[name].model()
        tokens = tokens_of(2, 9)
        wrapped = as_denoiser(Wrapper(model))
        assert type(wrapped) is type(as_denoiser(model))
        assert blocks_of(wrapped) == FAMILIES[name].blocks
        assert torch.equal(log_probs(wrapped, tokens), log_probs(as_denoiser(model), tokens))
        expected = log_probs(as_denoiser(model), tokens)
        adapted = as_denoiser(Wrapper(lora_on(model, init_lora_weights=False)), adapter=False)
        torch.testing.assert_close(log_probs(adapted, tokens), expected)


def test_the_mask_token_is_the_family_s_where_nothing_else_tells(tmp_path):
    model = FAMILIES["LLaDA 2"].model()
    with pytest.raises(ValueError, match=r"an id that the model takes, in \[0, 19\); got 156895"):
        DAMTrainer(model, low, config_for(tmp_path, mask_token_id=None), PROMPTS)

    def told(module):
        return as_denoiser(module, mask_token_id=MASK)

    trainer = DAMTrainer(model, low, config_for(tmp_path, mask_token_id=None), PROMPTS, denoiser=told)
    assert trainer.process.mask_token == MASK
    trainer = DAMTrainer(FAMILIES["SDAR"].model(), low, config_for(tmp_path, mask_token_id=None), PROMPTS)
    assert trainer.process.mask_token == MASK


def test_a_tied_llada_whose_logits_are_something_else_is_refused():
    model = FAMILIES["LLaDA tied"].model()
    model.config.scale_logits = True
    model.model.config = copy.deepcopy(model.config)
    model.model.config.scale_logits = False
    with pytest.raises(ValueError, match=r"LLaDAModelLM gives log-probabilities that differ by up to \d"):
        as_denoiser(model).hidden_states(tokens_of(1, 9))


@pytest.mark.parametrize("name", ["ESM", "LLaDA tied", "LLaDA", "Dream"])
def test_what_is_offloaded_gives_the_same_numbers(name):
    """Head, embedding and a bias outside the head are brought back where they are read, and left where they were."""
    family, tokens = FAMILIES[name], tokens_of(3, 13)
    model = family.model()
    expected = log_probs(family.denoiser(model), tokens)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(log_probs(family.denoiser(model), tokens), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_whose_weights_were_never_loaded_is_refused():
    with torch.device("meta"):
        model = FAMILIES["ModernBERT"].make()
    with pytest.raises(ValueError, match="are on the meta device and have no values: load the model's weights"):
        as_denoiser(model).head()
