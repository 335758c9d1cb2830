"""Runs under DeepSpeed, by `accelerate launch` and the files that are shipped: that of one process, and its parts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from dam.train.zero import check_checkpoint, check_whole, check_zero
from tests import ranks
from tests.train.zero_run import ran, told, trainer_of

FILES = Path(__file__).parents[2] / "examples" / "accelerate"


def launched(output, stage, processes, cases):
    """What each process wrote, by case."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("peft")
    options = [
        "--num_processes",
        str(processes),
        "--mixed_precision",
        "no",
        "--main_process_port",
        str(ranks.free_port()),
    ]
    command = ["--config_file", str(FILES / f"deepspeed_zero{stage}.yaml"), *options, "-m", "tests.train.zero_run"]
    done = ranks.launched("accelerate.commands.launch", output, *command, str(output), *cases)
    assert done.code == 0, done.text[-3000:]
    return {case: [torch.load(output / f"{case}-{rank}.pt") for rank in range(processes)] for case in cases}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process without DeepSpeed ends with, and where it saved its model, by case."""
    known = {}

    def of(case):
        if case not in known:
            output = tmp_path_factory.mktemp(case)
            known[case] = told(ran(output, case)), output / "saved"
        return known[case]

    return of


def weights(saved):
    from safetensors.torch import load_file

    return {name: value for file in sorted(saved.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_is_that_of_one(output, found, alone, stage):
    """Weights to 1e-5, the groups of the replay buffer to the bit, and figures."""
    for name, processes in found.items():
        one, saved = alone(name.partition("-")[0])
        for seen in processes:
            assert seen["stage"] == stage and (seen["held"] == 0) == (stage == 3)
            for ours, theirs in zip(one["groups"], seen["groups"], strict=True):
                padding = [int((group["attention_mask"] == 0).sum()) for group in (ours, theirs)]
                assert torch.equal(ours["final"][:, padding[0] :], theirs["final"][:, padding[1] :]), name
                torch.testing.assert_close(ours["weight"], theirs["weight"], rtol=1e-4, atol=1e-5)
            assert torch.equal(one["filled_in"], seen["filled_in"]), name
        for ours, theirs in zip(one["logged"], processes[0]["logged"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), name
        of_one, of_all = weights(saved), weights(output / name / "saved")
        assert set(of_one) <= set(of_all)  # of stage 2 DeepSpeed saves a tied one twice
        for key, value in of_one.items():
            torch.testing.assert_close(of_all[key], value, rtol=0.0, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.slow
def test_a_run_divided_by_zero_3_is_that_of_one_process(tmp_path, alone):
    """Rows need different numbers of network calls, and are padded; with an adapter, whose base is the model itself.

    What is saved is a model that from_pretrained loads."""
    found = launched(tmp_path, 3, 2, ("whole", "adapted"))
    assert_is_that_of_one(tmp_path, found, alone, 3)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "whole" / "saved").state_dict()
    one = AutoModelForMaskedLM.from_pretrained(alone("whole")[1]).state_dict()
    torch.testing.assert_close(loaded, one, rtol=0.0, atol=1e-5)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    check_checkpoint(str(checkpoint), 2)
    with pytest.raises(
        ValueError, match=r"was saved by 2 processes under DeepSpeed.*resume with 2, or make a universal"
    ):
        check_checkpoint(str(checkpoint), 3)
    with pytest.raises(
        ValueError, match=r"has no universal checkpoint: .*ds_to_universal --input_folder .*global_step4"
    ):
        check_checkpoint(str(checkpoint), 3, universal=True)


@pytest.mark.full
def test_a_run_goes_on_under_zero_3(tmp_path, alone):
    """Resumed, and in more processes from a universal checkpoint; of rows that end early, too."""
    found = launched(tmp_path, 3, 2, ("whole", "whole-resumed", "ended"))
    assert_is_that_of_one(tmp_path, found, alone, 3)
    step = tmp_path / "whole" / "checkpoint-4" / "global_step4"
    folders = ["--input_folder", step, "--output_folder", f"{step}_universal"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--num_extract_workers", "1"]
    subprocess.run([*command, "--num_merge_workers", "1"], check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert_is_that_of_one(tmp_path, launched(tmp_path, 3, 3, ("whole-universal",)), alone, 3)


@pytest.mark.full
def test_a_run_divided_by_zero_2_is_that_of_one_process(tmp_path, alone):
    found = launched(tmp_path, 2, 2, ("whole",))
    assert_is_that_of_one(tmp_path, found, alone, 2)
    trainer = trainer_of(tmp_path / "again")
    with pytest.raises(ValueError, match=r"was saved under DeepSpeed.*by as many processes \(2\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert trainer.state.global_step == 0


@pytest.mark.full
@pytest.mark.parametrize(("stage", "processes"), [(2, 2), (2, 3), (3, 2), (3, 3)])
def test_on_other_numbers_of_processes(tmp_path, alone, stage, processes):
    cases = [
        "adapted",
        "adapted-resumed",
        *(["accumulated"] if processes == 2 else ["whole", "whole-resumed", "ended"]),
    ]
    assert_is_that_of_one(tmp_path, launched(tmp_path, stage, processes, cases), alone, stage)


RIGHT = {
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": {"enabled": True}}, "set bf16"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5, but max_grad_norm is 1.0: set .* to \"auto\""),
        ({"zero_optimization": {"stage": 3}}, "set zero3_save_16bit_model: true"),
        ({"tensor_parallel": {"autotp_size": 2}}, "processes that share a sequence"),
    ],
)
def test_what_deepspeed_is_told_and_cannot_be_right_is_refused(changes, message):
    check_zero(RIGHT, 1.0)
    check_zero({"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}, 1.0)
    with pytest.raises(ValueError, match=message):
        check_zero({**RIGHT, **changes}, 1.0)


def test_a_model_that_was_divided_as_it_was_loaded_is_refused():
    model = torch.nn.Linear(2, 2)
    check_whole("model", [model])
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"the ref_model, Linear, was divided .* set zero3_init_flag: false"):
        check_whole("ref_model", [model])


def test_a_checkpoint_without_deepspeeds_parts_is_refused_under_deepspeed(tmp_path):
    check_checkpoint(str(tmp_path), None)
    with pytest.raises(ValueError, match="was not saved under DeepSpeed: resume without it"):
        check_checkpoint(str(tmp_path), 2)
