"""A vLLM server reached by TRL's own client, over HTTP to a local stand-in; the NCCL part is replaced."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import trl.generation.vllm_client as trl_client
from accelerate import Accelerator

from rlhf.errors import ConfigError
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.generator_config import VllmGeneratorConfig
from rlhf.lm.vllm_generator import VllmGenerator
from rlhf.lm.vllm_server import ServerEngine
from tests.lm.fresh_models import END, PAD, fresh_model
from tests.lm.stand_in_vllm import LLM, SamplingParams
from tests.lm.test_vllm_generator import draw, moved


class Server(ThreadingHTTPServer):
    """The endpoints that the client asks, answered by the stand-in of an engine."""

    def __init__(self, model, folder, *, logprobs_mode="processed_logprobs"):
        super().__init__(("127.0.0.1", 0), Handler)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        self.engine = LLM(str(folder), dtype="float32", max_model_len=None, seed=0)
        self.requests, self.lock = [], threading.Lock()
        self.settings = {
            "model_config": {"logprobs_mode": logprobs_mode},
            "weight_transfer_config": {"backend": "nccl"},
        }
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        answers = {"/health": {}, "/v1/models": {"data": [{"id": "served"}]}, "/get_world_size": {"world_size": 1}}
        answers["/server_info"] = {"vllm_config": self.server.settings}
        self.reply(answers[path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if self.path == "/reset_prefix_cache":
            self.server.engine.reset_prefix_cache()
            return self.reply({"success": True})
        assert self.path == "/v1/completions"
        assert (body["model"], body["return_token_ids"]) == ("served", True)
        names = SamplingParams.__dataclass_fields__
        with self.server.lock:
            self.server.requests.append(body)
            parameters = SamplingParams(**{name: value for name, value in body.items() if name in names})
            prompts = [{"prompt_token_ids": ids} for ids in body["prompt"]]
            outputs = self.server.engine.generate(prompts, [parameters] * len(prompts))
        choices = [choice(output, answer) for output in outputs for answer in output.outputs]
        return self.reply({"choices": choices})

    def reply(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def choice(output, answer):
    names = [f"token_id:{token}" for token in answer.token_ids]
    values = [at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs, strict=True)]
    return {
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": answer.token_ids,
        "logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": [None] * len(names)},
    }


@pytest.fixture
def client(monkeypatch):
    """TRL's client with its NCCL parts replaced by a direct write into the engine."""
    monkeypatch.setattr(trl_client, "is_vllm_available", lambda *arguments, **named: True)

    class Client(trl_client.VLLMClient):
        def init_communicator(self, device=0):
            assert self.get_server_info()["weight_transfer_config"] is not None
            assert self.get_world_size() == 1

        def update_named_params(self, metadata, named_params):
            sent = list(named_params)
            told = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in sent]
            assert told == metadata  # the server reads the stream by what was announced
            self.server.engine.apply_model(lambda model: model.load_weights(iter(sent)))

    return Client


def connect_to(server, client):
    def connect(address, weights_port, timeout):
        assert (weights_port, timeout) == (51216, 240.0)
        connected = client(base_url=address, group_port=weights_port, connection_timeout=timeout)
        connected.server = server
        return connected

    return connect


def make(server, model, client, **changes):
    config = VllmGeneratorConfig(server=server.address, **changes)
    engine = ServerEngine(config, Accelerator(cpu=True), connect=connect_to(server, client))
    seeds = config.request_seeds
    generator = VllmGenerator(engine, model, end_token_ids=[END], pad_token_id=PAD, request_seeds=seeds)
    generator.synchronize()
    return generator


def test_answers_follow_the_weights_that_were_sent(client, tmp_path):
    model = fresh_model("llama")
    server = Server(model, tmp_path)
    generator = make(server, model, client)
    moved(model)
    generator.synchronize()
    own = TransformersGenerator(model, end_token_ids=END, pad_token_id=PAD)
    expected, found = (draw(which, greedy=True, group_size=2)[2] for which in (own, generator))
    assert torch.equal(found.completion_ids, expected.completion_ids)
    torch.testing.assert_close(found.sampling_log_probs, expected.sampling_log_probs, rtol=1e-4, atol=1e-5)
    assert server.engine.loads == 2
    server.shutdown()


def test_each_prompt_is_a_request_with_a_seed_of_its_own(client, tmp_path):
    model = fresh_model("llama")
    server = Server(model, tmp_path)
    generator = make(server, model, client)
    first, again = (draw(generator)[2].completion_ids for _ in range(2))
    assert torch.equal(first, again)
    requests = server.requests[:4]
    assert len({request["seed"] for request in requests}) == 4
    assert all(len(request["prompt"]) == 1 and request["n"] == 2 for request in requests)
    assert all(request["stop_token_ids"] == [END] and request["ignore_eos"] for request in requests)
    server.shutdown()


def test_without_request_seeds_all_prompts_are_one_request(client, tmp_path):
    model = fresh_model("llama")
    server = Server(model, tmp_path)
    draw(make(server, model, client, request_seeds=False))
    (request,) = server.requests
    assert len(request["prompt"]) == 4
    assert "seed" not in request
    server.shutdown()


def test_a_server_that_reports_log_probs_of_another_distribution_is_refused(client, tmp_path):
    model = fresh_model("llama")
    server = Server(model, tmp_path, logprobs_mode="raw_logprobs")
    with pytest.raises(ConfigError, match=r"raw_logprobs.*--logprobs-mode processed_logprobs"):
        make(server, model, client)
    server.shutdown()


def test_a_server_that_is_not_there_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setattr(trl_client, "is_vllm_available", lambda *arguments, **named: True)
    config = VllmGeneratorConfig(server="http://127.0.0.1:9", server_timeout=0)
    with pytest.raises(ConfigError, match=r"can't be reached.*vllm serve MODEL"):
        ServerEngine(config, Accelerator(cpu=True))


def test_weights_go_to_a_server_by_cuda_only(monkeypatch, tmp_path):
    """TRL's own init_communicator, on a CPU."""
    monkeypatch.setattr(trl_client, "is_vllm_available", lambda *arguments, **named: True)
    monkeypatch.setattr(trl_client, "get_ip", lambda: "127.0.0.1", raising=False)
    server = Server(fresh_model("llama"), tmp_path)
    with pytest.raises(ConfigError, match="CUDA"):
        ServerEngine(VllmGeneratorConfig(server=server.address), Accelerator(cpu=True))
    server.shutdown()
