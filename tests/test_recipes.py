"""Recipes: read strictly, every one that comes with dam dry-run with a small model of its family, and runs resumed."""

import fnmatch
import functools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the package peft")
pytest.importorskip("datasets", reason="needs the package datasets")

from dam import cli
from dam.commands import train as job
from dam.recipes.recipe import RecipeError, load, parsed, read, shipped
from dam.recipes.small import small_sizes, with_vocabulary
from dam.tasks import TASKS
from tests.models import standins
from tests.models.standins import dream, llada, llada2, sdar

# Of models whose code is not in transformers: a stand-in with the names of its layers, and the class that loads it.
STANDINS = {
    "llada": (standins.LLaDAModelLM, llada.LLaDAConfig, "AutoModel"),
    "Dream": (standins.DreamModel, dream.DreamConfig, "AutoModel"),
    "llada2_moe": (standins.LLaDA2MoeModelLM, llada2.LLaDA2MoeConfig, "AutoModelForCausalLM"),
    "sdar": (standins.SDARForCausalLM, sdar.SDARConfig, "AutoModelForCausalLM"),
}
EXAMPLES = Path(job.__file__).parents[1] / "recipes" / "examples"
# A run of a second: 2 rollouts of 2 steps.
SMALL = {
    "model.config.hidden_size": 16,
    "model.config.num_hidden_layers": 1,
    "config.max_steps": 4,
    "config.num_iterations": 2,
    "config.save_steps": 2,
    "config.num_generations": 4,
    "config.target_ess": 2,
    "config.per_device_train_batch_size": 8,
    "config.max_completion_length": 4,
    "config.use_cpu": "true",
    "eval.limit": 2,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the stand-ins, with their code, by type."""
    with pytest.MonkeyPatch.context() as patch:
        # Where transformers copies code that comes with a model; of an earlier run it might be other code.
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        found = {}
        for kind, (model, config, auto_class) in STANDINS.items():
            # What register_for_auto_class sets, undone at the end.
            patch.setattr(model, "_auto_class", auto_class)
            patch.setattr(config, "_auto_class", "AutoConfig")
            found[kind] = str(tmp_path_factory.mktemp(kind))
            model(config()).save_pretrained(found[kind])
        yield found


def overrides(**changes):
    return [f"{name}={value}" for name, value in {**SMALL, **changes}.items()]


# Those that come with dam


def test_each_family_has_a_recipe():
    kinds = {load(name).model.type for name in shipped()}
    assert kinds >= {*STANDINS, "modernbert"}
    assert {load(name).task.name for name in shipped()} == {"countdown", "gsm8k"}


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_makes_its_config_and_runs_dry(name, folders, tmp_path):
    """Two steps, of the layers that it names and no others: the whole blocks, but of LLaDA 2 no experts."""
    recipe = load(name)
    assert recipe.training_config(str(tmp_path)).max_steps > 0
    kind = recipe.model.type
    if kind in folders:
        recipe = load(name, [f"model.name={folders[kind]}"])
    result = job.train(recipe, None, dry_run=True)
    assert (result["steps"], result["model_type"], len(result["loss"])) == (2, kind, 2)
    assert all(loss == loss and loss > 0 for loss in result["loss"])
    assert result["eval_exact"] >= 0
    if recipe.peft is None:
        assert not any("lora" in part for part in result["trained"])
        return
    adapted = {part.split("base_model.model.")[-1].split(".lora_")[0] for part in result["trained"]}
    assert all(".lora_" in part for part in result["trained"])
    if kind in folders:
        model = STANDINS[kind][0](STANDINS[kind][1]())
        layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".0." in n and "gate" not in n}
        expected = {n.replace(".0.", ".N.") for n in layers if kind != "llada2_moe" or "attention" in n}
    else:
        expected = {f"model.layers.N.{leaf}" for leaf in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")}
    assert adapted == expected


@pytest.mark.parametrize("name", sorted(TASKS))
def test_each_task_has_rows_for_a_dry_run(name):
    rows = TASKS[name].rows(str(EXAMPLES / f"{name}.jsonl"))
    assert len(rows) >= 8 and all(row["prompt"] for row in rows)


def test_problems_of_the_tiny_recipe_are_held_out_as_those_of_the_task_are():
    from dam.tasks.countdown import is_held_out

    for name, held_out in (("countdown", False), ("countdown_held_out", True)):
        records = [json.loads(line) for line in (EXAMPLES / f"{name}.jsonl").read_text().splitlines()]
        assert {is_held_out(record["nums"], record["target"]) for record in records} == {held_out}


def test_recipes_and_their_rows_are_installed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11+")
    project = Path(job.__file__).parents[2] / "pyproject.toml"
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["dam.recipes"]
    files = [path for path in EXAMPLES.parent.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(files) > 10
    for path in files:
        assert any(fnmatch.fnmatch(str(path.relative_to(EXAMPLES.parent)), pattern) for pattern in patterns), path


# Of published configs, what says sizes.
LLADA_8B = {
    **{"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "mlp_ratio": 4},
    **{"vocab_size": 126464, "embedding_size": 126464, "init_device": "meta", "mask_token_id": 126336},
}
LLADA_2_MINI = {
    **{"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64},
    **{"num_hidden_layers": 20, "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 256},
    **{"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_shared_experts": 1, "first_k_dense_replace": 1},
    **{"vocab_size": 157184, "layer_types": ["full_attention"] * 20},
}


def test_small_sizes_keep_what_goes_together():
    small = {**LLADA_8B, **small_sizes(LLADA_8B)}
    assert small["d_model"] % small["n_heads"] == 0 and small["n_kv_heads"] == small["n_heads"]
    assert (small["embedding_size"], small["vocab_size"], small["init_device"]) == (126464, 126464, "cpu")
    assert small["mlp_ratio"] == 4
    tokenizer = job.characters_tokenizer()
    ours = with_vocabulary(LLADA_8B, tokenizer)
    assert ours["embedding_size"] == ours["vocab_size"] == len(tokenizer)
    assert ours["mask_token_id"] == tokenizer.mask_token_id
    small = {**LLADA_2_MINI, **small_sizes(LLADA_2_MINI)}
    assert small["head_dim"] * small["num_attention_heads"] == small["hidden_size"]
    assert small["num_key_value_heads"] == 1 and small["rotary_dim"] * 2 == small["head_dim"]
    # A token's experts come from so many groups.
    assert small["num_experts"] % small["n_group"] == 0
    assert small["num_experts_per_tok"] <= small["topk_group"] * small["num_experts"] // small["n_group"]
    assert small["layer_types"] == ["full_attention"] * small["num_hidden_layers"]


# Reading


def test_numbers_and_words_are_those_of_yaml_1_2():
    values = parsed("{a: 3e-6, b: no, c: on, d: 1e3, e: .5, f: true, g: 012, h: -2, i: null, j: }", "t")
    assert values == {
        **{"a": 3e-6, "b": "no", "c": "on", "d": 1000.0, "e": 0.5},
        **{"f": True, "g": 12, "h": -2, "i": None, "j": None},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: {beta: 1}\nconfig: {beta: 2}", "t: the key 'config' comes twice, at line 1"),
        ("config: {beta: 1, beta: 2}", "the key 'beta' comes twice"),
        ("- a", "t: a recipe is a mapping of model, task"),
        ("a: [1", "t: no YAML"),
    ],
)
def test_what_is_no_recipe(text, message):
    with pytest.raises(RecipeError, match=message):
        parsed(text, "t")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.nam=x", r"unknown key model\.nam; did you mean name\?"),
        ("modle.name=x", r"unknown key modle; did you mean model\?"),
        ("config.learning_rte=1", r"unknown key config\.learning_rte; did you mean learning_rate\?"),
        ("peft.lora_alfa=1", r"unknown key peft\.lora_alfa; did you mean lora_alpha\?"),
        ("config.learning_rate=fast", r"config\.learning_rate must be a number; got text \('fast'\)"),
        ("config.num_generations=1.5", r"config\.num_generations must be an integer; got a number"),
        ("config.num_generations=true", r"config\.num_generations must be an integer; got true or false"),
        ("config.bf16=1", r"config\.bf16 must be true or false or null; got an integer"),
        ("config.eval_strategy=3", r"config\.eval_strategy must be text; got an integer"),
        ("model.trust_remote_code=yes", r"model\.trust_remote_code must be true or false; got text"),
        ("peft.r=big", r"peft\.r must be an integer; got text"),
        ("peft.target_modules=null", r"peft\.target_modules is missing"),
        ("model.class=AutoModelForChat", "model: the model's class must be one of"),
        ("model.dtype=float8", "model: dtype must be one of auto, float32"),
        ("model.config.hidden_size=3", r"model\.config is of random weights"),
        ("task=gsm8k", "task must be a mapping of name, source"),
        ("task.name=null", r"task\.name must be text; got null"),
        ("task.limit=0", r"task\.limit must be at least 1; got 0"),
        ("eval.samples=4", r"eval\.samples is 4, but all samples of a prompt would be the same"),
        ("tokenizer={name: x, characters: true}", "exclude each other"),
        ("config.output_dir=x", r"config\.output_dir is the recipe's output"),
        ("config", "--set takes section.key=value; got 'config'"),
        ("task.name.x=1", "--set task.name.x=1: name is no section"),
    ],
)
def test_a_key_that_cannot_be_right_is_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load("llada-8b-gsm8k", [override])


def test_the_config_is_checked_by_itself():
    with pytest.raises(RecipeError, match="config: beta must be > 0; got -1"):
        load("llada-8b-gsm8k", ["config.beta=-1"]).training_config("unused")


def test_a_recipe_is_what_its_record_says(tmp_path):
    recipe = load("sdar-4b-gsm8k", ["config.learning_rate=1e-5", "config.eval_strategy=no", "output=here"])
    assert recipe.config["learning_rate"] == 1e-5
    job._claim(recipe, tmp_path, False)
    job._record(recipe, tmp_path)
    assert job.recorded(tmp_path) == recipe
    assert read(recipe.as_dict()) == recipe


def test_rows_beside_a_recipe_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "my.yaml").write_text("{model: {name: x}, task: {name: countdown, source: rows.jsonl}}")
    (tmp_path / "rows.jsonl").write_text("")
    assert load(str(tmp_path / "my.yaml")).task.source == str(tmp_path / "rows.jsonl")
    (tmp_path / "my.yaml").write_text("{model: {name: x}, task: {name: countdown, source: owner/name}}")
    assert load(str(tmp_path / "my.yaml")).task.source == "owner/name"


# Errors before the work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lada-8b-gsm8k"], "did you mean llada-8b-gsm8k?"),
        ([], "which recipe?"),
        (["tiny-countdown", "--set", "task.name=sudoku"], "there is no task 'sudoku'; there are countdown"),
        (["tiny-countdown", "--set", "config.beta=0"], "config: beta must be > 0"),
        (["tiny-countdown", "--set", "model.type=gpt7"], "transformers has no such model"),
        (["tiny-countdown", "--set", "model.config.hiden_size=3"], "has no hiden_size"),
        (["tiny-countdown", "--resume", "--output", "nothing"], "nothing to resume"),
        (["tiny-countdown", "--output", "full"], "is not empty"),
    ],
)
def test_an_error_has_one_line_and_comes_before_the_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    monkeypatch.setattr(job.DAMTrainer, "train", lambda *_, **__: pytest.fail("the work has started"))
    if "model.config.hiden_size=3" in arguments or "model.type=gpt7" in arguments:
        arguments = [*arguments, "--dry-run"]
    assert cli.main(["train", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dam train: ") and message in error and "Traceback" not in error


def test_targets_and_type_are_checked_on_the_model(folders, capsys):
    arguments = ["train", "dream-7b-gsm8k", "--dry-run", "--model", folders["Dream"]]
    assert cli.main([*arguments, "--set", r"peft.target_modules='model\.layers\.\d+\.attn\.q'"]) == 1
    assert r"model\.layers\.\d+\.(self_attn\.q_proj|" in capsys.readouterr().err
    assert cli.main([*arguments, "--set", "peft.target_modules=.*"]) == 1
    assert "matches the output layer, lm_head" in capsys.readouterr().err
    assert cli.main([*arguments[:-1], folders["sdar"]]) == 1
    assert "model.type is 'Dream', but" in capsys.readouterr().err


def test_the_list(capsys):
    assert cli.main(["train", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(shipped())


# Runs


def run(folder, *more):
    given = [part for override in overrides() for part in ("--set", override)]
    return cli.main(["train", "tiny-countdown", *given, "--output", str(folder), *more])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    torch.set_num_threads(1)
    assert run(folder) == 0
    return folder


def test_a_run_leaves_model_tokenizer_metrics_and_recipe(reference):
    metrics = json.loads((reference / "metrics.json").read_text())
    assert (metrics["steps"], metrics["reward_calls"], metrics["task"]) == (4, 16, "countdown")
    assert 0 <= metrics["eval_exact"] <= 1
    logged = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/correct/mean" in entry for entry in logged)
    assert {"model.safetensors", "tokenizer.json", "recipe.yaml"} <= set(os.listdir(reference))
    # By the task's weights.
    assert job.recorded(reference).task.name == "countdown"


def test_a_stopped_run_goes_on_to_the_same_weights(reference, tmp_path, monkeypatch, capsys):
    task = TASKS["countdown"]
    calls = [0]

    @functools.wraps(task.correct)
    def interrupting(**arguments):
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return task.correct(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(
            type(task), "rewards", property(lambda self: (self.format, self.answer, interrupting, self.closeness))
        )
        assert run(tmp_path / "run") == 130
    assert "stopped after step 3 of 4" in capsys.readouterr().err
    assert run(tmp_path / "run", "--resume", "--set", "config.beta=1.0") == 1
    assert "was started with other options: config.beta 0.04 (now 1.0)" in capsys.readouterr().err
    record = (tmp_path / "run" / "recipe.yaml").read_bytes()
    assert run(tmp_path / "run", "--resume", "--set", "config.logging_steps=2") == 0
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == record  # of how it was started
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "run", reference))
    assert ours == theirs
    assert cli.main(["train", "--resume", "--output", str(tmp_path / "run")]) == 0  # of what is done, the result


def test_a_dry_run_leaves_the_folder_of_a_run_alone(tmp_path):
    folder = tmp_path / "run"
    recipe = load("tiny-countdown", [f"output={folder}"])
    job.train(recipe, None, dry_run=True)
    assert not folder.exists()
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 4, "reward": 1.0}\n')
    job.train(recipe, None, dry_run=True)
    assert (folder / "metrics.jsonl").read_text() == '{"step": 4, "reward": 1.0}\n'
    with pytest.raises(ValueError, match="is not empty"):
        job.train(recipe, folder, dry_run=True)


def test_what_cannot_begin_leaves_its_folder_to_the_mended_recipe(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        job.train(load("tiny-countdown", ["task.source=nothing.jsonl"]), folder)
    assert list(folder.iterdir()) == []
    job.train(load("tiny-countdown", overrides(**{"config.max_steps": 1})), folder)
    assert (folder / "recipe.yaml").exists() and (folder / "metrics.json").exists()


def test_metrics_of_an_evaluation_are_of_the_text_that_rewards_see(tmp_path, monkeypatch):
    """With the token that ends it, which is text where it is no special one."""
    stop = 30
    recipe = load("tiny-countdown", overrides(**{"config.stop_token_ids": f"[{stop}]", "config.max_steps": 1}))
    seen = {"rewards": [], "metrics": []}
    task, metrics = type(TASKS["countdown"]), TASKS["countdown"].metrics

    def correct(self, completions, **_):
        seen["rewards"] += [each[-1]["content"] if isinstance(each, list) else each for each in completions]
        return [0.0] * len(completions)

    def judged(completions, rows):
        seen["metrics"] += [text for group in completions for text in group]
        seen["rewards"] = seen["rewards"][-len(seen["metrics"]) :]
        return metrics(completions, rows)

    monkeypatch.setattr(task, "correct", correct)
    monkeypatch.setattr(TASKS["countdown"], "metrics", judged, raising=False)
    # So that it comes up.
    monkeypatch.setattr(job, "_random", functools.partial(_saying, job._random, stop))
    job.train(recipe, tmp_path / "run")
    assert seen["metrics"] and seen["metrics"] == seen["rewards"]
    assert all(text == job.characters_tokenizer().decode([stop]) for text in seen["metrics"])


def _saying(make, token, *arguments):
    """A model whose bias makes it say one token."""
    model = make(*arguments)
    with torch.no_grad():
        model.decoder.bias[token] = 1e3
    return model


def test_metrics_are_of_whole_completions_however_long_each_is():
    """As with `whole_blocks`, which appends more masks to some prompts than to others."""
    inputs = np.array([[-100, 3, 0, 0, 0], [4, 3, 2, 0, 0]])
    filled_in = np.array([[-100, 3, 7, 8, 9], [4, 3, 2, 8, 6]])
    tokenizer = SimpleNamespace(eos_token_id=8, batch_decode=lambda ids, skip_special_tokens: ids)
    task = SimpleNamespace(metrics=lambda groups, rows: {"seen": groups})
    config = SimpleNamespace(max_completion_length=2, stop_token_ids=None, mask_token_id=0)
    found = job._metrics(
        task,
        SimpleNamespace(tokenizer=tokenizer, eval_rows=[{}, {}]),
        config,
        1,
        SimpleNamespace(predictions=filled_in, inputs=inputs),
    )
    assert found == {"seen": [[[7, 8]], [[8]]]}
