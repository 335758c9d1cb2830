"""What FlowTrainer cannot do right is refused by name, with what to do instead, before the first step."""

import pytest
import torch
from flow_tiny import PROCESS, ROWS, Law, Network, direct, near_goal, tiny_config
from torch import nn

from dam import flows
from dam.train import DAMConfig, FlowTrainer


def trainer(output, reward=near_goal, model=None, rows=ROWS, args=None, shape=(3,), **given):
    changes = {name: given.pop(name) for name in list(given) if name in ("conditions",)}
    args = tiny_config(output, **changes) if args is None else args
    return FlowTrainer(Network() if model is None else model, reward, args, rows, shape=shape, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": "reinforce"}, "learner must be one of adjoint_matching, vgg_flow, draft, refl"),
        ({"beta": 0.0}, "beta must be > 0 and finite; got 0.0"),
        ({"beta": float("inf")}, "beta must be > 0 and finite"),
        ({"method": "rk4"}, "method must be one of euler, heun; got 'rk4'"),
        ({"matched_times": 7}, "matched_times must be at most diffusion_steps, 6; got 7"),
        ({"draft_steps": 0}, "draft_steps must be at least 1 or None; got 0"),
        ({"diffusion_steps": 0}, "diffusion_steps must be at least 1"),
        ({"value_boundary": 0.0}, "value_boundary must be > 0 and finite"),
        ({"refl_from": 1.0}, r"refl_from must be a time in \[0, 1\)"),
        ({"num_generations": 3}, "must be a multiple of both; got 4"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\) or None"),
        (direct("draft") | {"num_iterations": 2}, "learner 'draft' trains through its paths, which are of one step"),
        (direct("refl") | {"generation_batch_size": 8}, "gradient_accumulation_steps \\* processes, 4, or None; got 8"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"args": DAMConfig("x", use_cpu=True)}, TypeError, "args must be a FlowConfig; got DAMConfig"),
        ({"model": lambda state, time: state}, TypeError, "the model must be a torch module"),
        ({"reward": 3.0}, TypeError, "the reward must be a function or a module; got float"),
        ({"process": PROCESS.ode()}, ValueError, "process: with noise=0 a velocity that is matched"),
        ({"process": flows.AnnealedLangevin(near_goal)}, TypeError, "process must be a FlowProcess.*docs/flows.md"),
        ({"shape": ()}, ValueError, r"shape must be that of one state, at least \(1,\)"),
        ({"rows": None}, ValueError, "Network takes .* called with 2 tensors and no columns: .*'goal'"),
        ({"model": Network().half()}, ValueError, "is to be trained in float16"),
    ],
)
def test_trainers_that_cannot_be(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, **given).train()


@pytest.mark.parametrize(
    ("value", "changes", "given", "message"),
    [
        (Network(), {}, {}, 'value goes with learner "vgg_flow"; got .adjoint_matching'),
        (Network(), {"fp16": True}, {}, "value is trained without a scale of its gradients: use bf16=True"),
        (
            Network(),
            {},
            {"optimizers": (torch.optim.SGD(Network().parameters(), lr=1.0), None)},
            "leave optimizers out",
        ),
        (Network().requires_grad_(False), {}, {}, "no parameter of value is trainable"),
        (lambda state, time, goal: state, {}, {}, "value must be a torch module"),
    ],
)
def test_a_value_that_cannot_be_trained(tmp_path, value, changes, given, message):
    learner = "adjoint_matching" if "goes with" in message else "vgg_flow"
    args = tiny_config(tmp_path, learner=learner)
    for name, new in changes.items():
        setattr(args, name, new)  # arguments themselves refuse fp16 on a CPU
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, args=args, value=value, **given).train()


def test_without_a_dataset_the_length_of_a_run_must_be_said(tmp_path):
    with pytest.raises(ValueError, match="without a train_dataset max_steps must say how long a run is"):
        trainer(tmp_path, model=Law(), rows=None, args=tiny_config(tmp_path, max_steps=-1), shape=(2,))


def test_what_a_module_cannot_do(tmp_path):
    args = tiny_config(tmp_path, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"a model that has gradient_checkpointing_enable\(\), which Network"):
        trainer(tmp_path, args=args)
    args = tiny_config(tmp_path, diffusion_steps=2, refl_from=0.9, **direct("refl"))
    with pytest.raises(ValueError, match=r"a path of 2 steps has no time in \[refl_from, 1\)"):
        trainer(tmp_path, args=args)
    frozen = Network().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        trainer(tmp_path, model=frozen).train()


def rounded(state, goal, name):
    return torch.as_tensor([float(one.norm() > 1) for one in state])


def hidden(state, goal, name):
    with torch.no_grad():
        return near_goal(state, goal, name)


def of_conditions(state, goal, name):
    return goal * nn.Parameter(torch.tensor(1.0))


def scalar(state, goal, name):
    return near_goal(state, goal, name).sum()


def in_numbers(state, goal, name):
    return near_goal(state, goal, name).tolist()


def without_name(state, goal):
    return -state.sum(dim=1)


class Blunt(Network):
    """Predicts another shape."""

    def forward(self, state, time, goal):
        return super().forward(state, time, goal)[:, :2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": rounded}, "'rounded' does not depend on the states .* dam.train.DAMTrainer \\(docs/method.md\\)"),
        ({"reward": hidden}, "'hidden' does not depend on the states in a way that autograd can follow"),
        ({"reward": of_conditions}, "'of_conditions' does not depend on the states"),
        ({"reward": scalar}, r"'scalar' must give a number for each row, \[1\]; got \[\]"),
        ({"reward": in_numbers}, "'in_numbers' returned list, no tensor. FlowTrainer needs a reward with a gradient"),
        (
            {"reward": without_name},
            "'without_name' takes .state, goal., and is called with 1 tensors and goal, name",
        ),
        ({"model": Blunt()}, r"a model must predict the shape of its states, \[1, 3\]; got \[1, 2\]"),
        ({"conditions": ["gaol"]}, "conditions names gaol, and the dataset has goal, name"),
        ({"conditions": []}, "Network takes .*missing a required argument: 'goal'.* named by `conditions`"),
        ({"conditions": ["goal", "name"]}, "Network takes .*called with 2 tensors and goal, name"),
        ({"rows": [*ROWS[:3], {"goal": 1.0}, *ROWS]}, "row 3 of the training dataset has columns .'goal'., and row 0"),
        ({"rows": [ROWS, *ROWS]}, "row 0 of the training dataset must be a mapping .* got list"),
    ],
)
def test_what_does_not_fit_is_told_before_the_first_step(tmp_path, given, message):
    """And nothing is saved of a run that has not begun."""
    one = trainer(tmp_path, **given)
    with pytest.raises(ValueError, match=message):
        one.train()
    assert one.reward_calls == 0 and not list(tmp_path.glob("checkpoint-*"))


def test_conditions_of_different_shapes_are_named(tmp_path):
    rows = [{"goal": torch.zeros(1 + n // 6)} for n in range(8)]
    with pytest.raises(ValueError, match=r"column 'goal' of row . of the training dataset has shape .*: pad"):
        trainer(tmp_path, lambda state, goal: -state.sum(dim=1) * goal.sum(), rows=rows, model=Any()).train()


class Any(nn.Module):
    """Takes conditions of any shape."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, state, time, goal):
        return self.scale * state


def test_a_divided_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FlowTrainer does not divide a model"):
        trainer(tmp_path)
