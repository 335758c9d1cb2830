"""examples/dare: a step of DARE's loop on a CPU, behind its recorded interfaces, against float64 and dam's own loss."""

import copy
import importlib.util
import itertools
import math
import os
import subprocess
import types

import numpy as np
import pytest
import torch

from dam.adjoint import estimator_loss, path_targets
from dam.ctmc import MaskedCTMC
from dam.models import MaskedLM
from dam.models.denoiser import Tabular
from dam.rollout import rollout
from dam.train import DAMConfig
from tests import ranks
from tests.examples.dare_interfaces import RECIPE, Config, DataProto, recipe
from tests.train.tiny import rotary_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MASK, STOP, LENGTH, TIMES = 0, 5, 4, 3  # the model has six ids, of which the tokenizer has all
PROMPTS = torch.tensor([[1, 1, 2, 3], [1, 4, 3, 2], [2, 3, 4, 2], [1, 1, 1, 4]])  # padded with 1 on the left


class Tokenizer:
    mask_token_id, eos_token_id, pad_token_id = MASK, STOP, 1

    def __len__(self):
        return 6


@pytest.fixture
def dare(monkeypatch):
    return recipe(monkeypatch)


def rollout_config(**changes):
    values = {
        "n": TIMES,
        "temperature": 0.8,
        "response_length": LENGTH,
        "num_diffusion_steps": 2,
        "block_length": LENGTH,
        "max_num_batched_tokens": 40,  # five rows at a time
        "cfg_scale": 0.0,
        "val_kwargs": Config(temperature=0, num_diffusion_steps=LENGTH),
    }
    return Config({**values, **changes})


def actor_config(**changes):
    values = {
        "ppo_epochs": 1,
        "ppo_mini_batch_size": 12,
        "ppo_micro_batch_size_per_gpu": 5,
        "grad_clip": 1e9,
        "use_dynamic_bsz": False,
        "ulysses_sequence_parallel_size": 1,
        "kl_loss_coef": 0.0,
        "entropy_coeff": 0.0,
    }
    return Config({**values, **changes})


def prompts():
    mask = torch.ones_like(PROMPTS)
    mask[[0, 3], 0] = 0
    tensors = {"input_ids": PROMPTS, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return DataProto.from_dict(tensors)


def drawn(dare, model, **changes):
    torch.manual_seed(0)
    return dare.rollout.DAMRollout(model, rollout_config(**changes), Tokenizer()).generate_sequences(prompts())


def log_prob_by_hand(model, batch, law, steps):
    """log p in float64 of each token of the response at the state that its network call saw."""
    mask = batch["attention_mask"].clone()
    mask[:, -LENGTH:] = 1
    found = torch.zeros(batch["responses"].shape, dtype=torch.float64)
    for call in range(steps):
        state = batch["input_ids"].clone()
        state[:, -LENGTH:] = torch.where(batch["unmask_call"] < call, batch["responses"], MASK)
        with torch.no_grad():
            logits = model(input_ids=state, attention_mask=mask).logits[:, -LENGTH:].double() / law.temperature
        logits[..., MASK] = -torch.inf
        of = logits.log_softmax(-1).gather(2, batch["responses"][..., None])[..., 0]
        found = torch.where(batch["unmask_call"] == call, of, found)
    return found


def step_of_fit(dare, model, base, config, **changes):
    """What DARE's fit does up to the update, its groups torn apart as balance_batch does: the batch, its actor."""
    batch = DataProto(
        {"index": torch.arange(len(PROMPTS))}, {"uid": np.array([f"prompt {n}" for n in "acbd"], dtype=object)}
    )
    batch = batch.repeat(TIMES).union(drawn(dare, model, **changes))
    batch.reorder(torch.randperm(len(batch), generator=torch.Generator().manual_seed(1)))
    meta_info = {"micro_batch_size": 5, "use_dynamic_bsz": False, "temperature": 0.8}
    batch.meta_info |= meta_info
    actor = dare.actor.DLLMDataParallelPPOActor(config, model, torch.optim.SGD(model.parameters(), lr=0.1))
    reference = dare.actor.DLLMDataParallelPPOActor(actor_config(), base)
    _, batch.batch["old_log_probs"], _ = actor.compute_log_prob(data=batch, calculate_entropy=True)
    entropy, batch.batch["ref_log_probs"], of_sample = reference.compute_log_prob(data=batch, calculate_entropy=True)
    assert torch.equal(entropy, -batch.batch["ref_log_probs"]) and torch.equal(of_sample, entropy)
    scores = torch.zeros(len(batch), LENGTH)
    scores[:, -1] = (batch.batch["responses"] == 3).float().mean(dim=1)
    batch.batch["token_level_scores"] = batch.batch["token_level_rewards"] = scores
    return batch, actor


def test_a_rollout_fills_in_whole_responses_and_says_by_which_call_and_law(dare):
    model = rotary_model()
    found = drawn(dare, model, block_length=2)
    batch, law = found.batch, found.meta_info["dam"]
    assert torch.equal(batch["prompts"], PROMPTS.repeat_interleave(TIMES, 0))
    assert torch.equal(batch["input_ids"], torch.cat((batch["prompts"], batch["responses"]), dim=1))
    assert not (batch["responses"] == MASK).any() and len(batch["responses"].unique(dim=0)) > 6
    # Two calls, the first of which fills the first block: both of its positions.
    assert batch["unmask_call"].tolist() == [[0, 0, 1, 1]] * 12
    assert law == dare.loss.Law(MASK, 0.8, exact=False, stop=(STOP,), vocabulary=6)
    text = batch["attention_mask"][:, -LENGTH:]
    for row, shown in zip(batch["responses"].tolist(), text.sum(1).tolist(), strict=True):
        assert shown == (row.index(STOP) + 1 if STOP in row else LENGTH)
    assert 0 < text.sum() < text.numel() and model.training
    assert batch["position_ids"][0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]


def test_a_rollout_of_as_many_calls_as_tokens_in_one_block_is_of_the_exact_chain(dare):
    found = drawn(dare, rotary_model(), num_diffusion_steps=LENGTH)
    assert found.meta_info["dam"].exact
    assert found.batch["unmask_call"].sort(dim=1).values.tolist() == [list(range(LENGTH))] * 12
    assert len(found.batch["unmask_call"].unique(dim=0)) > 6  # in random order


def test_validation_takes_the_likeliest_tokens_one_for_each_prompt(dare):
    given = prompts()
    given.meta_info["validate"] = True
    engine = dare.rollout.DAMRollout(rotary_model(), rollout_config(), Tokenizer())
    first, again = (engine.generate_sequences(given).batch["responses"] for _ in range(2))
    assert first.shape == (4, LENGTH) and torch.equal(first, again)


def test_log_probabilities_are_those_of_the_call_that_drew_the_token(dare):
    model, base = rotary_model(), rotary_model(seed=1)
    batch, _ = step_of_fit(dare, model, base, actor_config(), num_diffusion_steps=3)
    law = batch.meta_info["dam"]
    for name, network in (("old_log_probs", model), ("ref_log_probs", base)):
        by_hand = log_prob_by_hand(network, batch.batch, law, 3)
        torch.testing.assert_close(batch.batch[name].double(), by_hand, rtol=0, atol=2e-6)
    assert (batch.batch["old_log_probs"] - batch.batch["ref_log_probs"]).abs().max() > 0.01


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_weights_are_those_of_each_prompts_group_wherever_its_rows_are(dare, leave_one_out):
    batch, _ = step_of_fit(dare, rotary_model(), rotary_model(seed=1), actor_config())
    settings = {"beta": 0.3, "target_ess": None, "max_tilt": 0.5, "full_tilt_from": None}
    told = dare.loss.weigh(batch, {**settings, "leave_one_out": leave_one_out}, done=0.0)
    path = (batch.batch["ref_log_probs"].double() - batch.batch["old_log_probs"].double()).sum(1)
    score = 0.5 * (path + batch.batch["token_level_scores"].double().sum(1) / 0.3)
    for name in set(batch.non_tensor_batch["uid"]):
        rows = torch.from_numpy(batch.non_tensor_batch["uid"] == name)
        share = score[rows].softmax(0)
        expected = TIMES * share
        if leave_one_out:
            expected = ((TIMES - 1) * share / (1 - share)).clamp(max=TIMES)
        torch.testing.assert_close(batch.batch["path_weight"][rows].double(), expected, rtol=1e-5, atol=1e-6)
    assert told["dam/tilt"] == 0.5
    assert told["dam/kl_path"] == pytest.approx(-float(path.mean()), abs=1e-6)


def test_weights_keep_the_effective_sample_size_and_let_go_as_the_run_ends(dare):
    batch, _ = step_of_fit(dare, rotary_model(), rotary_model(seed=1), actor_config())
    given = {"beta": 0.01, "target_ess": 2.0, "leave_one_out": False}
    told = [dare.loss.weigh(batch, given, done) for done in (0.0, 0.25, 0.5)]
    limits = [DAMConfig(output_dir="none", target_ess=2.0).step_limits(done) for done in (0.0, 0.25, 0.5)]
    assert [ess for ess, _ in limits] == [2.0, 1.5, None]
    for each, (ess, _) in zip(told[:2], limits[:2], strict=True):
        assert each["dam/ess"] >= ess - 1e-6 and each["dam/tilt"] < 1
    assert told[2]["dam/tilt"] == 1.0 and told[0]["dam/tilt"] < told[1]["dam/tilt"]


# The loss


def tabular(rows):
    """A float64 table for sequences of one prompt token and three masks, of tokens 0 (the mask) to 3; and a batch."""
    generator = torch.Generator().manual_seed(3)
    model = Tabular(torch.randn(4**4, 4, 4, generator=generator, dtype=torch.float64), tokens=4)
    response = torch.tensor([[1, 3, 2], [2, 2, 1]]).repeat(rows, 1)
    ids = torch.cat((torch.full((len(response), 1), 2), response), dim=1)
    return model, {
        "input_ids": ids,
        "responses": response,
        "attention_mask": torch.ones_like(ids),
        "unmask_call": torch.tensor([[1, 0, 1], [2, 0, 1]]).repeat(rows, 1),
        "path_weight": torch.tensor([0.25, 1.75], dtype=torch.float64).repeat(rows),
    }


def minus_log_prob(model, final, masked, position):
    """-log p(token | state) of `final` with masks at `masked`, in float64."""
    state = final.clone()
    state[list(masked)] = 0
    logits = model.logits[model.index(state[None])[0], position].detach() / 0.7
    logits[0] = -torch.inf
    return -float(logits.log_softmax(0)[final[position]])


def expected_on_paths(model, final, call):
    """Mean over the jump that is drawn of the mean over the jumps of its call."""
    total = 0.0
    for jump in call:
        masked = [1 + i for i, c in enumerate(call) if c >= jump]
        of_call = [1 + i for i, c in enumerate(call) if c == jump]
        total += sum(minus_log_prob(model, final, masked, i) for i in of_call) / len(of_call)
    return total / len(call)


def expected_at_outcomes(model, final):
    """Mean over the number of masks, over sets of so many, and over their positions."""
    total = 0.0
    for number in (1, 2, 3):
        sets = list(itertools.combinations((1, 2, 3), number))
        total += sum(minus_log_prob(model, final, s, i) for s in sets for i in s) / (number * len(sets))
    return total / 3


@pytest.mark.parametrize("exact", [False, True])
def test_the_loss_has_the_mean_that_enumerating_states_in_float64_has(dare, exact):
    copies = 3000
    model, batch = tabular(copies)
    law = dare.loss.Law(0, 0.7, exact=exact)
    values = []
    for part in range(20):  # batches of 300 rows each: their spread is the error's
        rows = slice(part * 300, (part + 1) * 300)
        own = {name: value[rows] for name, value in batch.items()}
        ids = torch.arange(300) + 300 * part
        values.append(float(dare.loss.matching_loss(model, own, law, seed=5, row_ids=ids).detach()))
    finals, calls, weights = batch["input_ids"][:2], batch["unmask_call"][:2].tolist(), batch["path_weight"][:2]
    expected = sum(
        w * (expected_at_outcomes(model, final) if exact else expected_on_paths(model, final, call))
        for final, call, w in zip(finals, calls, weights.tolist(), strict=True)
    )
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - expected / 2) < 6 * spread and spread < 0.02 * expected


def test_a_state_of_a_path_has_the_rows_of_all_that_its_call_drew(dare):
    batch = drawn(dare, rotary_model()).batch
    batch["path_weight"] = torch.ones(12)
    targets = dare.loss.targets_of(batch, dare.loss.Law(MASK, 0.8, exact=False), seed=1, row_ids=torch.arange(12))
    assert targets.row.bincount().tolist() == [2] * 12
    assert set((targets.states == MASK).sum(dim=1).tolist()) == {2, 4}  # of the second and of the first call


def test_rows_behind_an_end_that_a_state_shows_are_not_trained(dare):
    _, batch = tabular(1)
    law = dare.loss.Law(0, 0.7, exact=False, stop=(3,))
    for seed in range(8):
        whole, cut = (
            dare.loss.targets_of(batch, each, seed=seed, row_ids=torch.arange(2))
            for each in (law._replace(stop=()), law)
        )
        # Of the first row 3 is at position 2 and came in call 0: later positions are behind it in all later states.
        behind = (whole.row == 0) & (whole.position == 3) & (whole.states[whole.row, 2] == 3)
        assert len(cut.row) == len(whole.row) - int(behind.sum())
        assert not ((cut.row == 0) & (cut.position == 3) & (cut.states[cut.row, 2] == 3)).any()


@pytest.mark.parametrize("exact", [False, True])
def test_an_update_is_a_step_on_the_loss_of_the_whole_mini_batch(dare, exact):
    """In micro-batches of five of twelve rows: as dam's functions have it for all at once, to rounding."""
    model, steps = rotary_model(), LENGTH if exact else 2
    before = copy.deepcopy(model)
    batch, actor = step_of_fit(dare, model, rotary_model(seed=1), actor_config(), num_diffusion_steps=steps)
    dare.loss.weigh(batch, None, done=0.0)
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, ()))
    law = batch.meta_info["dam"]
    assert law.exact == exact
    targets = dare.loss.targets_of(batch.batch, law, seed=seed, row_ids=torch.arange(12))
    mask = batch.batch["attention_mask"].clone()
    mask[:, -LENGTH:] = 1
    process = MaskedCTMC(MASK, vocabulary=6)
    loss = estimator_loss(MaskedLM(before), targets, process, mask[targets.group], temperature=0.8)
    loss.backward()
    torch.manual_seed(7)
    metrics = actor.update_policy(data=batch)
    assert metrics["actor/dam_loss"] == [pytest.approx(float(loss.detach()), rel=1e-5)] and loss > 0
    norm = torch.stack([p.grad.norm() for p in before.parameters() if p.grad is not None]).norm()
    assert metrics["actor/grad_norm"] == [pytest.approx(float(norm), rel=1e-4)]
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        step = torch.zeros_like(old) if old.grad is None else -0.1 * old.grad
        torch.testing.assert_close(new - old, step, rtol=1e-3, atol=1e-7, msg=name)


def test_the_targets_are_dams_own_for_the_rollouts_own_trajectories(dare):
    """One position per call in blocks of two: each trajectory is known whole, by its calls."""
    model = rotary_model()
    found = drawn(dare, model, num_diffusion_steps=LENGTH, block_length=2, max_num_batched_tokens=1000)
    batch, law = found.batch, found.meta_info["dam"]
    batch["path_weight"] = torch.linspace(0.2, 2.0, 12)
    torch.manual_seed(0)
    seed = int(torch.randint(2**62, ()))
    masks = torch.full((12, LENGTH), MASK)
    mask = torch.cat((prompts().batch["attention_mask"].repeat_interleave(TIMES, 0), torch.ones_like(masks)), dim=1)
    paths = rollout(
        MaskedLM(model.eval()),
        torch.cat((PROMPTS.repeat_interleave(TIMES, 0), masks), dim=1),
        MaskedCTMC(MASK, vocabulary=6),
        attention_mask=mask,
        steps=LENGTH,
        block_length=2,
        temperature=0.8,
        seed=seed,
    )
    assert torch.equal(paths.final, batch["input_ids"]) and not law.exact
    ids = torch.arange(12)
    own = path_targets(paths, batch["path_weight"][:, None], whole_calls=True, seed=3, row_ids=ids)
    for ours, theirs in zip(dare.loss.targets_of(batch, law._replace(stop=()), seed=3, row_ids=ids), own, strict=True):
        assert torch.equal(ours, theirs)


def test_an_update_asks_the_output_layer_for_no_logits(dare):
    model = rotary_model()
    batch, actor = step_of_fit(dare, model, rotary_model(seed=1), actor_config())  # compares with the model's own once
    dare.loss.weigh(batch, None, done=0.0)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, output: seen.append(output.numel()))
    actor.compute_log_prob(data=batch)
    actor.update_policy(data=batch)
    assert len(seen) == 3 * 2 + 3 and set(seen) == {0}  # three micro-batches of two calls each, and three of the update


@pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < (2, 7), reason="FSDP2 needs a GPU before 2.7")
@pytest.mark.full
def test_two_processes_that_fsdp2_divides_a_model_among_do_what_one_does(dare, tmp_path):
    """Rollouts to the token, log-probabilities, loss, norm and update to rounding; each process has half the rows."""
    ranks.succeed("tests.examples.dare_run", 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = rotary_model()
    batch = drawn(dare, model)
    batch.meta_info |= {"micro_batch_size": 12, "use_dynamic_bsz": False}
    for name in ("responses", "unmask_call"):
        assert torch.equal(torch.cat((first[name], second[name])), batch.batch[name]), name
    actor = dare.actor.DLLMDataParallelPPOActor(actor_config(), model, torch.optim.SGD(model.parameters(), lr=0.1))
    _, log_prob, _ = actor.compute_log_prob(batch)
    of_both = torch.cat((first["old_log_probs"], second["old_log_probs"]))
    torch.testing.assert_close(of_both, log_prob, rtol=0, atol=1e-6)
    batch.batch["path_weight"] = torch.linspace(0.2, 2.0, 12)
    torch.manual_seed(7)
    metrics = actor.update_policy(batch)
    mean = (first["metrics"]["actor/dam_loss"][0] + second["metrics"]["actor/dam_loss"][0]) / 2
    assert metrics["actor/dam_loss"][0] == pytest.approx(mean, rel=1e-5)
    for found in (first, second):
        assert found["metrics"]["actor/grad_norm"] == [pytest.approx(metrics["actor/grad_norm"][0], rel=1e-4)]
        for (name, value), old in zip(model.named_parameters(), rotary_model().parameters(), strict=True):
            step, own = value - old, found["parameters"][name] - old
            torch.testing.assert_close(own, step, rtol=1e-3, atol=1e-7, msg=lambda told, name=name: f"{name}: {told}")


# What is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dynamic_bsz": True}, "use_dynamic_bsz=False"),
        ({"ulysses_sequence_parallel_size": 2}, "ulysses_sequence_parallel_size=1"),
        ({"kl_loss_coef": 0.001}, "kl_loss_coef=0.0; got 0.001"),
        ({"entropy_coeff": 0.01}, "entropy_coeff=0.0"),
        ({"cfg_scale": 0.5}, "cfg_scale=0.0"),
    ],
)
def test_settings_that_would_be_left_out_are_refused(dare, changes, message):
    with pytest.raises(ValueError, match=message):
        dare.actor.DLLMDataParallelPPOActor(actor_config(**changes), torch.nn.Linear(1, 1))


def test_rollouts_with_guidance_or_without_temperature_are_refused(dare):
    with pytest.raises(ValueError, match=r"cfg_scale=0\.0; got 1\.0"):
        drawn(dare, rotary_model(), cfg_scale=1.0)
    with pytest.raises(ValueError, match="temperature must be > 0 in training"):
        drawn(dare, rotary_model(), temperature=0)


def changed(batch, **values):
    meta_info = {**batch.meta_info, **values.pop("meta_info", {})}
    uid = values.pop("uid", batch.non_tensor_batch["uid"])
    tensors = {name: value for name, value in {**batch.batch, **values}.items() if value is not None}
    return DataProto(tensors, {"uid": uid}, meta_info)


def test_batches_that_cannot_be_weighed_are_refused(dare):
    batch, _ = step_of_fit(dare, rotary_model(), rotary_model(seed=1), actor_config())
    scores = batch.batch["token_level_scores"]
    uneven = batch.non_tensor_batch["uid"].copy()
    uneven[0] = "another prompt"
    for wrong, settings, message in (
        (changed(batch), {"Beta": 1.0}, "algorithm.dam has no Beta"),
        (changed(batch), {"beta": 0.0}, "beta must be > 0"),
        (changed(batch, ref_log_probs=None), None, "use_kl_loss=True"),
        (changed(batch, token_level_rewards=scores - 1), None, "use_kl_in_reward=False"),
        (changed(batch, uid=uneven), None, "as many responses as each other, 2 or more; got 1 to 3"),
        (changed(batch, meta_info={"dam": None}), None, "name=dam in both places"),
        (changed(batch, meta_info={"temperature": 1.0}), None, "drawn at temperature 0.8, and meta_info has 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            dare.loss.weigh(wrong, settings, done=0.0)
    batch.batch["token_level_scores"] = batch.batch["token_level_rewards"] = torch.full_like(scores, torch.nan)
    with pytest.raises(ValueError, match="a reward is NaN"):
        dare.loss.weigh(batch, None, done=0.0)


def test_the_actor_refuses_turns_and_dynamic_batches(dare):
    batch, actor = step_of_fit(dare, rotary_model(), rotary_model(seed=1), actor_config())
    with pytest.raises(ValueError, match=r"multi_turn\.enable=False"):
        actor.update_policy(changed(batch, meta_info={"multi_turn": True}))
    with pytest.raises(ValueError, match="use_dynamic_bsz=False"):
        actor.compute_log_prob(changed(batch, meta_info={"use_dynamic_bsz": True}))


# Its files


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install_dare", RECIPE / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORKERS = """
class DLLMActorRolloutRefWorker:
    def _build_rollout(self):
        rollout_name = self.config.rollout.name
        if rollout_name == "hf":
            raise NotImplementedError
        return rollout, rollout_sharding_manager

    def init_model(self):
        if self.config.model.name == 'llada':
            raise NotImplementedError
        return DLLMDataParallelPPOActor
"""
TRAINER = """
class DLLMRayPPOTrainer:
    def fit(self, batch, metrics):
        for _ in range(1):
            with open("/dev/null"):
                if True:
                    if self.config.algorithm.name == "bgpo":
                        raise NotImplementedError
                    elif self.config.algorithm.name == "justgrpo":
                        batch["log_probs"] = True
                    if True:
                        if True:
                            batch = compute_advantage(
                                batch,
                                pf_ppo_weight_pow=self.config.algorithm.pf_ppo.weight_pow,
                            )
        return batch
"""


def checkout(tmp_path, workers=WORKERS, trainer=TRAINER):
    """The places of DARE that the recipe has branches for, in the form that they have there."""
    for name, text in (
        ("verl/workers/dllm_fsdp_workers.py", workers),
        ("verl/trainer/ppo/dllm_ray_trainer.py", trainer),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_it_is_put_into_a_checkout_whose_branches_then_lead_to_it(dare, installer, tmp_path, monkeypatch):
    installer.install(checkout(tmp_path))
    for name, place in installer.FILES.items():
        assert (tmp_path / place).read_bytes() == (RECIPE / name).read_bytes()
    base = types.ModuleType("verl.workers.sharding_manager.base")
    base.BaseShardingManager = lambda: "no sharding"
    monkeypatch.setitem(installer.sys.modules, "verl.workers.sharding_manager", types.ModuleType("sharding_manager"))
    monkeypatch.setitem(installer.sys.modules, base.__name__, base)
    workers, trainer = {}, {"compute_advantage": lambda batch, **_: batch}
    exec((tmp_path / "verl/workers/dllm_fsdp_workers.py").read_text(), workers)
    exec((tmp_path / "verl/trainer/ppo/dllm_ray_trainer.py").read_text(), trainer)
    dam = Config(name="dam", dam={"beta": 0.5}, pf_ppo=Config(weight_pow=2.0))
    config = Config(algorithm=dam, rollout=rollout_config(name="hf"), model=Config(name="llada"))
    worker = workers["DLLMActorRolloutRefWorker"]()
    worker.config, worker.actor_module_fsdp, worker.tokenizer = config, rotary_model(), Tokenizer()
    assert worker.init_model() is dare.actor.DLLMDataParallelPPOActor
    assert isinstance(worker._build_rollout()[0], dare.rollout.DAMRollout)
    config["rollout"]["name"] = "sglang"
    with pytest.raises(ValueError, match=r"rollout\.name=hf, not sglang"):
        worker._build_rollout()
    fit = trainer["DLLMRayPPOTrainer"]()
    fit.config, fit.global_steps, fit.total_training_steps = config, 3, 8
    monkeypatch.setattr(dare.loss, "weigh", lambda *given: {"given": given})
    batch, metrics = {}, {}
    fit.fit(batch, metrics)
    assert batch == {"log_probs": True} and metrics["given"] == (batch, {"beta": 0.5}, 0.25)


def test_another_version_of_dare_is_left_as_it_is(installer, tmp_path):
    other = TRAINER.replace('"justgrpo"', '"another"')
    dare = checkout(tmp_path, trainer=other)
    with pytest.raises(ValueError, match="fit: log-probabilities: the place of the branch was found 0 times"):
        installer.install(dare)
    assert (dare / installer.WORKERS).read_text() == WORKERS and (dare / installer.TRAINER).read_text() == other
    assert not (dare / installer.FILES["dam_loss.py"]).exists()
    with pytest.raises(ValueError, match="give the folder of a checkout"):
        installer.install(tmp_path / "nowhere")


def test_it_is_not_put_in_twice(installer, tmp_path):
    dare = checkout(tmp_path)
    installer.install(dare)
    with pytest.raises(ValueError, match="has the recipe already"):
        installer.install(dare)


def started(tmp_path, *arguments):
    """What the shell script starts, by arguments, or its error."""
    (tmp_path / "python3").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = RECIPE / "run_dam_llada_8b_instruct.sh"
    return subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True)


def test_the_shell_script_hands_over_what_the_recipe_needs(tmp_path):
    found = started(tmp_path, "--task", "countdown", "--nnodes", "2", "trainer.save_freq=7")
    lines = found.stdout.splitlines()
    assert lines[:2] == ["-m", "verl.trainer.dllm_main_ppo"] and lines[-1] == "trainer.save_freq=7"
    given = dict(line.lstrip("+").split("=", 1) for line in lines[2:])
    assert given["algorithm.name"] == given["actor_rollout_ref.algorithm.name"] == "dam"
    assert given["actor_rollout_ref.actor.use_kl_loss"] == "True" and given["trainer.nnodes"] == "2"
    assert given["actor_rollout_ref.rollout.num_diffusion_steps"] == "128"
    assert int(given["actor_rollout_ref.actor.ppo_mini_batch_size"]) == int(given["data.train_batch_size"])


@pytest.mark.parametrize("arguments", [[], ["--task", "poems"], ["--task", "math", "--lr"]])
def test_the_shell_script_refuses_what_it_does_not_know(tmp_path, arguments):
    found = started(tmp_path, *arguments)
    assert found.returncode == 2 and found.stdout == "" and found.stderr
