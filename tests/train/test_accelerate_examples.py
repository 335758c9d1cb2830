"""examples/accelerate as they are run: by `accelerate launch`, on a tiny model in a folder."""

import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from tests.architectures import small_sizes

CHECKOUT = Path(__file__).parents[2]
EXAMPLES = CHECKOUT / "examples" / "accelerate"
WORDS = ["[MASK]", "[PAD]", "<eos>", " ", *string.ascii_letters]

pytestmark = pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < (2, 7), reason="needs torch 2.7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of letters."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {**small_sizes(len(WORDS)), "max_position_embeddings": 64, "eos_token_id": 2}
    config = ModernBertConfig(**sizes, cls_token_id=None, sep_token_id=None)
    ModernBertForMaskedLM(config).save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[PAD]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=letters, mask_token="[MASK]", pad_token="[PAD]", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


def launched(kind, folder, output):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / f"{kind}.yaml")]
    options = (
        "--use_cpu --max_steps 4 --num_generations 4 --per_device_train_batch_size 8 --max_completion_length 4 "
        "--save_steps 2 --learning_rate 1e-2 --optim sgd --disable_tqdm true --logging_steps 1"
    )
    command += ["--num_processes", "2", str(EXAMPLES / "train.py"), "--model", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(output), *options.split()],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return ModernBertForMaskedLM.from_pretrained(output / "model")


@pytest.mark.full
def test_both_files_train_the_example_to_one_model(folder, tmp_path):
    of_ddp = launched("ddp", folder, tmp_path / "ddp")
    of_fsdp2 = launched("fsdp2", folder, tmp_path / "fsdp2")
    at_first = ModernBertForMaskedLM.from_pretrained(folder)
    # Each as its name says: on a CPU accelerate would leave the model whole.
    assert (tmp_path / "fsdp2" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    assert (tmp_path / "ddp" / "checkpoint-2" / "model.safetensors").is_file()
    assert of_fsdp2.config.architectures == ["ModernBertForMaskedLM"]
    moved = 0.0
    for one, other, first in zip(of_ddp.parameters(), of_fsdp2.parameters(), at_first.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)
        moved = max(moved, float((one - first).detach().abs().max()))
    assert moved > 1e-4
