"""The base of a run: the model as it was when the trainer was made, whatever of it is trained."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from tiny import ROWS, assert_same_weights, sum_reward, tiny_config, tiny_model
from transformers import BertForMaskedLM

import dam
from dam.models import MaskedLM, as_denoiser
from dam.models.tail import POSITIONS
from dam.train import DAMTrainer, base
from dam.train.base import InitialParameters, with_base
from tests import covering

peft = pytest.importorskip("peft", reason="needs the package peft")

HEAD = ["cls.predictions.decoder"]
KINDS = {
    "LoRA": {"target_modules": ["query", "value"]},
    "bias all": {"target_modules": ["query"], "bias": "all"},
    "bias lora_only": {"target_modules": ["query", "dense"], "bias": "lora_only"},
    "DoRA on the head": {"target_modules": HEAD, "use_dora": True},
    "lora_bias": {"target_modules": HEAD, "lora_bias": True},
    "modules_to_save": {"target_modules": ["query"], "modules_to_save": HEAD},
    "whole head saved": {"target_modules": ["query"], "modules_to_save": ["cls"]},
    "trainable tokens": {"target_modules": ["query"], "trainable_token_indices": [3, 4]},
    "PiSSA": {"target_modules": ["query", "dense"], "init_lora_weights": "pissa"},
}


def start():
    model = tiny_model()
    # Of what pads, which DoRA would divide by its norm.
    model.get_input_embeddings().weight.data[0] = 0.02
    return model


def lora(kind):
    return peft.LoraConfig(r=2, **KINDS[kind])


def trained(kind):
    """A model with an adapter that somebody has trained before."""
    model = peft.get_peft_model(start(), lora(kind))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens():
    return torch.tensor([row["input_ids"] for row in ROWS])


@torch.no_grad()
def logits_of(denoiser):
    return denoiser.head().logits(denoiser.hidden_states(tokens()))


def entries(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(("kind", "given"), covering.pairs(list(KINDS), ["peft_config", "model given"]))
def test_the_base_is_the_model_as_it_was(tmp_path, kind, given):
    """The logged KL of an untouched model is 0, and the base stays where it was while the model moves away."""
    given = given == "model given"
    model, options = (trained(kind), {}) if given else (start(), {"peft_config": lora(kind)})
    trainer = DAMTrainer(model, sum_reward, tiny_config(tmp_path, logging_steps=1), ROWS, **options)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        trainer.model.eval()
        expected = trainer.model(input_ids=tokens()).logits
        if not given:
            # Up to rounding of what PiSSA splits, the model that was handed in.
            torch.testing.assert_close(expected, start().eval()(tokens()).logits, rtol=1e-4, atol=1e-5)
    trainer.train()
    assert entries(trainer, "kl_path")[0] == 0.0
    assert entries(trainer, "kl_path")[-1] != 0.0
    trainer.model.eval()
    torch.testing.assert_close(logits_of(trainer.sampler.base(trainer.model)), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits_of(MaskedLM(trainer.model)), expected, atol=1e-3)
    assert trainable == {name for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["modules_to_save", "bias all", "DoRA on the head"])
def test_a_run_is_that_against_an_explicit_copy(tmp_path, kind):
    """Of p(token) and KL after every step, as numbers: the same operations on the same values."""
    runs = []
    for explicit in (False, True):
        model = trained(kind)
        options = {"ref_model": copy.deepcopy(model)} if explicit else {}
        trainer = DAMTrainer(model, sum_reward, tiny_config(tmp_path, logging_steps=1), ROWS, **options)
        trainer.train()
        trainer.model.eval()
        runs.append((trainer, logits_of(trainer.sampler.base(trainer.model)).log_softmax(dim=-1)))
    (ours, log_prob), (theirs, expected) = runs
    for name in ("kl_path", "ess", "reward", "loss"):
        assert entries(ours, name) == entries(theirs, name)
    assert torch.equal(log_prob, expected)
    assert_same_weights(ours.model, theirs.model)
    # And both of p(token) are what the model says.
    with torch.no_grad():
        own = ours.model(input_ids=tokens()).logits.log_softmax(dim=-1)
    torch.testing.assert_close(logits_of(MaskedLM(ours.model)).log_softmax(dim=-1), own, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path):
    """And a run resumed with the same trained adapter continues to the same result, against the same base."""
    whole = DAMTrainer(trained("LoRA"), sum_reward, tiny_config(tmp_path / "whole", max_steps=4), ROWS)
    whole.train()
    config = tiny_config(tmp_path / "half", max_steps=4, save_strategy="steps", save_steps=2)
    DAMTrainer(trained("LoRA"), sum_reward, config, ROWS).train()
    checkpoint = tmp_path / "half" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir() if path.is_dir()}
    assert not names
    adapter = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["r"] == 2
    resumed = DAMTrainer(trained("LoRA"), sum_reward, config, ROWS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(resumed.model, whole.model)
    assert list(resumed.model.peft_config) == ["default"]
    bases = [logits_of(trainer.sampler.base(trainer.model.eval())) for trainer in (resumed, whole)]
    assert torch.equal(*bases)


def test_gradients_between_two_looks_at_the_base(tmp_path):
    """Through DistributedDataParallel, whose hooks are on the parameters that are put back."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain, model = trained("modules_to_save"), trained("modules_to_save")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        base = InitialParameters(model)
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (plain, model)]
        expected = logits_of(base.denoiser(wrapped, as_denoiser))
        for _ in range(3):
            for module, optimizer in zip((plain, wrapped), optimizers, strict=True):
                denoiser = MaskedLM(module)
                hidden, head = denoiser.hidden_states(tokens()), denoiser.head()
                torch.nn.functional.linear(hidden, head.weight, head.bias).square().sum().backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            assert torch.equal(logits_of(base.denoiser(wrapped, as_denoiser)), expected)
    finally:
        torch.distributed.destroy_process_group()
    assert_same_weights(plain, model)
    assert not torch.allclose(logits_of(MaskedLM(model)), expected, atol=1e-3)


def test_the_base_follows_the_model_s_dtype():
    model = trained("bias all")
    base = InitialParameters(model)
    model.double()
    assert logits_of(base.denoiser(model, as_denoiser)).dtype == torch.float64


def test_what_is_trained_later_or_otherwise_is_an_error():
    model = trained("LoRA")
    base = InitialParameters(model)
    model.base_model.model.cls.predictions.transform.dense.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters are trainable now .*transform\.dense\.weight, .* or pass ref_"):
        base.denoiser(model, as_denoiser)
    replaced = trained("LoRA")
    base = InitialParameters(replaced)
    layer = replaced.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A["default"]
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    before = layer.weight
    with pytest.raises(ValueError, match=r"weight of Linear, was replaced or divided .* pass ref_model"):
        base.denoiser(replaced, as_denoiser).hidden_states(tokens())
    assert layer.weight is before
    divided = trained("LoRA")
    base = InitialParameters(divided)
    next(p for p in divided.parameters() if p.requires_grad).data = torch.empty(0)
    with pytest.raises(ValueError, match=r"was replaced or divided after the trainer was made"):
        base.denoiser(divided, as_denoiser).head()


def test_after_an_error_the_model_has_its_own_parameters():
    model = trained("LoRA")
    parameters = dict(model.named_parameters())
    denoiser = InitialParameters(model).denoiser(model, as_denoiser)
    with pytest.raises(IndexError):
        denoiser.hidden_states(tokens() + 100)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_arguments_that_do_not_go_together():
    with pytest.raises(ValueError, match="leave ref_model out"):
        with_base(tiny_model(), tiny_model(), lora("LoRA"))
    with pytest.raises(ValueError, match="the model has an adapter already: leave peft_config out"):
        with_base(trained("LoRA"), None, lora("LoRA"))
    with pytest.raises(ValueError, match=r"no parameter of the model is trainable: .*is_trainable=True"):
        with_base(trained("LoRA").requires_grad_(False), None, None)


# Compared with the model's own logits


def clamped(model):
    """The same model, whose logits are cut off after its output layer."""
    forward = model.forward

    def wrapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.clamp(-1.0, 1.0)
        return output

    model.forward = wrapped
    return model


def no_reward(completion_ids, **_):
    raise AssertionError("a reward function was called")


@pytest.mark.parametrize("of_base", [False, True], ids=["model", "ref_model"])
def test_a_run_whose_log_probabilities_are_not_the_model_s_does_not_start(tmp_path, of_base):
    model, base = (tiny_model(), clamped(tiny_model())) if of_base else (clamped(tiny_model()), tiny_model())
    trainer = DAMTrainer(model, no_reward, tiny_config(tmp_path), ROWS, ROWS, ref_model=base)
    for run in (trainer.evaluate, trainer.train):
        with pytest.raises(ValueError, match="BertForMaskedLM changes its logits after the output layer"):
            run()


class Capped(BertForMaskedLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 0.5 * torch.tanh(output.logits / 0.5)
        return output


def test_a_run_of_a_model_with_a_soft_cap(tmp_path):
    """It starts at its base and is trained; what it drew has the log-probabilities of its own logits."""
    model = tiny_model()
    model.__class__ = Capped
    with torch.no_grad():
        model.cls.predictions.bias += torch.linspace(-1.0, 1.0, len(model.cls.predictions.bias))
    trainer = DAMTrainer(model, sum_reward, tiny_config(tmp_path), ROWS, ROWS)
    trainer.train()
    kl = entries(trainer, "kl_path")
    assert kl[0] == 0.0 and kl[-1] != 0.0
    denoiser, x = MaskedLM(model), torch.tensor(ROWS[0]["input_ids"])[None]
    with torch.no_grad():
        hidden, head = denoiser.hidden_states(x), denoiser.head()
        drawn = dam.linear_jump(hidden, **head.arguments(hidden.dtype), seed=1)
        expected = model.eval()(x).logits.log_softmax(dim=2).gather(2, drawn.target[..., None])[..., 0]
    assert head.softcap == 0.5
    torch.testing.assert_close(drawn.log_prob, expected, rtol=1e-5, atol=1e-6)


def test_every_run_compares_anew_and_once(tmp_path):
    rows, model = [], tiny_model()
    trainer = DAMTrainer(model, sum_reward, tiny_config(tmp_path), ROWS, ROWS)
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[:2].numel()))
    trainer.evaluate()
    assert [n for n in rows if n] == [POSITIONS]
    trainer.train()
    trainer.evaluate()
    assert [n for n in rows if n] == [POSITIONS, POSITIONS]
    clamped(model)
    with pytest.raises(ValueError, match="changes its logits"):
        trainer.train()


def test_a_reference_that_shares_parameters_is_refused(tmp_path):
    model, reference = start(), start()
    reference.bert.embeddings = model.bert.embeddings
    for shared in (reference, model):
        with pytest.raises(ValueError, match=r"ref_model shares \d+ parameters with the model .*copy.deepcopy"):
            DAMTrainer(model, sum_reward, tiny_config(tmp_path), ROWS, ref_model=shared)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_reference_stays_where_accelerate_has_put_it(tmp_path):
    """Offloaded, its head too, it gives the numbers of one that is here, and is not moved."""
    runs = []
    for offloaded in (False, True):
        reference = start()
        if offloaded:
            cpu_offload(reference, execution_device=torch.device("cpu"))
        trainer = DAMTrainer(start(), sum_reward, tiny_config(tmp_path), ROWS, ref_model=reference)
        trainer.train()
        runs.append(trainer)
        assert offloaded == any(parameter.is_meta for parameter in reference.parameters())
    for name in ("kl_path", "ess", "loss"):
        assert entries(runs[0], name) == entries(runs[1], name)
    assert_same_weights(runs[0].model, runs[1].model)


def test_a_base_that_would_be_too_large_a_copy_is_refused(tmp_path, monkeypatch):
    """One of an adapter is none, and a model that is not all here cannot be copied."""
    model = start()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    monkeypatch.setattr(base, "LARGEST_COPY", size)
    DAMTrainer(model, sum_reward, tiny_config(tmp_path), ROWS)
    monkeypatch.setattr(base, "LARGEST_COPY", size - 1)
    with pytest.raises(ValueError, match=r"a frozen copy of 0\.0 GiB on each device: train an adapter"):
        DAMTrainer(model, sum_reward, tiny_config(tmp_path), ROWS)
    DAMTrainer(model, sum_reward, tiny_config(tmp_path), ROWS, ref_model=start())
    DAMTrainer(model, sum_reward, tiny_config(tmp_path), ROWS, peft_config=lora("LoRA"))
    placed = start()
    cpu_offload(placed, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded by accelerate and cannot be copied to be the base: train an ad"):
        DAMTrainer(placed, sum_reward, tiny_config(tmp_path), ROWS)
