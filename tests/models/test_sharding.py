"""Heads of which each process holds a part."""

import subprocess
import sys

import pytest
import torch

from dam.models import MaskedLM
from tests.models.sharded_run import model

# Of 2.6 FSDP2 needs a GPU, and torch.compile cannot trace the masks of the transformers of today.
recent = pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < (2, 7), reason="needs torch 2.7")


@recent
def test_a_head_divided_by_fsdp2_is_that_of_the_whole_model(tmp_path):
    """In the root's unit or its own, kept whole after the forward pass or not: draws, losses and mean gradients."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    done = subprocess.run(
        [*command, "tests.models.sharded_run", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert "is a DTensor, divided by tensor parallelism: leave the output layer out" in found.pop("refused")
        # What an engine is sent are whole parameters, by their names.
        sent, own = found.pop("sent"), dict(model(True).named_parameters())
        assert sent.keys() == own.keys() and all(torch.equal(sent[name], own[name]) for name in own)
        whole = {tied: found.pop(f"whole {tied}") for tied in (False, True)}
        assert len(found) == 6
        for name, seen in found.items():
            expected = whole[name.endswith("tied True")]
            assert torch.equal(seen["final"], expected["final"]), name
            # Gradients are summed over processes in another order.
            torch.testing.assert_close(seen["loss"], expected["loss"], rtol=1e-6, atol=0.0)
            torch.testing.assert_close(seen["gradients"], expected["gradients"], rtol=1e-4, atol=1e-6, msg=name)


def test_a_head_that_zero_3_has_taken_away_is_refused():
    network = model(False)
    weight = network.get_output_embeddings().weight
    weight.ds_id, weight.data = 7, torch.empty(0)
    with pytest.raises(ValueError, match="partitioned by DeepSpeed's ZeRO-3 and not here"):
        MaskedLM(network).head()


@recent
def test_a_model_that_was_compiled_and_called_before_is_told_so():
    network = model(False).eval()
    tokens = torch.tensor([[3, 4, 0, 0]])
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        compiled(input_ids=tokens, attention_mask=None)
        with pytest.raises(
            RuntimeError, match=r"was compiled by torch.compile and called before: .* torch._dynamo.reset"
        ):
            MaskedLM(compiled).hidden_states(tokens)
        torch._dynamo.reset()
        expected = MaskedLM(network).hidden_states(tokens)
        torch.testing.assert_close(MaskedLM(compiled).hidden_states(tokens), expected)
        assert compiled(input_ids=tokens, attention_mask=None).logits.shape == (1, 4, 9)
