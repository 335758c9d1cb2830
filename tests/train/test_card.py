"""What a saved model says of itself, and who may read it."""

import stat

import pytest
from flow_tiny import ROWS as GOALS
from flow_tiny import Network, direct, near_goal
from flow_tiny import tiny_config as flow_config
from huggingface_hub import ModelCard
from tiny import ROWS, sum_reward, tiny_config, tiny_model

from dam.train import DAMTrainer, FlowTrainer, card


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after a run that saved a checkpoint, an evaluation and save_model; its folder."""
    folder = tmp_path_factory.mktemp("card") / "run"
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "beta": 0.05, "reward_weights": [2.0]}
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(folder, **changes), ROWS, eval_dataset=ROWS[:2])
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer, folder


def test_a_card_tells_what_was_done_and_what_came_of_it(trained):
    trainer, folder = trained
    saved = ModelCard.load(folder / "README.md")
    assert saved.data.library_name == "transformers" and saved.data.base_model is None
    assert {"discrete-adjoint-matching", "generated_from_trainer"} <= set(saved.data.tags)
    (training,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    (evaluation,) = (entry for entry in trainer.state.log_history if "eval_reward" in entry)
    for told in (
        "| reward functions | `sum_reward` (weight 2) |",
        "| beta | 0.05 |",
        "| estimator, normalizer | posterior, group |",
        "| trajectories per prompt | 8 |",
        "| budget | 16 reward calls in 2 training steps |",
        *(f"| `{name}` | {training[name]:.4g} |" for name in ("reward", "ess", "kl_path", "tilt")),
        f"| `eval_reward` | {evaluation['eval_reward']:.4g} |",
        "Versions: dam ",
    ):
        assert told in saved.text, told
    assert "checkpoint-2" in {path.name for path in folder.iterdir()}
    assert not (folder / "checkpoint-2" / "README.md").exists()


def test_whoever_may_read_one_file_of_a_run_may_read_all(trained):
    """The weights too, of the checkpoint as of the model."""
    _, folder = trained
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"model.safetensors", "README.md", "trainer_state.json", "dam_state.pt"} <= {path.name for path in files}
    assert len({stat.S_IMODE(path.stat().st_mode) for path in files}) == 1


def test_a_card_that_somebody_wrote_stays(trained):
    trainer, folder = trained
    path = folder / "README.md"
    ours = path.read_text()
    path.write_text(ours.replace("| beta | 0.05 |", "| beta | ? |"))  # ours, of an earlier saving
    trainer.create_model_card(tags="sums", license="apache-2.0", language=None)
    assert "| beta | 0.05 |" in path.read_text()
    assert "sums" in ModelCard.load(path).data.tags and ModelCard.load(path).data.license == "apache-2.0"
    mine = "# Mine\n\n| beta | ? |\n"
    path.write_text(mine)
    trainer.save_model()
    trainer.create_model_card()
    assert path.read_text() == mine


def test_the_card_of_an_adapter(tmp_path):
    """In the place of the blank one that PEFT puts beside it, whose metadata it has."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS, peft_config=config)
    for _ in range(2):  # PEFT adds to a card that is there
        trainer.save_model()
        saved = ModelCard.load(tmp_path / "README.md")
        assert saved.data.library_name == "peft" and saved.text.count("| run | |") == 1
        assert "[More Information Needed]" not in saved.text and "peft" in saved.text


def test_the_card_of_a_flow(tmp_path):
    """No library loads a module of somebody's own, and nothing but its own learner's aim and arguments is told."""
    config = flow_config(tmp_path, max_steps=2)
    trainer = FlowTrainer(Network(), near_goal, config, GOALS, shape=(3,))
    trainer.train()
    trainer.save_model()
    saved = ModelCard.load(tmp_path / "README.md")
    assert saved.data.library_name is None and {"adjoint-matching", "flow-matching"} <= set(saved.data.tags)
    training = trainer.state.log_history[0]
    for told in (
        "[Adjoint Matching](https://arxiv.org/abs/2409.08861)",
        "beta KL(model || base)",
        "| reward | `near_goal` |",
        "| beta | 0.5 |",
        "| process | predicts velocity, ",
        "| steps of a path | 6, heun |",
        "| budget | 4 reward calls in 2 training steps |",
        *(f"| `{name}` | {training[name]:.4g} |" for name in ("kl_path", "adjoint_norm")),
    ):
        assert told in saved.text, told
    alone = FlowTrainer(Network(), near_goal, flow_config(tmp_path / "alone", **direct("draft")), GOALS, shape=(3,))
    alone.save_model()
    text = (tmp_path / "alone" / "README.md").read_text()
    assert "[DRaFT](https://arxiv.org/abs/2309.17400): toward a reward alone" in text and "beta" not in text


def test_a_name_on_the_hub_and_a_folder(tmp_path):
    """The first is linked to; of the second nobody learns where it lies."""
    method = card.Method("A Method", "https://arxiv.org/abs/2602.07132", "toward something", ("tag",))
    facts = card.Facts("mine", method, "org/model", "org/model", "peft", {"seed": "1"}, ("reward",), [])
    written = card.card(facts)
    assert written.data.base_model == "org/model" and "[org/model](https://huggingface.co/org/model)" in written.text
    assert "training, step" not in written.text  # nothing was trained
    written = card.card(facts._replace(model=str(tmp_path), base="org/other"))
    assert written.data.base_model is None and str(tmp_path) not in written.text
    assert f"`{tmp_path.name}`, a local folder" in written.text and "The base is [org/other]" in written.text
