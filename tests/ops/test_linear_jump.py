"""linear_jump: the draws of `jump` on the head's logits, without a [T, V] array."""

import math

import pytest
import scipy.stats
import torch
from helpers import P_VALUE, assert_close, integers, normal, peak_bytes, rounding, slow, threads

import dam
from dam.backends import choice
from dam.ops import _rows
from dam.ops import linear_jump as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
FORMS = ("fused", "chunked")
INF = math.inf


def head(rows=20, size=24, columns=1500, *, dtype=torch.float32, seed=0):
    hidden, weight = normal(rows, size, seed=seed, dtype=dtype), normal(columns, size, seed=seed + 1, dtype=dtype)
    return hidden, weight, normal(columns, seed=seed + 2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0])
def test_equals_jump_on_the_logits(backend, dtype, temperature):
    hidden, weight, bias = head(dtype=dtype)
    options = {"exclude": integers(-1, 1500, 20, seed=3), "temperature": temperature, "num_samples": 3, "seed": 5}
    for b in (None, bias):
        # 16-bit operands are multiplied in float32, so the logits to compare with are not rounded to 16 bits.
        logits = hidden.float() @ weight.float().T + (0 if b is None else b.float())
        out, expected = dam.linear_jump(hidden, weight, bias=b, **options), dam.jump(logits, **options)
        # 60 draws, each of which a rounding of a logit near 10 (1e-6) turns with probability about 1e-6.
        assert torch.equal(out.target, expected.target)
        atol = 64 * rounding(torch.float32)
        if torch.get_default_device().type == "cuda" and dtype != torch.float32 and temperature > 0:
            # A GPU's tensor cores cut partial sums of 16-bit products off where others round them: two of 2^-23 of
            # logits that go up to 24, which the temperature divides.
            atol = max(atol, 2 * 24 * 2.0**-23 / temperature)
        assert_close(out.log_prob, expected.log_prob, rtol=2.0**-20, atol=atol)
        assert_close(out.log_escape, expected.log_escape, rtol=2.0**-20)
        assert out.log_prob.dtype == out.log_escape.dtype == torch.float32


def test_lora_is_the_merged_head(backend):
    hidden, weight, bias = head(seed=40)
    a, b = normal(5, 24, seed=43, scale=0.3), normal(1500, 5, seed=44, scale=0.3)
    out = dam.linear_jump(hidden, weight, bias=bias, lora=dam.LoRA(a, b, 0.7), num_samples=3, seed=5)
    merged = weight.double() + 0.7 * b.double() @ a.double()
    with dam.backend("torch"):
        expected = dam.jump(hidden.double() @ merged.T + bias.double(), num_samples=3, seed=5)
    # 60 draws, as in the test above.
    assert torch.equal(out.target, expected.target)
    assert_close(out.log_prob, expected.log_prob, rtol=2.0**-19, atol=64 * rounding(torch.float32))


@pytest.mark.of_the_op
def test_draws_follow_the_softmax(backend):
    hidden, weight, bias = head(1, 8, 7, seed=10)
    p = torch.softmax((hidden.double() @ weight.double().T + bias.double())[0], 0)
    samples = 50 if slow(backend) else 500
    target = dam.linear_jump(hidden.expand(200, -1), weight, bias=bias, num_samples=samples, seed=6).target
    counts = torch.bincount(target.flatten(), minlength=7).cpu().numpy()
    assert scipy.stats.chisquare(counts, (p * counts.sum()).cpu().numpy()).pvalue > P_VALUE


@pytest.mark.parametrize("count", [1, 2])
def test_draws_do_not_depend_on_company(backend, monkeypatch, count):
    """Nor on how many chunks the workspace allows. Few logits are near enough for the matmul's order to matter."""
    hidden, weight, bias = head(seed=20)
    ids = integers(-(2**63), 2**63 - 1, 20, seed=21)
    whole = dam.linear_jump(hidden, weight, bias=bias, row_ids=ids, seed=7).target
    with threads(count):
        part = dam.linear_jump(hidden[7:].flip(0), weight, bias=bias, row_ids=ids[7:].flip(0), seed=7).target
        assert torch.equal(part.flip(0), whole[7:])
        monkeypatch.setenv("DAM_WORKSPACE_MB", "0.03")  # two rows at a time
        assert torch.equal(dam.linear_jump(hidden, weight, bias=bias, row_ids=ids, seed=7).target, whole)


def test_row_ids_default_to_positions_across_chunks(backend, monkeypatch):
    hidden, weight, _ = head(seed=22)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "0.03")
    named = dam.linear_jump(hidden, weight, row_ids=torch.arange(20), seed=8).target
    assert torch.equal(dam.linear_jump(hidden, weight, seed=8).target, named)
    assert torch.equal(dam.linear_jump(hidden, weight, seed=8, num_samples=2).target[:, 0], named)


def test_manual_seed_governs(backend):
    hidden, weight, _ = head(seed=23)
    torch.manual_seed(4)
    a, b = (dam.linear_jump(hidden, weight).target for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(dam.linear_jump(hidden, weight).target, a) and not torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded_by_the_workspace(backend, monkeypatch, dtype):
    """[T, V] in float32 would be 4 MB."""
    hidden, weight, bias = head(64, 4, 16384, dtype=dtype, seed=24)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "2")
    peak, _ = peak_bytes(lambda: dam.linear_jump(hidden, weight, bias=bias, seed=9))
    # Besides the workspace: the outputs and a float32 copy of a block of the head, below 0.4 MB together.
    assert peak < 2.4 * 2**20


def test_more_samples_than_the_workspace_has_room_for(backend, monkeypatch):
    hidden, weight, bias = head(3, seed=45)
    expected = dam.linear_jump(hidden, weight, bias=bias, num_samples=40, seed=9).target
    monkeypatch.setenv("DAM_WORKSPACE_MB", "0.001")
    assert torch.equal(dam.linear_jump(hidden, weight, bias=bias, num_samples=40, seed=9).target, expected)


def test_bias_can_forbid_a_destination(backend):
    hidden, weight, bias = head(50, 4, 6, seed=25)
    bias[:5] = -INF
    assert dam.linear_jump(hidden, weight, bias=bias, seed=1).target.tolist() == [5] * 50


def test_check_names_the_first_bad_row(backend, monkeypatch):
    hidden, weight, _ = head(seed=26)
    hidden[13:16, 3] = math.nan
    for workspace in ("256", "0.03"):
        monkeypatch.setenv("DAM_WORKSPACE_MB", workspace)
        with pytest.raises(ValueError, match="linear_jump: row 13 of the logits holds a NaN"):
            dam.linear_jump(hidden, weight, seed=1)
        out = dam.linear_jump(hidden, weight, seed=1, check=False)
        assert torch.equal(out.target[:13], dam.linear_jump(hidden[:13], weight, seed=1).target)


def test_strides_and_empty_batches(backend):
    wide, weight, bias = normal(20, 30, seed=27), normal(14, 40, seed=28), normal(14, seed=29)
    out = dam.linear_jump(wide[::2, :24], weight[::2, :24], bias=bias[::2], seed=2)
    dense = dam.linear_jump(
        *(x.contiguous() for x in (wide[::2, :24], weight[::2, :24])), bias=bias[::2].clone(), seed=2
    )
    assert torch.equal(out.target, dense.target)
    empty = dam.linear_jump(wide[:0, :24], weight[:, :24], num_samples=3, seed=2)
    assert empty.target.shape == (0, 3) and empty.log_escape.shape == (0,)


@pytest.mark.of_the_op
def test_opcheck(backend):
    hidden, weight, bias = head(4, 5, 30, seed=30)
    low = (normal(4, 3, seed=33), normal(30, 3, seed=34))
    excluding = (torch.tensor([0, -1, 3, 29]), torch.arange(30) % 5 == 2)
    for args in ((bias, *low, None, None, None, 1.0, 1), (None, None, None, 2.0, *excluding, 0.0, 3)):
        args = (hidden, weight, *args, torch.tensor(1), torch.arange(4), True, backend)
        torch.library.opcheck(module._linear_jump.overload, args)


@pytest.mark.of_the_op
def test_compiled_equals_eager(backend):
    hidden, weight, bias = head(6, 5, 30, seed=31)

    def draw(h):
        return dam.linear_jump(h, weight, bias=bias, num_samples=2, seed=3).target

    assert torch.equal(torch.compile(draw, fullgraph=True, backend="aot_eager")(hidden), draw(hidden))


@pytest.mark.skipif(choice.why_unavailable("triton") is not None, reason="Triton kernels cannot run here")
def test_wrong_form(monkeypatch):
    monkeypatch.setenv("DAM_LINEAR_FORM", "both")
    with torch.device(choice.DEVICE_TYPE["triton"]), dam.backend("triton"):
        with pytest.raises(ValueError, match=r"DAM_LINEAR_FORM must be one of .*; got 'both'"):
            dam.linear_jump(torch.zeros(3, 4), torch.zeros(5, 4))


def test_the_workspace_grows_with_a_card(monkeypatch):
    """1.25% of its memory, 256 MB at the least and without one, and what DAM_WORKSPACE_MB says."""
    memory = {torch.device("cuda", 0): 80 * 2**30, torch.device("cuda", 1): 8 * 2**30}
    monkeypatch.setattr(_rows, "_card", memory.__getitem__)
    monkeypatch.delenv("DAM_WORKSPACE_MB", raising=False)
    assert [_rows.workspace_bytes(card) for card in memory] == [2**30, 256 * 2**20]
    assert _rows.workspace_bytes() == _rows.workspace_bytes(torch.device("cpu")) == 256 * 2**20
    monkeypatch.setenv("DAM_WORKSPACE_MB", "100")
    assert {_rows.workspace_bytes(card) for card in memory} == {100 * 2**20}


@pytest.mark.parametrize("workspace", ["-1", "0", "nan", "inf", "lots"])
def test_wrong_workspace(monkeypatch, workspace):
    monkeypatch.setenv("DAM_WORKSPACE_MB", workspace)
    with pytest.raises(ValueError, match=f"DAM_WORKSPACE_MB must be .*; got '{workspace}'"):
        dam.linear_jump(torch.zeros(3, 4), torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.zeros(())}, ValueError, r"hidden must have shape \[..., D\]; got \[\]"),
        ({"hidden": torch.zeros(3, 4).long()}, TypeError, "hidden must be float32.*got torch.int64"),
        ({"hidden": torch.zeros(4, 3).t()}, ValueError, r"hidden must have stride 1.*got strides \[1, 3\]"),
        (
            {"head_weight": torch.zeros(5, 3)},
            ValueError,
            r"head_weight must have shape \[V, 4\] to fit.*got \[5, 3\]",
        ),
        ({"head_weight": torch.zeros(0, 4)}, ValueError, r"head_weight must have at least one row; got shape \[0, 4\]"),
        (
            {"head_weight": torch.zeros(5, 4).half()},
            TypeError,
            "head_weight must have the dtype of.*got torch.float16",
        ),
        ({"head_weight": torch.zeros(4, 5).t()}, ValueError, r"head_weight must have stride 1.*got strides \[1, 5\]"),
        ({"head_weight": torch.zeros(5, 4, device="meta")}, ValueError, "head_weight must be on cpu .*; got meta"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[5\]; got \[4\]"),
        ({"bias": torch.zeros(5).half()}, TypeError, "bias must have the dtype of head_weight.*got torch.float16"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor; got float"),
        ({"lora": (1, 2)}, TypeError, r"lora must be a dam.LoRA or None; got tuple"),
        ({"lora": dam.LoRA(torch.zeros(2, 3), torch.zeros(5, 2))}, ValueError, r"lora.a must have shape \[2, 4\]"),
        ({"lora": dam.LoRA(torch.zeros(2, 4), torch.zeros(5, 3))}, ValueError, r"lora.b must have shape \[5, 2\]"),
        ({"lora": dam.LoRA(torch.zeros(2, 4), torch.zeros(5, 2).half())}, TypeError, "lora.b must have the dtype"),
        ({"lora": dam.LoRA(torch.zeros(2, 4), torch.zeros(5, 2), "1")}, TypeError, "lora.scale must be a number"),
        ({"exclude": 5}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
        ({"exclude": torch.tensor([0, 5, 0])}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
        ({"temperature": -1}, ValueError, "temperature must be .*; got -1"),
        ({"num_samples": 0}, ValueError, r"num_samples must be in \[1, 2\^24\); got 0"),
        ({"seed": "1"}, TypeError, "seed must be an int, an int64 tensor or None; got str"),
        ({"row_ids": torch.arange(4)}, ValueError, r"row_ids must have shape \[3\]; got \[4\]"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^linear_jump: .*{message}"):
        dam.linear_jump(**{"hidden": torch.zeros(3, 4), "head_weight": torch.zeros(5, 4), **arguments})
