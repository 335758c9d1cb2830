"""A model, a dataset and a configuration so small that a run takes a fraction of a second."""

import torch
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from dam.train import DAMConfig

MASK, VOCABULARY = 0, 6
ROWS = [{"input_ids": [1 + n % 3, MASK, MASK, MASK]} for n in range(8)]


def tiny_model(seed=0, dropout=0.0, **more):
    torch.manual_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **more,
        )
    )


def rotary_model(seed=0):
    """One that padding on the left does not change."""
    torch.manual_seed(seed)
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            pad_token_id=1,
            bos_token_id=None,
            eos_token_id=None,
            cls_token_id=None,
            sep_token_id=None,
        )
    )


def tiny_config(output, prompts=2, **changes):
    """Of a rollout of so many prompts in each process, for each gradient accumulation step."""
    values = {
        "num_generations": 8,
        "target_ess": 4.0,
        "num_iterations": 2,
        "replay_size": 6,
        "replay_batch_size": 4,
        "max_steps": 6,
        "max_completion_length": 3,
        "mask_token_id": MASK,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    values |= changes
    return DAMConfig(
        output_dir=str(output), **{"per_device_train_batch_size": prompts * values["num_generations"]} | values
    )


def sum_reward(completion_ids, **_):
    return [float(sum(ids)) for ids in completion_ids]


def logged(trainer):
    """The figures of training that a run logged, without its times."""
    return [
        {
            name: value
            for name, value in entry.items()
            if name not in ("train_runtime", "epoch") and "per_second" not in name and not name.startswith("time/")
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
