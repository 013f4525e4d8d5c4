"""PPO against any reward: reward model folders, an ensemble, a function, a service, or a mix of them, part by part."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.scorer import RewardModelScorer
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import validate
from rlhf.lm.loading import ModelConfig, character_tokenizer

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


class Service(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"scores": [float(text.count("a")) for text in body["completions"]]}).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def save_reward_model(folder, *, seed, alphabet):
    tokenizer = prepare_tokenizer(character_tokenizer(alphabet))
    model = make_reward_model(ModelConfig(config={**MODEL, "max_position_embeddings": 64}), tokenizer, seed=seed)
    RewardModelScorer(model, tokenizer).save_pretrained(folder)


def test_ppo_with_a_mix_logs_every_part(tmp_path, service):
    # The reward models' alphabets are in another order than the policy's: other ids for every letter.
    for seed in (0, 1):
        save_reward_model(tmp_path / f"rm_{seed}", seed=seed, alphabet="zyxwvutsrqponmlkjihgfedcba>")
    model = "reward_models:RewardModelScorer.from_pretrained"
    reward = [
        {"function": model, "arguments": {"folder": str(tmp_path / "rm_0"), "device": "cpu"}, "weight": 0.5},
        {
            "function": "reward_models:EnsembleScorer.from_pretrained",
            "arguments": {"folders": f"{tmp_path}/rm_*", "combine": "mean_minus_variance", "device": "cpu"},
            "name": "cautious",
        },
        {"function": "rlhf.rewards:HttpReward", "arguments": {"url": service}, "weight": 0.25, "name": "judge"},
        {"function": f"{__file__}:length", "role": "penalty", "weight": 0.1},
    ]
    recipe = import_recipe(find_recipe("ppo_rlhf"))
    values = {
        "model": {"config": MODEL},
        "prompts": {"task": {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 40, "held_out": 6}},
        "reward": reward,
        "collector": {"prompts_per_iteration": 8, "group_size": 2, "sampling": {"max_completion_length": 5}},
        "update": {"learning_rate": 1e-3},
        "iterations": 2,
        "evaluation": {"samples_per_prompt": 1},
        "run": {"directory": str(tmp_path / "run"), "progress_bar": False},
    }
    recipe.main(validate(recipe.CONFIG, values))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        parts = {name: line[f"reward/{name}_mean"] for name in ("reward_model", "cautious", "judge", "length")}
        assert all(math.isfinite(value) for value in parts.values())
        members = [line["reward/ensemble_member_0"], line["reward/ensemble_member_1"]]
        # The first member is the reward model that is also a part of its own.
        assert members[0] == pytest.approx(parts["reward_model"], abs=1e-5)
        assert parts["cautious"] <= sum(members) / 2 + 1e-6
        assert line["reward/ensemble_disagreement"] > 0
        expected = 0.5 * parts["reward_model"] + parts["cautious"] + 0.25 * parts["judge"] + 0.1 * parts["length"]
        assert line["rollout/score_mean"] == pytest.approx(expected, abs=1e-4)


def length(completions, **columns):
    return torch.tensor([-float(len(text)) for text in completions])
