"""FlowTrainer: that it ends in the tilt of the base, what it calls with what, and what it logs, evaluates and saves."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from flow_tiny import FLOAT64, PROCESS, ROWS, Law, Network, direct, near_goal, tiny_config
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import assert_same_weights, logged
from torch import nn

from dam import flows
from dam.flows import matching
from dam.train import FlowTrainer
from dam.train.flow_figures import path_figures
from dam.train.flow_rows import Rows
from dam.train.flow_targets import TargetBuffer

LINEAR, QUADRATIC = torch.tensor([1.0, 0.6], dtype=FLOAT64), torch.tensor([1.0, 0.5], dtype=FLOAT64)


def quadratic(state):
    return state @ LINEAR - state.square() @ QUADRATIC / 2


def trained(output, model=None, reward=near_goal, rows=ROWS, resume=None, **changes):
    """A trainer after its run, of the small network unless a model is given."""
    given = {name: changes.pop(name) for name in ("ref_model", "peft_config", "call", "process") if name in changes}
    network = Network() if model is None else model
    trainer = FlowTrainer(network, reward, tiny_config(output, **changes), rows, shape=(3,), **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ---- what it ends in


@pytest.mark.parametrize(
    ("near", "changes"),
    [
        # Paths' noise is the error: a fourth of it is seen with a second seed.
        (0.06, {"generation_batch_size": 64, "diffusion_steps": 12, "max_steps": 40}),
        pytest.param(
            1e-2, {"generation_batch_size": 256, "diffusion_steps": 30, "max_steps": 120}, marks=pytest.mark.full
        ),
    ],
)
def test_a_gaussian_base_is_trained_to_the_exact_tilt(tmp_path, near, changes):
    """Mean and standard deviation, by a model that has the tilt in its family; the base is far from it."""
    model, beta = Law(), 0.8
    config = tiny_config(
        tmp_path, beta=beta, num_iterations=4, per_device_train_batch_size=10**5, learning_rate=0.05, **changes
    )
    trainer = FlowTrainer(model, quadratic, config, shape=(2,))
    trainer.train()
    optimum = Law().law().tilted(LINEAR / beta, QUADRATIC / beta)
    assert float((Law().law().moments()[0] - optimum.moments()[0]).detach().abs().min()) > 0.2
    for found, best in zip(model.law().moments(), optimum.moments(), strict=True):
        torch.testing.assert_close(found.detach(), best, rtol=0, atol=near)
    # The last rollouts' figures are those of the optimum: KL = E[r] / beta - log Z, of 64 paths at least.
    kl = [entry["kl_path"] for entry in logged(trainer) if "kl_path" in entry]
    variance, best = Law().law().variance[0], optimum.variance[0]
    gap = optimum.mean[0] - Law().law().mean[0]
    exact = (((best / variance) - 1 - (best / variance).log() + gap.square() / variance).sum() / 2).item()
    assert kl[0] == 0 and abs(sum(kl[-3:]) / 3 - exact) < 0.25 * exact


@pytest.mark.parametrize("learner", ["draft", pytest.param("refl", marks=pytest.mark.full)])
def test_direct_learners_go_after_the_reward(tmp_path, learner):
    """Beyond the tilt of any beta: the mean toward the reward's maximum, and the spread of the law lost."""
    model, late = Law(), {"draft": {"draft_steps": 2}, "refl": {"refl_from": 0.6}}
    config = tiny_config(
        tmp_path, max_steps=25, diffusion_steps=5, learning_rate=0.1, logging_steps=25,
        **direct(learner, per_device_train_batch_size=16, **late[learner]),
    )  # fmt: skip
    FlowTrainer(model, quadratic, config, shape=(2,)).train()
    best, (mean, spread) = LINEAR / QUADRATIC, (value.detach() for value in model.law().moments())
    before = Law().law().moments()
    assert bool(((mean - best).abs() < 0.7 * (before[0] - best).abs()).all())
    assert bool((spread < before[1]).all())


# ---- one step


def test_the_first_step_is_that_of_the_functions_in_a_loop(tmp_path):
    """All targets of a rollout, in pieces of paths: the gradient is that of `dam.flows` on all paths at once."""
    model, reference = Network(), Network()
    config = tiny_config(
        tmp_path, max_steps=1, num_iterations=1, per_device_train_batch_size=10**5, rollout_batch_size=3,
        checkpoint_every=2, optim="sgd", learning_rate=1e-3, max_grad_norm=1e9, lr_scheduler_type="constant",
        shuffle_dataset=False,
    )  # fmt: skip
    trainer = FlowTrainer(model, near_goal, config, ROWS, shape=(3,))
    seed = trainer._seed(0)
    trainer.train()
    goal, names = torch.tensor([row["goal"] for row in ROWS[:4]]), [row["name"] for row in ROWS[:4]]
    times = PROCESS.times(6)
    start = PROCESS.initial((4, 3), start=float(times[0]), seed=seed)
    velocity = lambda state, time: reference(state, time, goal)  # noqa: E731
    path = flows.simulate(PROCESS, velocity, start, times=times, seed=seed)
    slope = flows.cost_gradient(lambda x: -near_goal(x, goal, names) / 0.5, path.final)
    targets = flows.adjoint_targets(PROCESS, velocity, path, slope)
    loss = matching.loss(lambda state, time: reference(state, time, goal.repeat(6)), targets)
    loss.backward()
    assert logged(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)  # rounding of float32, as below
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), (theirs - 1e-3 * theirs.grad).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"learner": "vgg_flow", "method": "euler"}], ids=["adjoint_matching", "vgg_flow"]
)
def test_targets_are_used_in_one_order_whatever_pieces_paths_are_drawn_in(tmp_path, changes):
    """Batches of some of them, so that another order is another run; what is left is the rounding of float32."""
    whole, pieces = (
        trained(
            tmp_path / str(size), rollout_batch_size=size, matched_times=4, per_device_train_batch_size=5, **changes
        )
        for size in (1024, 3)
    )
    for ours, theirs in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_direct_learners_sample_by_the_ode_too(tmp_path):
    """No noise is in their paths: another seed is another start alone. A figure that is no KL has another name."""
    trainer = trained(tmp_path, process=PROCESS.ode(), max_steps=15, learning_rate=5e-2, **direct("draft"))
    first, last = logged(trainer)[0], logged(trainer)[-1]
    assert last["reward"] > first["reward"] + 0.3 and last["control_energy"] > 0 and "kl_path" not in last


def writes(state, goal, name):
    state.clamp_(-0.1, 0.1)
    return near_goal(state, goal, name)


@pytest.mark.parametrize("changes", [{}, direct("draft")], ids=["adjoint_matching", "draft"])
def test_a_reward_may_write_into_its_states(tmp_path, changes):
    """It is given a copy: samples and gradients are those of one that does not."""
    clamped = lambda state, goal, name: near_goal(state.clamp(-0.1, 0.1), goal, name)  # noqa: E731
    one, other = (trained(tmp_path, reward=reward, max_steps=2, **changes) for reward in (writes, clamped))
    assert_same_weights(one.model, other.model)
    samples = torch.as_tensor(one.predict(ROWS).predictions)
    assert float(samples.abs().max()) > 0.1 and torch.equal(samples, torch.as_tensor(other.predict(ROWS).predictions))


def test_a_configuration_may_be_changed_by_replace(tmp_path):
    config = tiny_config(tmp_path, **direct("draft"))
    changed = dataclasses.replace(config, per_device_train_batch_size=8)
    assert (config.prompts_per_rollout, changed.prompts_per_rollout) == (4, 8)


def test_figures_of_paths_are_those_of_their_weights():
    """KL(model || base) and |a_t| against `simulate`'s weights and `lean_adjoint`, at all times."""
    base, model = Law(), Law(mean=(1.0, 0.2), variance=(0.5, 0.7))
    times = PROCESS.times(20)
    start = PROCESS.initial((2000, 2), start=float(times[0]), seed=0, dtype=FLOAT64)
    with torch.no_grad():
        path = flows.simulate(PROCESS, model, start, times=times, base=base, weights=True, method="euler", seed=1)
        slope = flows.cost_gradient(lambda x: -quadratic(x), path.final)
        targets = flows.adjoint_targets(PROCESS, base, path, slope)
        found = path_figures(PROCESS, model, base, path, range(20), targets)
    apart = (-path.log_ratio.sum(dim=1) - found["kl_path"]).double()  # a martingale
    assert float(found["kl_path"].mean()) > 0.2
    assert abs(float(apart.mean())) < 5 * float(apart.std()) / 2000**0.5
    norm = flows.lean_adjoint(PROCESS, base, path, slope)[:-1].norm(dim=2).mean(dim=0)
    torch.testing.assert_close(found["adjoint_norm"], norm, rtol=1e-8, atol=1e-12)


def test_each_target_is_used_once_in_a_turn_and_keeps_its_condition():
    buffer = TargetBuffer()
    number = torch.arange(10.0)
    targets = matching.Targets(number[:, None], number.double(), number[:, None], torch.ones(10, dtype=FLOAT64))
    rows = Rows(torch.arange(5), {"goal": torch.arange(5), "name": list("abcde")})
    buffer.fill(targets, torch.arange(10) % 5, rows)
    batches = [buffer.batch(n, 4, seed=3, device=torch.device("cpu")) for n in range(5)]
    seen = torch.cat([batch.targets.time for batch in batches])
    assert seen[:10].sort().values.tolist() == seen[10:].sort().values.tolist() == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    for batch in batches:
        assert torch.equal(batch.rows.columns["goal"], batch.targets.time.long() % 5)
        assert batch.rows.columns["name"] == ["abcde"[n] for n in batch.rows.columns["goal"].tolist()]
        assert torch.equal(batch.targets.weight, torch.full((4,), 2.5, dtype=FLOAT64))
    assert len(buffer.batch(0, 99, seed=3, device=torch.device("cpu")).targets.time) == 10


@pytest.mark.full
@pytest.mark.parametrize("learner", ["draft", "refl"])
def test_the_first_step_of_direct_learners_is_that_of_the_functions_in_a_loop(tmp_path, learner):
    """On two parts of the step's paths, whose gradients are averaged."""
    model, reference = Network(), Network()
    of_learner = {"draft": {"draft_steps": 3}, "refl": {"refl_from": 0.5}}
    config = tiny_config(
        tmp_path, max_steps=1, optim="sgd", learning_rate=1e-2, max_grad_norm=1e9, lr_scheduler_type="constant",
        shuffle_dataset=False,
        **direct(learner, per_device_train_batch_size=2, gradient_accumulation_steps=2, **of_learner[learner]),
    )  # fmt: skip
    trainer = FlowTrainer(model, near_goal, config, ROWS, shape=(3,))
    times = PROCESS.times(6)
    late = [n for n in range(6) if float(times[n]) >= 0.5]
    seed, k = trainer._seed(0), late[int(torch.randint(len(late), (), generator=trainer._generator(5)))]
    trainer.train()
    for rows in (ROWS[:2], ROWS[2:4]):
        goal, names = torch.tensor([row["goal"] for row in rows]), [row["name"] for row in rows]
        velocity = lambda state, time, goal=goal: reference(state, time, goal)  # noqa: E731
        cost = lambda x, goal=goal, names=names: -near_goal(x, goal, names)  # noqa: E731
        ids = torch.tensor([ROWS.index(row) for row in rows])
        start = PROCESS.initial((2, 3), start=float(times[0]), seed=seed, row_ids=ids)
        path = flows.simulate(PROCESS, velocity, start, times=times, seed=seed, row_ids=ids)
        if learner == "draft":
            loss = flows.draft_loss(path, velocity, cost, last=3)
        else:
            loss = flows.refl_loss(PROCESS, velocity, path.state(k), path.times[k], cost)
        (loss / 2).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), (theirs - 1e-2 * theirs.grad).detach(), rtol=1e-4, atol=1e-6)


class Value(nn.Module):
    """The residual of a value's gradient, of three coordinates with a condition."""

    def __init__(self, seed=5):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, state, time, goal):
        return self.layers(torch.cat((state, time[:, None], goal[:, None]), dim=1))


@pytest.mark.parametrize("looks", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_first_step_of_vgg_flow_is_that_of_the_functions_in_a_loop(tmp_path, looks):
    """Of flow and value, each clipped by itself, with the reward's gradients counted."""
    model, reference, value, of_loop = Network(), Network(), Value(), Value()
    config = tiny_config(
        tmp_path, learner="vgg_flow", forward_looking=looks, max_steps=1, num_iterations=1, rollout_batch_size=3,
        per_device_train_batch_size=10**5, optim="sgd", learning_rate=1e-2, max_grad_norm=0.5, value_boundary=2.0,
        value_consistency=0.1, lr_scheduler_type="constant", shuffle_dataset=False,
    )  # fmt: skip
    trainer = FlowTrainer(model, near_goal, config, ROWS, shape=(3,), value=value)
    seed = trainer._seed(0)
    trainer.train()
    goal, ode = torch.tensor([row["goal"] for row in ROWS[:4]]), PROCESS.ode()

    def of(goal):
        names = ["goal"] * len(goal)
        cost = lambda x: -near_goal(x, goal, names) / 0.5  # noqa: E731
        base = lambda state, time: Network()(state, time, goal)  # noqa: E731
        learned = lambda state, time: of_loop(state, time, goal)  # noqa: E731
        return base, cost, flows.forward_looking(ode, base, cost, learned) if looks else learned

    base, cost, gradient = of(goal)
    times = ode.times(6)
    start = ode.initial((4, 3), start=float(times[0]), seed=seed)
    path = flows.simulate(ode, base, start, times=times, seed=seed)
    terminal = flows.cost_gradient(cost, path.final)
    targets = flows.value_targets(ode, base, gradient, path)
    matched = matching.loss(lambda state, time: reference(state, time, goal.repeat(6)), targets)
    of_all = of(goal.repeat(6))
    left = flows.consistency_loss(ode, of_all[0], of_all[2], targets.state, targets.time)
    end = flows.boundary_loss(gradient, path, terminal)
    loss = matched + 0.1 * left + 2.0 * end
    loss.backward()
    assert logged(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)  # rounding of float32, as below
    for trained_one, looped in ((model, reference), (value, of_loop)):
        nn.utils.clip_grad_norm_(looped.parameters(), 0.5)
        for ours, theirs in zip(trained_one.parameters(), looped.parameters(), strict=True):
            torch.testing.assert_close(ours.detach(), (theirs - 1e-2 * theirs.grad).detach(), rtol=1e-4, atol=1e-6)
    # Of paths' ends once; then of all targets, of them again in the two of the consistency, and of the ends.
    assert trainer.reward_calls == 4 + (24 + 2 * 24 + 4) * looks


def test_vgg_flow_without_a_value_matches_to_lean_adjoints(tmp_path):
    """And the energy of its control is none of a KL's."""
    trainer = trained(tmp_path, learner="vgg_flow", max_steps=12, learning_rate=5e-2, logging_steps=2)
    first, last = logged(trainer)[0], logged(trainer)[-1]
    assert last["reward"] > first["reward"] + 0.3 and last["control_energy"] > first["control_energy"] == 0.0
    assert "kl_path" not in first and last["adjoint_norm"] > 0


# ---- the model and its base


class Recorder(nn.Module):
    """The reward as a module of its own, which keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-1.0))
        self.seen = []

    def forward(self, state, goal, name):
        self.seen.append((goal.tolist(), list(name)))
        return self.scale * (state - goal[:, None]).square().sum(dim=1)


@pytest.mark.parametrize("changes", [{"num_generations": 2}, direct("refl", num_generations=2)], ids=["am", "refl"])
def test_model_and_reward_get_the_conditions_of_their_rows(tmp_path, changes):
    reward, called = Recorder(), []

    def call(module, state, time, goal):
        called.append(goal)
        return module(state, time, goal)

    trainer = trained(tmp_path, reward=reward, call=call, conditions=["goal"], max_steps=2, **changes)
    for goals, names in reward.seen:
        assert names == [f"goal {int(8 * goal)}" for goal in goals]
    assert len(reward.seen[1][0]) == 4 and len(set(reward.seen[1][0])) == 2  # two paths of each row
    assert not reward.scale.requires_grad and called
    assert trainer.reward_calls == 4 * (2 if changes.get("learner") else 1)


@pytest.mark.parametrize("how", ["adapter", "given"])
def test_the_base_stays_what_it_was(tmp_path, how, monkeypatch):
    """Of an adapter the module itself with what it had at first: the same run as with a base of its own."""
    lora = LoraConfig(target_modules=["0", "3"], r=2, init_lora_weights=False)
    torch.manual_seed(3)
    if how == "adapter":
        trainer = trained(tmp_path, peft_config=lora)
        names = [name for name, each in trainer.model.named_parameters() if each.requires_grad]
        assert names and all("lora" in name for name in names)
        with trainer._base.module(trainer.model) as base:
            at_first = {name: each.clone() for name, each in base.named_parameters()}
        assert any(not torch.equal(each, at_first[name]) for name, each in trainer.model.named_parameters())
        torch.manual_seed(3)
        assert_same_weights_but_trained(trainer.model, at_first)
    else:
        base = Network()
        trainer = trained(tmp_path, model=Network(seed=1), ref_model=base)
        assert_same_weights(base, Network())
        assert logged(trainer)[0]["kl_path"] > 0  # begins as another model than the base


def assert_same_weights_but_trained(model, at_first):
    for name, each in model.named_parameters():
        assert each.requires_grad or torch.equal(each, at_first[name])


def test_another_signature_is_a_line(tmp_path):
    """That of diffusers' transformers, whose time runs from data to noise in thousands, and whose velocity too."""

    class Diffusers(Network):
        def forward(self, hidden_states, timestep, goal, return_dict=True):
            return (-super().forward(hidden_states, 1 - timestep / 1000, goal),)

    call = lambda model, x, t, goal: -model(x, 1000 * (1 - t), goal, return_dict=False)[0]  # noqa: E731
    other = trained(tmp_path / "a", model=Diffusers(), call=call, max_steps=1)
    own = trained(tmp_path / "b", max_steps=1)
    for ours, theirs in zip(other.model.parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # 1 - (1 - t) is t but for a rounding


@pytest.mark.parametrize(
    ("process", "steps"), [(flows.FlowProcess(flows.VariancePreserving(), predicts="noise"), 6)], ids=["noise"]
)
def test_diffusions_are_trained_too(tmp_path, process, steps):
    trainer = trained(tmp_path, process=process, diffusion_steps=steps, max_steps=1)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logged(trainer))


def test_mixed_precision_keeps_states_in_float32(tmp_path):
    """And what is trained follows the run in float32, as far as bfloat16 goes."""
    seen = set()

    class Watched(Network):
        def forward(self, state, time, goal):
            found = super().forward(state, time, goal)
            seen.add((state.dtype, found.dtype))
            return found

    half = trained(tmp_path / "half", model=Watched(), bf16=True, max_steps=1)
    assert seen == {(torch.float32, torch.bfloat16)}
    whole = trained(tmp_path / "whole", max_steps=1)
    for ours, theirs in zip(logged(half), logged(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)


# ---- evaluation, and what is left


def test_evaluation_draws_the_same_by_the_ode_and_saves_what_it_evaluates(tmp_path):
    """With an average of the weights: what is saved is what was evaluated, and other weights than were trained."""

    def told(samples, rows):
        goal = torch.tensor([row["goal"] for row in rows])
        assert [row["name"] for row in rows] == [f"goal {int(8 * one)}" for one in goal]
        return {"distance": float((samples - goal[:, None]).norm(dim=1).mean())}

    config = tiny_config(tmp_path, ema_decay=0.5, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=2)
    trainer = FlowTrainer(Network(), near_goal, config, ROWS, ROWS[:5], shape=(3,), compute_metrics=told)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert {"eval_reward", "eval_reward_std", "eval_distance", "reward_calls"} <= first.keys()
    again = trainer.evaluate()
    assert again["eval_reward"] == second["eval_reward"] != first["eval_reward"]
    predicted = trainer.predict(ROWS[:5])
    assert predicted.predictions.shape == (5, 3) and predicted.metrics["test_reward"] == again["eval_reward"]
    trainer.save_model()
    saved = Network(seed=9)
    saved.load_state_dict(load_file(tmp_path / "model.safetensors"))
    other = FlowTrainer(saved, near_goal, tiny_config(tmp_path), ROWS, ROWS[:5], shape=(3,))
    assert other.evaluate()["eval_reward"] == again["eval_reward"]


class Endless:
    """Rows that can only be iterated over."""

    def __iter__(self):
        return iter(ROWS[:5])


def test_rows_may_come_one_after_another(tmp_path):
    """And are looked at when they come: a reward that takes none of them is told of before any step."""
    trainer = trained(tmp_path, rows=Endless(), max_steps=3, **direct("draft", draft_steps=1))
    assert trainer.reward_calls == 12
    with pytest.raises(
        ValueError, match=r"the reward 'quadratic' takes .state., and is called with 1 tensors and goal"
    ):
        trained(tmp_path, reward=quadratic, rows=Endless(), max_steps=1)


def test_without_conditions_a_run_needs_no_dataset(tmp_path):
    config = tiny_config(tmp_path, max_steps=5, eval_samples=7)
    trainer = FlowTrainer(Law(), quadratic, config, shape=(2,))
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.reward_calls == 3 * 4  # rollouts of steps 0, 2 and 4
    assert trainer.predict().predictions.shape == (7, 2)


def test_every_key_of_the_log_is_in_its_page_and_no_other(tmp_path):
    keys = set()
    for learner in ("adjoint_matching", "vgg_flow"):
        config = tiny_config(tmp_path, learner=learner, max_steps=1, eval_strategy="steps", eval_steps=1)
        trainer = FlowTrainer(
            Network(), near_goal, config, ROWS, ROWS[:2], shape=(3,), compute_metrics=lambda *_: {"<name>": 1.0}
        )
        trainer.train()
        keys |= {key for entry in trainer.state.log_history for key in entry if not key.startswith("train_")}
    page = (Path(__file__).parents[2] / "docs" / "flows.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| key \|.*?\n\n", page, flags=re.DOTALL | re.MULTILINE)
    listed = re.findall(r"`([^`]+)`", " ".join(line.split(" | ")[0] for line in table.splitlines()))
    assert keys - {"epoch", "step", "learning_rate", "total_flos", "eval_runtime", "eval_samples_per_second"} == {
        *listed
    }
