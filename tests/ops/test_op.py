"""How the ops are registered with torch: what eager calls, modes and compilers get of the same op."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import profile

import dam
from dam.ops import _op
from tests import calls as examples
from tests import fresh


@_op.op("test_square")
def square(x: Tensor, scales: list[Tensor], name: str, exponent: int) -> tuple[Tensor, Tensor]:
    calls.append(torch.is_grad_enabled())
    return x**exponent, x.new_zeros(len(scales))


@square.register_fake
def _(x, scales, name, exponent):
    return torch.empty_like(x), x.new_empty(len(scales))


@_op.op("test_plain")
def plain(x: Tensor) -> Tensor:
    return x.clone()


calls: list[bool] = []


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return 2 * ctx.saved_tensors[0] * plain(grad), [None, None], None, None


square.register_autograd(_backward, setup_context=_setup_context)


def test_a_gradient_with_and_without_a_compiler():
    x = torch.tensor([1.0, -3.0], requires_grad=True)

    def step(x):
        y, other = square(x, [x.detach(), x.detach()], "name", 2)
        return y.sum() + other.sum()

    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x.grad = None
        function(x).backward()
        assert torch.equal(x.grad, 2 * x.detach())
    y, other = square(x, [], "name", 2)
    assert y.requires_grad and not other.requires_grad
    assert not any(calls)  # no graph of what the op does itself
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not square(x, [], "name", 2)[0].requires_grad


def test_an_op_without_a_gradient_refuses_one():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="dam::test_plain has no gradient"):
        plain(x).sum().backward()
    assert not plain(x.detach()).requires_grad
    with pytest.raises(RuntimeError, match="dam::test_plain has no gradient"):
        torch.compile(lambda x: plain(x).sum(), fullgraph=True, backend="eager")(x).backward()
    # So does the second derivative of an op whose gradient is an op.
    logits = torch.randn(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(dam.log_prob(logits, torch.tensor([1, 2])).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="dam::log_prob_backward has no gradient"):
        gradient.square().sum().backward()


def test_forward_derivatives_are_refused():
    x, target = torch.randn(2, 5), torch.tensor([1, 2])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp"):
            dam.log_prob(dual, target)
        with pytest.raises(RuntimeError, match="jvp"):
            dam.matching_loss(dual, target[:, None], torch.ones(2, 1), reduction="none")
        dam.jump(dual)  # has no derivative to get wrong
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.jvp(lambda y: dam.log_prob(y, target), (x,), (x,))


def test_modes_see_the_op():
    with FakeTensorMode():
        x = torch.randn(4, 8, requires_grad=True)
        dam.log_prob(x, torch.zeros(4, dtype=torch.int64)).sum().backward()
        assert x.grad.shape == (4, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with profile() as profiled:
        dam.log_prob(x, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert {"dam::log_prob", "dam::log_prob_backward"} <= {event.key for event in profiled.key_averages()}


@examples.each()
def test_every_op_is_seen_under_its_name(call):
    with profile() as profiled:
        call(*call.inputs(3, 60))
    assert f"dam::{call.name}" in {event.key for event in profiled.key_averages()}


@examples.each()
def test_every_op_without_its_numbers_has_the_same_shapes(call):
    """What compilers know of its results: dtypes too."""
    expected = {name: (x.shape, x.stride(), x.dtype) for name, x in call(*call.inputs(3, 60)).items()}
    with FakeTensorMode():
        found = {name: (x.shape, x.stride(), x.dtype) for name, x in call(*call.inputs(3, 60)).items()}
    assert found == expected


def test_a_gradient_from_outside_vmap():
    logits, target = torch.randn(3, 4, 8, requires_grad=True), torch.arange(4)
    torch.func.vmap(lambda x: dam.log_prob(x, target))(logits).sum().backward()
    expected = torch.stack([torch.autograd.grad(dam.log_prob(x, target).sum(), x)[0] for x in logits])
    assert torch.equal(logits.grad, expected)


def test_a_gradient_of_each_row_from_outside_vmap():
    logits, target, weight = torch.randn(3, 4, 8, requires_grad=True), torch.arange(4)[:, None], torch.ones(4, 1)
    upstream = torch.randn(3, 4)

    def rows(x):
        return dam.matching_loss(x, target, weight, reduction="none")

    torch.func.vmap(rows)(logits).backward(upstream)
    expected = [torch.autograd.grad(rows(x), x, u)[0] for x, u in zip(logits, upstream, strict=True)]
    assert torch.equal(logits.grad, torch.stack(expected))


def test_a_traced_module_holds_the_op():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x):
            return dam.log_prob(self.linear(x), torch.arange(4))

    model, x = Model(), torch.randn(4, 8)
    traced = torch.jit.trace(model, (x,))
    assert "dam::log_prob" in {node.kind() for node in traced.inlined_graph.nodes()}
    assert torch.equal(traced(x), model(x))


def test_nodes_are_named_after_their_op():
    logits = torch.randn(2, 5, requires_grad=True)
    assert "dam_matching_loss" in dam.matching_loss(logits, torch.zeros(2, 1).long(), torch.ones(2, 1)).grad_fn.name()


def test_an_op_can_be_defined_again():
    first = _op.Op("test_again", lambda_of(1.0))
    second = _op.Op("test_again", lambda_of(2.0))
    assert second(torch.ones(())) == 2.0 and first.name == second.name


def lambda_of(factor):
    def scaled(x: Tensor) -> Tensor:
        return factor * x

    return scaled


@pytest.mark.parametrize(
    "name",
    [
        "_C._are_functorch_transforms_active",
        "_C._AutoDispatchBelowAutograd",
        "library.Library._destroy",
        "Tag.pt2_compliant_tag",
        "autograd.forward_ad._current_level",
        "_C._dispatch_keys",
        "_C._dispatch_tls_local_include_set",
        "_C._len_torch_function_stack",
        "_C._autograd._profiler_enabled",
    ],
)
def test_a_private_name_of_torch_that_is_gone_is_an_error(name):
    """At import, by its name: without one, tangents or gradients could be taken for 0, and nothing would say so."""
    done = fresh.run(f"import torch; del torch.{name}; import dam")
    message = f"ImportError: dam rests on torch.{name}, which torch {torch.__version__} does not have"
    assert done.returncode != 0 and message in done.stderr


def test_private_names_of_torch_are_looked_up_in_one_place():
    """What the package takes from torch by names with an underscore, past _op's list: one live reading."""
    package, found = Path(dam.__file__).parent, set()
    for path in (*package.rglob("*.py"), *(package / "kernels").glob("*.py")):
        if path.is_relative_to(package / "benchmarks"):  # which a wheel has in it
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:  # dotted ones; what ends in a call is an attribute of its result
                if re.fullmatch(r"(torch|forward_ad)(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*", name):
                    found.add((path.name, name))
    assert found == {("_op.py", "forward_ad._current_level")}
