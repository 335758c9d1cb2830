"""Heads of which each process holds a part."""

import types

import pytest
import torch

from dam.models import MaskedLM, sharding
from tests import ranks
from tests.models.sharded_run import RATE, model

# Of 2.6 FSDP2 needs a GPU, and torch.compile cannot trace the masks of the transformers of today.
recent = pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < (2, 7), reason="needs torch 2.7")


@recent
def test_a_head_divided_by_fsdp2_is_that_of_the_whole_model(tmp_path):
    """In the root's unit or its own, kept whole after the forward pass or not: draws, losses and mean gradients."""
    ranks.succeed("tests.models.sharded_run", 2, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert "not by rows of the vocabulary: plan that layer as ColwiseParallel" in found.pop("refused")
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


@recent
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_head_whose_rows_tensor_parallelism_divides_stays_where_it_is(tmp_path, count):
    """Draws, losses and gradients of the whole one: of 9 rows, uneven on two processes."""
    ranks.succeed("tests.models.tensor_run", count, tmp_path)
    for rank in range(count):
        found = torch.load(tmp_path / f"{rank}.pt")
        whole = found.pop("whole")
        assert len(found) == 2
        for name, seen in found.items():
            assert torch.equal(seen["final"], whole["final"]), name
            torch.testing.assert_close(seen["loss"], whole["loss"], rtol=1e-6, atol=0.0)
            torch.testing.assert_close(seen["gradients"], whole["gradients"], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "ways",
    [
        {"own": 1, "tied": 1},
        pytest.param({"own": 5, "tied": 1, "adapted": 1, "outside bias": 1}, marks=pytest.mark.full),
    ],
    ids=len,
)
def test_a_head_divided_by_zero_3_is_that_of_the_whole_model(tmp_path, ways):
    """Draws, losses and weights of three steps, by each stage of DeepSpeed, of heads of several kinds.

    Those of plain SGD with the mean gradient, which is summed over processes in another order.
    """
    pytest.importorskip("deepspeed")
    ranks.succeed("tests.models.zero_run", 2, tmp_path, *ways)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        alone = found.pop("alone")
        torch.testing.assert_close(alone["after"], (1 - RATE) * alone["before"])
        assert {name: len(seen) - 1 for name, seen in found.items()} == ways
        for name, ends in found.items():
            plain = ends.pop("plain")
            for way, seen in ends.items():
                # Between its uses nothing of the model is here.
                assert (seen["here"] == 0) == (way in ("stage 3", "stage 3, prefetched")), (name, way)
                assert torch.equal(seen["final"], plain["final"]), (name, way)
                torch.testing.assert_close(seen["losses"], plain["losses"], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(seen["weights"], plain["weights"], rtol=1e-5, atol=1e-6, msg=f"{name} {way}")


def test_a_part_that_cpu_offload_keeps_on_the_host_is_gathered_where_the_others_are(monkeypatch):
    """A stand-in for FSDP2's parameter under CPUOffloadPolicy, which takes a GPU."""
    at = []

    class Part:
        device, device_mesh = torch.device("cpu"), types.SimpleNamespace(device_type="cuda", ndim=1)

        def to(self, device):
            at.append(device)
            return self

        def full_tensor(self, grad_placements):
            at.append("gathered")
            return torch.ones(2)

    monkeypatch.setattr(sharding, "is_divided", lambda parameter: True)
    assert torch.equal(sharding.whole(Part()), torch.ones(2))
    Part.device = torch.device("cuda")
    sharding.whole(Part())
    assert at == ["cuda", "gathered", "gathered"]


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
