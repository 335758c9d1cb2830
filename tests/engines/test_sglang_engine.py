"""Trajectories by a server process: those of this process, by the weights that were sent last, or an error in time."""

import contextlib
import dataclasses
import http.client
import http.server
import json
import threading
import time

import pytest
import torch

from dam.ctmc import MaskedCTMC
from dam.decoding import Decoding
from dam.engines import EngineError, InProcess, Prompts, SGLangEngine, StaleWeights, served_parameters
from dam.models import as_denoiser
from dam.train import DAMTrainer
from tests import ranks
from tests.engines import sglang_interface as interface
from tests.engines import standin
from tests.engines.process_run import Judge, misbehave, model, trainer_of
from tests.engines.stubs import wheel_of
from tests.models.standins.trunk import MASK, PAD
from tests.train.tiny import sum_reward, tiny_config, tiny_model

STOP = 5


class Server:
    def __init__(self, *options):
        context = ranks.server_of_forks()
        self.connection, theirs = context.Pipe()
        arguments = (theirs, "--mask", str(MASK), *options)
        self.process = context.Process(target=standin.serve_at, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.port = self.connection.recv()
        self.url = f"http://127.0.0.1:{self.port}"

    def misbehaves(self, how):
        misbehave(self.url, how)

    def close(self):
        self.connection.close()
        self.process.join(timeout=10)


@contextlib.contextmanager
def served(*options):
    server = Server(*options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server():
    with served("--fdfo") as started:
        yield started


def engine_of(server, folder, **more):
    return SGLangEngine(server.url, folder, block_length=4, **{"timeout": 120.0, **more})


def prompts(**changes):
    """Seven rows of prompts of 1, 5 and 9 tokens, padded on the left, and 11 masks behind each."""
    generator = torch.Generator().manual_seed(4)
    width, masks = 9, 11
    tokens = torch.full((7, width + masks), MASK)
    mask = torch.ones_like(tokens)
    tokens[:, :width] = torch.randint(0, 17, (7, width), generator=generator)
    for row, pad in enumerate((0, 4, 8, 0, 4, 8, 0)):
        tokens[row, :pad], mask[row, :pad] = PAD, 0
    process = MaskedCTMC(MASK, suppress=(3,), vocabulary=18)
    ids = torch.tensor([5, 3, -9, 2**62, 11, 12, 13])
    asked = Prompts(tokens, process, seed=2**63 + 9, row_ids=ids, attention_mask=mask, block_length=4)
    return dataclasses.replace(asked, **changes)


def assert_same(ours, theirs):
    for name in ("initial", "final", "position", "token", "call", "ended"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), name
    # Of one product with the head over the rows of a call and another over a block's.
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=0.0, atol=2e-5)


LAWS = {
    "one a call": {},
    "few calls": {"steps": 3},
    "left to right": {"decoding": Decoding(order="left-to-right", temperature=0.6), "steps": 5},
    "likeliest": {"decoding": Decoding(temperature=0.0)},
    "ends": {"stop_tokens": (STOP, 7, 9), "decoding": Decoding(order="left-to-right", temperature=1.4)},
    "ends within a block": {"stop_tokens": (STOP, 7, 9), "steps": 4},
}


@pytest.mark.parametrize("law", LAWS)
def test_draws_are_those_of_this_process(server, tmp_path, law):
    network = model()
    engine = engine_of(server, tmp_path)
    engine.update(served_parameters(network), 1)
    asked = prompts(**LAWS[law])
    expected = InProcess(as_denoiser(network)).rollout(asked)
    assert_same(engine.rollout(asked), expected)
    if law.startswith("ends"):  # some rows do, with jumps left out, and some do not
        assert 0 < int(expected.ended.sum()) < len(asked)
        assert bool((expected.call == -1).any())


WHEEL = wheel_of("sglang", interface.VERSION)
OWN = pytest.param("--wheel", marks=[pytest.mark.full, pytest.mark.skipif(WHEEL is None, reason="no wheel of SGLang")])


@pytest.mark.skipif(WHEEL is None, reason="no wheel of SGLang: DAM_ENGINE_WHEELS names no folder that has it")
@pytest.mark.full
def test_the_wheel_is_as_recorded():
    assert interface.differences(WHEEL) == []


@pytest.mark.parametrize("own", [None, OWN])
@pytest.mark.parametrize("fdfo", [False, pytest.param(True, marks=pytest.mark.full)])
def test_draws_depend_on_no_other_row_and_on_no_scheduling(tmp_path, own, fdfo):
    """By a server that goes through blocks in step, of one row alone as of all; and by SGLang's own scheduling."""
    network, asked = model(), prompts(stop_tokens=(STOP, 7, 9), steps=7)
    with served(*["--fdfo"] * fdfo, *([] if own is None else [own, str(WHEEL)])) as server:
        engine = engine_of(server, tmp_path)
        engine.update(served_parameters(network), 1)
        whole = engine.rollout(asked)
        assert_same(whole, InProcess(as_denoiser(network)).rollout(asked))
        alone = engine.rollout(asked[3:4])
    assert_same(alone, whole[3:4])


def test_new_weights_are_used_and_older_ones_refused(server, tmp_path):
    network, asked = model(), prompts()
    engine, other = engine_of(server, tmp_path / "ours"), engine_of(server, tmp_path / "others")
    with pytest.raises(EngineError, match="no weights"):
        engine.rollout(asked)
    engine.update(served_parameters(network), 1)
    before = engine.rollout(asked)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.3)
    engine.update(served_parameters(network), 2)
    after = engine.rollout(asked)
    assert not torch.equal(before.token, after.token)
    assert_same(after, InProcess(as_denoiser(network)).rollout(asked))
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["version-2"]
    # A process that did not send them itself knows what to expect.
    beside = engine_of(server, tmp_path / "ours")
    beside.update(None, 2)
    assert_same(beside.rollout(asked), after)
    other.update(served_parameters(model(5)), 3)
    with pytest.raises(StaleWeights, match=r"row 0 was drawn with the weights 3, and 2 were sent last"):
        engine.rollout(asked)
    # Weights that do not fit are not taken, and nothing is drawn with what is there.
    with pytest.raises(EngineError, match=r"(?s)refused with status 400.*embed_tokens"):
        engine.update([("lm_head.weight", torch.zeros(19, 16))], 4)
    with pytest.raises(EngineError, match="no weights"):
        engine.rollout(asked)


WRONG = {
    "few": "asked for 7 rows and gave 6 answers",
    "no jumps": "row 0 says no jumps",
    "lost jump": "row 0 is none of its prompt: it lacks as many jumps as masks",
    "wrong shape": "the jumps of row 0 are none",
    "beyond": "at no position",
    "twice": "jumps where no mask is, or twice",
    "positive": "it lacks log-probabilities",
    "no token": "it lacks a token that can be drawn",
    "mixed weights": "weights 1, older",
    "no JSON": "answered no JSON: <html>",
    "cut off": "the server is gone: 100 bytes of its answer lack",
}


def test_an_answer_that_is_none_is_an_error_that_says_what(server, tmp_path):
    engine = engine_of(server, tmp_path)
    engine.update(served_parameters(model()), 1)
    for how, message in WRONG.items():
        server.misbehaves(how)
        with pytest.raises(EngineError, match=message):
            engine.rollout(prompts())


def test_logits_that_cannot_be_drawn_from_end_the_request_and_not_the_server(server, tmp_path):
    network, engine = model(), engine_of(server, tmp_path)
    with torch.no_grad():
        network.lm_head.weight[2] = torch.nan
    engine.update(served_parameters(network), 1)
    with pytest.raises(EngineError, match=r"gave up row 0: DAMRollout: jump: row 0 of the logits holds a NaN"):
        engine.rollout(prompts())
    engine.update(served_parameters(model()), 2)
    assert len(engine.rollout(prompts()).final) == 7


def test_what_a_server_cannot_draw_is_refused_before_it_is_asked(server, tmp_path):
    engine = engine_of(server, tmp_path)
    engine.update(served_parameters(model()), 1)
    whole = prompts()
    short = prompts(tokens=whole.tokens[:, :-1], attention_mask=whole.attention_mask[:, :-1])
    hole = whole.tokens.clone()
    hole[1, 6] = MASK
    for asked, message in (
        (short, "row 0: a server fills whole blocks of 4: a sequence of 19 tokens"),
        (prompts(tokens=hole), "row 1: a server fills in what is behind a prompt"),
        (prompts(decoding=Decoding(guidance=1.0)), "the model's own law"),
        (prompts(decoding=Decoding(order="confidence")), "the model's own law"),
        (prompts(block_length=8), "model's block_length is 8, and that of the server's 4"),
        (prompts(block_length=None), "model's block_length is None, and that of the server's 4"),
        (prompts(stop_tokens=(3,)), "token 3 ends a row but is never drawn"),
        (prompts(steps=0), "row 0: steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.rollout(asked)
    # What only the server knows.
    with pytest.raises(EngineError, match=r"status 400.*server's block_length is 4, and 2 is asked for"):
        other = SGLangEngine(server.url, tmp_path, block_length=2)
        other.update(None, 1)
        other.rollout(prompts(block_length=2))
    process = MaskedCTMC(PAD)
    tokens = torch.where(whole.tokens == MASK, PAD, torch.where(whole.tokens == PAD, 1, whole.tokens))
    with pytest.raises(EngineError, match="server's mask token is 18, and 17 is asked for"):
        engine.rollout(prompts(tokens=tokens, process=process))


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("in-process"))
    trainer.train()
    return trainer


def assert_ended_as(ours, theirs):
    """The draws are the same; log-probabilities, and so weights, differ by rounding."""
    others = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, others[name], rtol=0.0, atol=2e-5)
    groups = (trainer.progress.replay.state_dict()["groups"] for trainer in (ours, theirs))
    for one, other in zip(*groups, strict=True):
        assert torch.equal(one["final"], other["final"]) and torch.equal(one["call"], other["call"])


def test_a_trainer_ends_as_one_that_draws_in_its_own_process(server, tmp_path, in_process):
    trainer = trainer_of(tmp_path / "run", engine=engine_of(server, tmp_path / "weights"))
    trainer.train()
    assert_ended_as(trainer, in_process)
    assert not torch.allclose(trainer.model.lm_head.weight, model().lm_head.weight, atol=1e-3)


class Off:
    """An engine of a user's own, whose model is another."""

    def __init__(self, by):
        self.by, self.denoiser = by, as_denoiser(model())

    def update(self, parameters, version):
        dict(parameters)

    def rollout(self, prompts, base=None):
        way = InProcess(self.denoiser).rollout(prompts)
        return dataclasses.replace(way, log_prob=way.log_prob - self.by)


def test_an_engine_of_another_model_is_found_out(tmp_path):
    trainer_of(tmp_path / "near", engine=Off(0.02)).train()
    for by in (0.5, torch.nan):
        with pytest.raises(EngineError, match=r"are (0\.5|nan) from the model's own, on average of \d+ tokens"):
            trainer_of(tmp_path / "far", engine=Off(by)).train()


def test_a_model_of_other_blocks_than_the_server_s_is_refused(server, tmp_path):
    trainer = trainer_of(tmp_path / "run", engine=engine_of(server, tmp_path / "weights"), block_length=2)
    with pytest.raises(ValueError, match="model's block_length is 2, and that of the server's 4"):
        trainer.train()


def test_whole_blocks_of_a_model_that_has_none_are_refused(tmp_path):
    config = tiny_config(tmp_path, whole_blocks=True)
    with pytest.raises(ValueError, match="whole_blocks is for models whose attention has blocks"):
        DAMTrainer(tiny_model(), sum_reward, config, [{"prompt": [1]}])


def test_a_server_that_dies_ends_a_run_that_can_be_resumed(tmp_path, in_process):
    with served("--fdfo") as server:
        trainer = trainer_of(tmp_path / "run", Judge(server.url), engine_of(server, tmp_path / "weights"))
        with pytest.raises(EngineError, match=r"/generate: the server is (not there|gone)"):
            trainer.train()
    assert trainer.state.global_step == 1
    resumed = trainer_of(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert_ended_as(resumed, in_process)


@pytest.mark.full
def test_two_processes_share_a_server_and_end_together_when_it_dies(tmp_path, in_process):
    """The first sends the weights, both draw with them; what is drawn is what one process draws."""
    with served("--fdfo") as server:
        start = time.monotonic()
        ranks.succeed("tests.engines.process_run", 2, tmp_path, server.url)
    ended = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, parameter in in_process.model.state_dict().items():
        for rank in ended:
            torch.testing.assert_close(rank["weights"][name], parameter, rtol=0.0, atol=2e-5)
    for one, other in zip(ended[0]["groups"], in_process.progress.replay.state_dict()["groups"], strict=True):
        assert torch.equal(one["final"], other["final"]) and torch.equal(one["call"], other["call"])
    assert all("the server is " in rank["error"] and rank["step"] == 1 for rank in ended), [r["error"] for r in ended]
    assert time.monotonic() - start < 300.0


def test_a_request_of_another_is_drawn_from_the_models_own_law_or_refused(server):
    def asked(**params):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = json.dumps({"input_ids": [[1, 2, 3]], "sampling_params": [{"max_new_tokens": 4, **params}]})
        connection.request("POST", "/generate", body)
        return json.loads(connection.getresponse().read())

    (answer,) = asked()
    assert len(answer["output_ids"]) == 5 and MASK not in answer["output_ids"] and "dam" not in answer["meta_info"]
    for name, value in (("top_p", 0.9), ("top_k", 5), ("repetition_penalty", 1.1), ("regex", "a+")):
        assert f"leave out {name}" in asked(**{name: value})["error"]["message"]


def test_a_server_that_is_late_is_not_waited_for(server, tmp_path):
    engine, hurried = engine_of(server, tmp_path), engine_of(server, tmp_path, timeout=1.0)
    engine.update(served_parameters(model()), 1)
    hurried.update(None, 1)
    server.misbehaves("hang")
    start = time.monotonic()
    with pytest.raises(EngineError, match="/generate did not answer within 1 s"):
        hurried.rollout(prompts())
    assert time.monotonic() - start < 10.0


def test_a_server_that_draws_by_another_algorithm_is_refused(tmp_path):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"dllm_algorithm": "LowConfidence"}')

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.handle_request, daemon=True).start()
    engine = SGLangEngine(f"http://127.0.0.1:{server.server_address[1]}", tmp_path, block_length=4)
    with pytest.raises(EngineError, match="draws by 'LowConfidence': start it with --dllm-algorithm DAMRollout"):
        engine.update(served_parameters(model()), 1)
    server.server_close()
    with pytest.raises(EngineError, match="the server is not there"):
        engine.update(served_parameters(model()), 1)
