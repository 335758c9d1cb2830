"""A server that stands in for SGLang's, in a process of its own: its scheduler and HTTP, on CPU, around our algorithm.

    python -m tests.engines.standin --mask 18 --fdfo

prints its port. The model is a small SDAR with random weights, which are nobody's until some are sent. What a request
goes through is what the interface records (tests/engines/sglang_interface.py): validate_request, blocks of the prompt
and then of masks, the algorithm's own loop, and entries of customized_info into meta_info. POST /misbehave
{"how": ...} has the next answer go wrong.
"""

import argparse
import contextlib
import http.server
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
import types

import torch
from safetensors.torch import load_file

import dam.engines
from tests.engines import sglang_interface as interface
from tests.engines import sglang_wheel
from tests.models.standins import SDARForCausalLM
from tests.models.standins.sdar import SDARConfig, block_mask


def algorithm_file():
    """The module of dam.engines.sglang_dllm, loaded from its file as SGLang loads what lies in its folder."""
    path = pathlib.Path(dam.engines.__file__).parent / "sglang_dllm.py"
    spec = importlib.util.spec_from_file_location("sglang.srt.dllm.algorithm.sglang_dllm", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Request:
    """SGLang's Req, as far as an algorithm and the scheduler below go."""

    def __init__(self, rid, input_ids, params, config):
        self.rid, self.origin_input_ids, self.output_ids = rid, list(input_ids), []
        self.sampling_params, self.dllm_config = interface.SamplingParams(**params), config
        self.customized_info = self.to_finish = self.finished_reason = None
        self.offset, self.incomplete, self.dllm_algo_state = 0, None, None

    @property
    def block(self):
        """Tokens of the block that it is at: given, then filled in, then masks."""
        size = self.dllm_config.block_size
        known = self.origin_input_ids + self.output_ids + [self.dllm_config.mask_id] * size
        return self.incomplete or known[self.offset : self.offset + size]

    @property
    def in_prompt(self):
        return self.offset + self.dllm_config.block_size <= len(self.origin_input_ids)

    def finished(self):
        return self.finished_reason is not None

    def take(self, tokens):
        """A block that is done: what is behind the prompt is put out."""
        new = tokens[max(0, len(self.origin_input_ids) - self.offset) :]
        self.offset += len(tokens)
        self.output_ids += new
        if new and self.to_finish is not None:
            self.finished_reason, self.to_finish = self.to_finish, None
        elif new and len(self.output_ids) >= self.sampling_params.max_new_tokens:
            self.finished_reason = interface.FINISH_LENGTH(self.sampling_params.max_new_tokens)


class Scheduler:
    def __init__(self, config):
        self.config = config

    def take(self, requests, result):
        """What a network call, or a block, has come to."""
        _, new, lengths, states, _ = result
        for n, request in enumerate(requests):
            if lengths is not None and lengths[n] == 0:
                request.incomplete, request.dllm_algo_state = new[n], states[n]
                continue
            request.incomplete = request.dllm_algo_state = None
            tokens = new[n] if new else request.block  # none of blocks that were given
            given = self.config.block_size - len(tokens)
            request.take(request.block[:given] + list(map(int, tokens)))


class Engine:
    """Model, scheduler and algorithm; of SGLang's own classes where a wheel is given."""

    def __init__(self, mask, fdfo, wheel=None, block_size=4):
        given = ("DAMRollout", {}, block_size, mask, 64, fdfo)
        if wheel is None:
            interface.install()
            self.config, self.request, scheduler = interface.DllmConfig(*given), Request, Scheduler
            algorithm = algorithm_file().Algorithm
        else:
            algorithm = sglang_wheel.install(wheel, tempfile.mkdtemp())["DAMRollout"]
            self.config = sys.modules["sglang.srt.dllm.config"].DllmConfig(*given)
            self.request, scheduler = sglang_wheel.classes()
        self.algorithm, self.scheduler = algorithm(self.config), scheduler(self.config)
        torch.manual_seed(99)
        self.model = SDARForCausalLM(SDARConfig(block_size=block_size)).eval()
        self.version = "default"
        self._context = {}  # tokens in front of the block of each request that is run

    def generate(self, requests):
        """Fills in requests, as many at a time as there are, each at a block of its own."""
        for request in requests:
            error = type(self.algorithm).validate_request(request)
            if error is not None:
                raise ValueError(error)
        while running := [request for request in requests if not request.finished()]:
            self._round([request for request in running if request.in_prompt] or running)

    def _round(self, requests):
        size = self.config.block_size
        positions = [range(r.offset, r.offset + size) for r in requests]
        batch = interface.ForwardBatch([r.rid for r in requests], [r.block for r in requests], positions)
        self._context = {r.rid: [*r.origin_input_ids, *r.output_ids][: r.offset] for r in requests}
        states = [r.dllm_algo_state for r in requests] if self.config.first_done_first_out_mode else None
        self.scheduler.take(requests, self.algorithm.run(self, batch, states))

    @torch.no_grad()
    def forward(self, batch, pp_proxy_tensors=None):
        """Logits of each request's block, behind what is in front of it: as a model runner gives them."""
        size, logits = self.config.block_size, []
        for rid, block in zip(batch.rids, batch.input_ids.view(-1, size).tolist(), strict=True):
            tokens = torch.tensor([self._context[rid] + block])
            seen = block_mask(tokens.shape[1], size)
            logits.append(self.model(tokens, attention_mask=seen).logits[0, -size:].float())
        output = types.SimpleNamespace(full_logits=torch.cat(logits), next_token_logits=None)
        return types.SimpleNamespace(logits_output=output, can_run_graph=False)

    def load(self, folder, version):
        """Weights of a folder; those that it lacks are missed, those that it has too many too."""
        self.model.load_state_dict(load_file(os.path.join(folder, "model.safetensors")), strict=True)
        self.version = version


class Handler(http.server.BaseHTTPRequestHandler):
    engine: Engine
    lock = threading.Lock()
    how = None  # it is to misbehave

    def log_message(self, *_):
        pass

    def _answer(self, content, status=200, lost=0):
        body = json.dumps(content).encode() if not isinstance(content, bytes) else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + lost))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._answer({"dllm_algorithm": type(self.engine.algorithm).__name__})

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            if self.path == "/misbehave":
                Handler.how = given["how"]
                self._answer({})
            elif self.path == "/update_weights_from_disk":
                self._update(given)
            elif self.path == "/generate":
                self._generate(given)
            else:
                self._answer({"error": "no such path"}, 404)

    def _update(self, given):
        try:
            self.engine.load(given["model_path"], given["weight_version"])
        except (RuntimeError, OSError) as error:
            self._answer({"success": False, "message": str(error)}, 400)
        else:
            self._answer({"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0})

    def _generate(self, given):
        how, Handler.how = Handler.how, None
        if how == "die":
            os._exit(3)
        if how == "hang":
            time.sleep(3)
        try:
            requests = [
                self.engine.request(f"request-{n}-{time.monotonic_ns()}", ids, params, self.engine.config)
                for n, (ids, params) in enumerate(zip(given["input_ids"], given["sampling_params"], strict=True))
            ]
            self.engine.generate(requests)
        except ValueError as error:
            self._answer({"error": {"message": str(error)}}, 400)
            return
        answers = [self._told(request) for request in requests]
        if how == "few":
            answers.pop()
        elif how == "no jumps":
            del answers[0]["meta_info"]["dam"]
        elif how == "lost jump":
            answers[0]["meta_info"]["dam"][0].pop()
        elif how == "wrong shape":
            answers[0]["meta_info"]["dam"][0][0].pop()
        elif how == "beyond":
            answers[0]["meta_info"]["dam"][0][0][0] = 10**6
        elif how == "twice":
            jumps = answers[0]["meta_info"]["dam"][0]
            jumps[1][0] = jumps[0][0]
        elif how == "positive":
            answers[0]["meta_info"]["dam"][0][0][3] = 1.0
        elif how == "no token":
            answers[0]["meta_info"]["dam"][0][0][1] = self.engine.config.mask_id
        elif how == "mixed weights":
            answers[0]["meta_info"]["weight_versions"].insert(0, {"version": "older", "start": 0, "end": 1})
        if how == "no JSON":
            self._answer(b"<html>")
        else:
            self._answer(answers, lost=100 if how == "cut off" else 0)

    def _told(self, request):
        told = {"id": request.rid, "finish_reason": request.finished_reason.to_json()}
        told["weight_version"] = self.engine.version
        told["weight_versions"] = [{"version": self.engine.version, "start": 0, "end": len(request.output_ids)}]
        for key, entries in (request.customized_info or {}).items():
            told[key] = entries[: len(request.output_ids)]
        return {"text": "", "output_ids": list(request.output_ids), "meta_info": told}


def serve(arguments, tell, wait):
    """Serves on a port that is told, until `wait` returns: it ends with whoever started it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mask", type=int, required=True)
    parser.add_argument("--fdfo", action="store_true")
    parser.add_argument("--wheel", help="SGLang's, of whose own files the scheduler is made")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    Handler.engine = Engine(given.mask, given.fdfo, given.wheel)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tell(server.server_address[1])
    threading.Thread(target=lambda: (wait(), os._exit(0)), daemon=True).start()
    server.serve_forever()


def serve_at(connection, *arguments):
    """The same for who has the other end of a connection: it is told the port, and closes it."""

    def wait():
        with contextlib.suppress(EOFError):
            connection.recv()

    serve(arguments, connection.send, wait)


if __name__ == "__main__":
    serve(sys.argv[1:], lambda port: print(port, flush=True), sys.stdin.read)
