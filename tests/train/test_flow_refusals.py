"""What FlowTrainer cannot do right is refused by name, with what to do instead, before the first step."""

from pathlib import PurePosixPath

import pytest
import torch
from flow_tiny import PROCESS, ROWS, Law, Network, direct, near_goal, tiny_config
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

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
        (direct("draft", draft_steps=0), "draft_steps must be at least 1 or None; got 0"),
        ({"diffusion_steps": 0}, "diffusion_steps must be at least 1"),
        ({"learner": "vgg_flow", "value_boundary": 0.0}, "value_boundary must be > 0 and finite"),
        (direct("refl", refl_from=1.0), r"refl_from must be a time in \[0, 1\)"),
        ({"num_generations": 3}, "must be a multiple of both; got 4"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\) or None"),
        (
            direct("draft", matched_times=3),
            "matched_times is of learner adjoint_matching and vgg_flow, and draft takes",
        ),
        ({"refl_from": 0.5}, "refl_from is of learner refl, and adjoint_matching takes no notice of it: leave it out"),
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
        ({"shape": 3}, ValueError, r"shape must be that of one state, at least \(1,\); got 3"),
        ({"rows": []}, ValueError, "the training dataset is empty"),
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


def less_the_mean(state, goal, name):
    value = near_goal(state, goal, name)
    return value - value.mean()


def away(state, goal, name):
    raise ConnectionError("the judge is away")


class Several(Network):
    def forward(self, state, time, goal):
        return super().forward(state, time, goal), None


class AnyName(Network):
    def forward(self, state, time, **columns):
        return super().forward(state, time, **columns)


class Named(Network):
    def forward(self, state, time, goal, name):
        return super().forward(state, time, goal)


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
        ({"reward": scalar}, r"'scalar' must give a number for each row, \[2\]; got \[\]"),
        ({"reward": less_the_mean}, "'less_the_mean' of a state depends on the other states of its batch"),
        (
            {"reward": away},
            r"'away' raised ConnectionError at states float32 \[2, 3\], goal float32 \[2\], name list \[2\]",
        ),
        ({"model": Several()}, "the model gives tuple, no tensor: .* call=lambda model, x, t"),
        (
            {"model": Network().bfloat16()},
            r"Network raised RuntimeError at states float32 .* torch.bfloat16: set bf16=True",
        ),
        (
            {"model": AnyName(), "rows": [{**row, "number": n} for n, row in enumerate(ROWS)]},
            r"AnyName raised TypeError at .* number int64 \[2\]: .* named by `conditions`",
        ),
        (
            {"rows": [*ROWS[:5], {"goal": None, "name": "goal"}]},
            "column 'goal' of row 5 .* is no number, of row 0 .* float64",
        ),
        (
            {
                "reward": lambda state, goal, name: near_goal(state, goal, []),
                "rows": [{**row, "name": PurePosixPath("goal")} for row in ROWS],
                "conditions": ["goal", "name"],
                "model": Named(),
            },
            "column 'name' is kept with the targets .* cannot hold PurePosixPath: .* or set num_iterations=1",
        ),
        ({"reward": in_numbers}, "'in_numbers' returned list, no tensor. FlowTrainer needs a reward with a gradient"),
        (
            {"reward": without_name},
            "'without_name' takes .state, goal., and is called with 1 tensors and goal, name",
        ),
        ({"model": Blunt()}, r"a model must predict the shape of its states, \[2, 3\]; got \[2, 2\]"),
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
    with pytest.raises(
        ValueError, match=r"column 'goal' of row 6 .* float32 of shape \[2\], of row 0 .* shape \[1\]: .* pad it"
    ):
        trainer(tmp_path, lambda state, goal: -state.sum(dim=1) * goal.sum(), rows=rows, model=Any()).train()


class Any(nn.Module):
    """Takes conditions of any shape."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, state, time, goal):
        return self.scale * state


class Shares(nn.Module):
    """A reward, or a value, that has layers of another module."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.own = layers, nn.Parameter(torch.tensor(1.0))

    def forward(self, state, goal, name):
        return near_goal(state, goal, name) + self.layers(torch.zeros(len(state), 5)).sum(dim=1)


def test_what_is_trained_elsewhere_is_refused(tmp_path):
    """And is trainable still."""
    model, value = Network(), Network()
    args = tiny_config(tmp_path, learner="vgg_flow")
    for given, message in [
        (
            {"reward": Shares(model.layers)},
            "the reward shares 4 parameters with the model .*frozen with it: give it a copy",
        ),
        ({"value": Shares(model.layers)}, "value shares 4 parameters with the model .*, which both would train"),
        ({"reward": Shares(value.layers), "value": value}, "the reward shares 4 parameters with value"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, model=model, args=args, **given)
    assert all(each.requires_grad for one in (model, value) for each in one.parameters())


class Checkpointed(Network):
    def forward(self, state, time, goal):
        rows = torch.cat((state, time[:, None], goal[:, None]), dim=1)
        return checkpoint(self.layers, rows, use_reentrant=False) if torch.is_grad_enabled() else self.layers(rows)


class Normed(Network):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


def test_what_the_base_of_an_adapter_cannot_bear(tmp_path):
    lora = LoraConfig(target_modules=["0", "3"], r=2)
    biases = LoraConfig(target_modules=["3"], r=2, bias="all")  # which torch's own check does not see
    with pytest.raises(ValueError, match="activations of Sequential again on the way back"):
        trainer(tmp_path, model=Checkpointed(), peft_config=biases).train()
    with pytest.raises(ValueError, match=r"activations of Sequential again .*where module.training is True alone"):
        trainer(tmp_path, model=Checkpointed(), peft_config=lora).train()
    with pytest.raises(ValueError, match=r"norm, BatchNorm1d, of the model follows the batches .*track_running_stats"):
        trainer(tmp_path, model=Normed(), peft_config=lora)


def test_predict_is_of_one_dataset(tmp_path):
    for dataset, got in ((None, "none"), ({"a": ROWS, "b": ROWS}, "those of a, b")):
        with pytest.raises(ValueError, match=f"predict draws for one dataset, .*; got {got}"):
            trainer(tmp_path).predict(dataset)


def test_a_divided_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FlowTrainer does not divide a model"):
        trainer(tmp_path)
