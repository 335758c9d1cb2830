"""DiffusionGemma: what it predicts by its own code is what `dam.canvas` samples and trains. Of the real class."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason="needs the package peft")
pytest.importorskip("transformers.models.diffusion_gemma", reason="transformers has no DiffusionGemma")

import peft
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)

from dam.adjoint import tilted_weights
from dam.canvas import path_loss, posterior_loss, renoised, rollout
from dam.ctmc import MaskedCTMC, UniformCTMC
from dam.models import DiffusionGemma, as_denoiser
from dam.rollout import rollout as fill_masks
from dam.train import DAMConfig, DAMTrainer

VOCABULARY, CANVAS, IMAGE = 40, 5, 39
PROCESS = UniformCTMC(VOCABULARY)


def small_model(seed=0, attention="sdpa", sharpness=6.0):
    """Of a layer with a sliding window shorter than prompts and one without; with logits near the soft cap."""
    torch.manual_seed(seed)
    text = DiffusionGemmaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        num_global_key_value_heads=1,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=8,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    vision = Gemma4VisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
        initializer_range=0.3,
        image_token_id=IMAGE,
        boi_token_id=IMAGE - 1,
        eoi_token_id=IMAGE - 2,
        attn_implementation=attention,
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    model.model.decoder.norm.weight.data *= sharpness
    return model


def tokens(*shape, seed=0):
    return torch.randint(3, IMAGE - 2, shape, generator=torch.Generator().manual_seed(seed))


PROMPT, STATES = tokens(3, 9), tokens(3, CANVAS, seed=1)


def with_adapter(model):
    """Of LoRA on the decoder and the encoder, whose adapters are apart although their weights are not."""
    text = r".*\.(decoder|language_model)\..*\.(q_proj|o_proj)"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=text)).eval()
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return adapted


@torch.no_grad()
def log_probs(denoiser, prompt=PROMPT, states=STATES, mask=None):
    hidden = denoiser.conditioned(prompt, mask).hidden_states(states)
    return denoiser.head().logits(hidden).log_softmax(dim=2)


@torch.no_grad()
def own_log_probs(model, prompt=PROMPT, states=STATES):
    return model(input_ids=prompt, decoder_input_ids=states).logits.log_softmax(dim=2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_log_probs_are_the_models_own(attention):
    model = small_model(attention=attention)
    denoiser = as_denoiser(model)
    assert isinstance(denoiser, DiffusionGemma) and denoiser.canvas_length == CANVAS
    assert denoiser.head().softcap == 30.0
    own = own_log_probs(model)
    torch.testing.assert_close(log_probs(denoiser), own, rtol=0, atol=1e-4)
    # The cap counts: without it they would be others.
    bare = denoiser.head()._replace(softcap=None).logits(denoiser.conditioned(PROMPT).hidden_states(STATES).detach())
    assert float((bare.log_softmax(dim=2) - own).abs().max()) > 1.0


def test_a_prompt_is_encoded_once_for_all_canvases():
    """And keys and values of one canvas do not stay: the next one's predictions are as of the whole model."""
    model = small_model()
    encoded, decoded = [], []
    model.model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    model.model.decoder.register_forward_hook(lambda *_: decoded.append(1))
    denoiser = as_denoiser(model)
    denoiser.conditioned(PROMPT)  # compares with the model's own logits
    del encoded[:], decoded[:]
    with torch.no_grad():
        conditioned = denoiser.conditioned(PROMPT)
        for seed in range(3):
            states = tokens(3, CANVAS, seed=seed)
            found = denoiser.head().logits(conditioned.hidden_states(states)).log_softmax(dim=2)
            assert len(encoded) == 1 and len(decoded) == seed + 1
            expected = own_log_probs(model, states=states)
            del encoded[1:], decoded[seed + 1 :]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        del encoded[:], decoded[:]
        rollout(denoiser, PROMPT, PROCESS, steps=4, base=denoiser, seed=0)
    assert (len(encoded), len(decoded)) == (2, 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("width", [1, 4, 12])
def test_padded_prompts_are_as_alone(attention, width):
    """Of several lengths in one batch, longer and shorter than the sliding window."""
    denoiser = as_denoiser(small_model(attention=attention))
    for pad in (0, 7):
        prompt = torch.full((2, 9 + width), pad)
        prompt[0, width:], prompt[1, -3:] = PROMPT[0], PROMPT[1, -3:]
        mask = torch.zeros_like(prompt)
        mask[0, width:] = mask[1, -3:] = 1
        found = log_probs(denoiser, prompt, STATES[:2], mask)
        assert denoiser.left_padding
        for row, alone in enumerate((PROMPT[:1], PROMPT[1:2, -3:])):
            expected = log_probs(denoiser, alone, STATES[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-4)


def test_a_model_that_heeds_no_mask_is_refused_padded_prompts(monkeypatch):
    model = small_model()
    decoder = model.model.decoder
    monkeypatch.setattr(
        decoder,
        "create_diffusion_decoder_attention_mask",
        lambda **_: {"full_attention": None, "sliding_attention": None},
    )
    denoiser, mask = as_denoiser(model), torch.ones_like(PROMPT)
    denoiser.conditioned(PROMPT, mask)
    assert not denoiser.left_padding
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="predicts other tokens for a row that is padded on the left"):
        denoiser.conditioned(PROMPT, mask)


def test_prompts_that_cannot_be_right_are_refused():
    denoiser = as_denoiser(small_model())
    behind = torch.ones_like(PROMPT)
    behind[1, -1] = 0
    with pytest.raises(ValueError, match="padded behind, where the canvas follows"):
        denoiser.conditioned(PROMPT, behind)
    with pytest.raises(ValueError, match="holds the image token 39"):
        denoiser.conditioned(torch.where(PROMPT == PROMPT[0, 0], IMAGE, PROMPT))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[3, 9\]"):
        denoiser.conditioned(PROMPT, behind[:, 1:])
    for prompt in (PROMPT[0], PROMPT[:, :0], PROMPT.float()):
        with pytest.raises(ValueError, match=r"prompts must be int64 \[B, P\]"):
            denoiser.conditioned(prompt)
    with pytest.raises(ValueError, match=r"canvases must be int64 \[3, C\]"):
        denoiser.conditioned(PROMPT).hidden_states(STATES[:2])


def test_the_base_of_an_adapter_is_the_model_with_it_off():
    plain = small_model()
    model = with_adapter(copy.deepcopy(plain))
    trained, base = as_denoiser(model), as_denoiser(model, adapter=False)
    with model.disable_adapter():
        own = own_log_probs(model)
    torch.testing.assert_close(own, own_log_probs(plain), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_probs(base), own, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_probs(trained), own_log_probs(model), rtol=0, atol=1e-4)
    assert float((log_probs(trained) - own).abs().max()) > 0.1
    paths = rollout(trained, PROMPT, PROCESS, steps=3, base=base, seed=0)
    assert bool((paths.log_ratio != 0).any())
    again = rollout(base, PROMPT, PROCESS, steps=3, base=base, seed=0)
    assert bool((again.log_ratio == 0).all())


def test_gradients_are_of_the_adapter_in_encoder_and_decoder():
    """They are those of the cross-entropy by the model's own logits."""
    model = with_adapter(small_model())
    denoiser = as_denoiser(model)
    final = tokens(3, CANVAS, seed=4)
    states = renoised(final, PROCESS, steps=3, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([0.5, 2.0, 1.0])
    loss = posterior_loss(denoiser, PROMPT, states, final, weight, PROCESS)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The encoder's last layer leaves keys and values before its attention, which is then not in use.
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    own = model(input_ids=PROMPT, decoder_input_ids=states.canvas).logits.log_softmax(dim=2)
    expected = -(weight[:, None] * own.gather(2, final[..., None])[..., 0]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    kinds = set()
    wanted = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    for name, ours, theirs in zip(parameters, found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-6)
        if float(ours.abs().max()) > 0:
            kinds.add("encoder" if ".encoder." in name else "decoder")
    assert kinds == {"encoder", "decoder"}


def test_gradients_reach_the_encoder_behind_a_rollout_and_twice():
    """A prompt that was encoded without gradients is encoded again for them, and once for each backward pass."""
    model = small_model()
    denoiser = as_denoiser(model)
    conditioned = denoiser.conditioned(PROMPT)
    with torch.no_grad():
        conditioned.hidden_states(STATES)
    own = model.model(input_ids=PROMPT, decoder_input_ids=STATES).last_hidden_state.square().sum()
    # Keys of the first layer: used by the encoder and the decoder, whose weights are one.
    weight = model.model.decoder.layers[0].self_attn.k_proj.weight
    (expected,) = torch.autograd.grad(own, weight)
    for _ in range(2):
        (found,) = torch.autograd.grad(conditioned.hidden_states(STATES).square().sum(), weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_changes_logits_otherwise_is_found_before_the_first_call(monkeypatch):
    model = small_model()
    denoiser = as_denoiser(model)
    denoiser.compare(PROMPT, torch.ones_like(PROMPT))
    # Another cap is followed, by a comparison anew.
    model.final_logit_softcapping = 20.0
    denoiser.compare(PROMPT)
    assert denoiser.head().softcap == 20.0
    torch.testing.assert_close(log_probs(denoiser), own_log_probs(model), rtol=0, atol=1e-4)
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + output.logits.square() / 10
        return output

    monkeypatch.setattr(model, "forward", changed)
    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        denoiser.compare(PROMPT)


def test_rollouts_end_where_the_models_own_generation_does_in_one_step():
    """The likeliest tokens behind the same noise: with more steps it is no chain (docs/models.md)."""
    model = small_model()
    paths = rollout(as_denoiser(model), PROMPT, PROCESS, steps=1, temperature=0, seed=5)
    generated = model.generate(
        PROMPT,
        decoder_input_ids=paths.canvas[:, 0],
        max_new_tokens=CANVAS,
        max_denoising_steps=1,
        eos_token_id=None,
        pad_token_id=None,
    )
    assert torch.equal(generated.sequences, torch.cat((PROMPT, paths.final), dim=1))


def test_an_untouched_model_has_weights_of_one_and_rows_their_own_draws():
    denoiser = as_denoiser(small_model())
    paths = rollout(denoiser, PROMPT, PROCESS, steps=4, base=denoiser, seed=1)
    assert paths.canvas.shape == (3, 5, CANVAS) and bool((paths.log_ratio == 0).all())
    row = rollout(denoiser, PROMPT[1:2], PROCESS, steps=4, seed=1, row_ids=torch.tensor([1]))
    assert torch.equal(row.canvas, paths.canvas[1:2])
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[:, :2] = 0
    padded = torch.nn.functional.pad(PROMPT, (2, 0))
    assert torch.equal(rollout(denoiser, padded, PROCESS, steps=4, attention_mask=mask, seed=1).canvas, paths.canvas)


@pytest.mark.parametrize("by_path", [False, True])
def test_five_steps_lower_the_loss(by_path):
    """A loop as docs/models.md has it; the loss on one batch falls with each."""
    model = with_adapter(small_model(sharpness=1.0))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    denoiser, base = as_denoiser(model), as_denoiser(model, adapter=False)
    prompt = PROMPT[:1].expand(16, -1)
    paths = rollout(denoiser, prompt, PROCESS, steps=3, base=base, seed=0)
    reward = (paths.final < VOCABULARY // 2).double().sum(dim=1)
    weights, _ = tilted_weights(paths.log_ratio.view(1, 16, -1), reward.view(1, 16), beta=0.5, ess=4.0)
    losses = []
    for _ in range(6):
        generator = torch.Generator().manual_seed(2)
        if by_path:
            loss = path_loss(denoiser, prompt, paths, weights.weight[0], PROCESS, generator=generator)
        else:
            states = renoised(paths.final, PROCESS, steps=3, generator=generator)
            loss = posterior_loss(denoiser, prompt, states, paths.final, weights.weight[0], PROCESS)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]


def test_what_fills_in_masks_refuses_it(tmp_path):
    model = small_model()
    with pytest.raises(TypeError, match="knows no mask token"):
        fill_masks(as_denoiser(model), torch.full((2, 4), 4), MaskedCTMC(4), seed=0)
    with pytest.raises(TypeError, match=r"DAMTrainer fills in masks\. Train it in a loop of your own by dam\.canvas"):
        DAMTrainer(
            model,
            lambda completion_ids, **_: [0.0] * len(completion_ids),
            DAMConfig(str(tmp_path), use_cpu=True, report_to=[], mask_token_id=4),
            [{"input_ids": [1, 4, 4]}],
        )
