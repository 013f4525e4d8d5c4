"""A reward over HTTP against a server on this machine: what is sent, what is retried, what stops a run."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf.errors import RewardError
from rlhf.rewards.combination import CombinedReward, RewardPart
from rlhf.rewards.http import HttpReward
from rlhf.rewards.loading import load_reward
from rlhf.rewards.protocol import score_completions


class Server:
    """Answers each request with the next of `answers` (status, body or callable), the last for ever."""

    def __init__(self):
        self.requests, self.headers, self.answers = [], [], [(200, lambda body: {"scores": lengths(body)})]
        self.delay, self.extra_headers = 0.0, {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                owner.headers.append(self.headers)
                status, answer = owner.answers.pop(0) if len(owner.answers) > 1 else owner.answers[0]
                time.sleep(owner.delay)
                text = answer if isinstance(answer, str) else json.dumps(answer(body) if callable(answer) else answer)
                self.send_response(status)
                for name, value in owner.extra_headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *arguments: None  # a client that gave up is no news
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def lengths(body):
    return [float(len(text)) for text in body["completions"]]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def ask(reward, *, columns=None):
    return score_completions(
        reward,
        prompts=["p", "q", "r"],
        completions=["a", "bb", "ccc"],
        columns=columns,
        completion_ids=[[1], [2], [3]],
    ).tolist()


def test_prompts_completions_and_columns_are_sent_and_scores_come_back(server):
    assert ask(HttpReward(server.url), columns={"answer": ["1", "2", "3"]}) == [1, 2, 3]
    assert server.requests == [
        {"prompts": ["p", "q", "r"], "completions": ["a", "bb", "ccc"], "columns": {"answer": ["1", "2", "3"]}}
    ]


def test_batches_and_chosen_columns(server):
    columns = {"answer": ["1", "2", "3"], "secret": [object()] * 3}
    reward = HttpReward(server.url, batch_size=2, columns=["answer"])
    assert ask(reward, columns=columns) == [1, 2, 3]
    assert [request["completions"] for request in server.requests] == [["a", "bb"], ["ccc"]]
    assert [request["columns"] for request in server.requests] == [{"answer": ["1", "2"]}, {"answer": ["3"]}]
    with pytest.raises(RewardError, match="cannot be written as JSON"):
        ask(HttpReward(server.url), columns=columns)
    with pytest.raises(RewardError, match="no column 'anwser' to send"):
        ask(HttpReward(server.url, columns=["anwser"]), columns=columns)


def test_a_config_names_it(server):
    reward = load_reward("rlhf.rewards:HttpReward", arguments={"url": server.url, "retries": 0})
    assert ask(reward) == [1, 2, 3]


def test_null_leaves_the_part_out_of_a_mix_whose_parts_are_logged(server):
    server.answers = [(200, {"scores": [1.0, None, 3.0]})]

    def constant(completions, **columns):
        return [10.0] * len(completions)

    mix = CombinedReward([RewardPart(HttpReward(server.url), weight=2.0, name="judge"), (constant, 1.0)])
    assert ask(mix) == [12, 10, 16]
    metrics = mix.metrics()
    assert metrics["reward/judge_mean"] == 2  # (1 + 3) / 2
    assert metrics["reward/judge_missing"] == pytest.approx(1 / 3)
    assert metrics["reward/constant_mean"] == 10


def test_temporary_failures_are_retried_after_growing_waits(server, monkeypatch):
    waits = []
    monkeypatch.setattr("rlhf.rewards.http.time.sleep", lambda seconds: waits.append(seconds))
    server.answers = [(503, "busy"), (429, "slow down"), (500, "oops"), (200, {"scores": [1, 2, 3]})]
    server.extra_headers = {"Retry-After": "2"}
    # The handler's own sleep of 0 s goes through the same module; only waits of the client are above 0.
    assert ask(HttpReward(server.url, backoff=1.5)) == [1, 2, 3]
    # 1.5 x 1, 2, 4; the server's two seconds are longer than the first.
    assert [wait for wait in waits if wait > 0] == [2, 3, 6]


def test_lasting_failure_names_address_attempts_and_status(server):
    server.answers = [(503, "the judge is out to lunch")]
    with pytest.raises(RewardError) as failure:
        ask(HttpReward(server.url, retries=2, backoff=0))
    for part in (server.url, "status 503", "3 of 3 attempts", "out to lunch"):
        assert part in str(failure.value)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 404])
def test_what_will_not_go_away_is_not_retried(server, status):
    server.answers = [(status, "no")]
    server.extra_headers = {"Location": server.url}
    with pytest.raises(RewardError, match=rf"status {status} .*1 of 4 attempts"):
        ask(HttpReward(server.url, backoff=0))
    assert len(server.requests) == 1


def test_timeout(server):
    server.delay = 3.0
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer within 0\.05 s \(2 of 2 attempts\)"):
        ask(HttpReward(server.url, timeout=0.05, retries=1, backoff=0))
    assert time.monotonic() - start < 2.5


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(RewardError, match=r"127\.0\.0\.1:9/.*no connection.*2 of 2 attempts\)\. Look at"):
        ask(HttpReward("http://127.0.0.1:9/", retries=1, backoff=0))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"scores": [1.0, 2.0]}, "has 2 scores for 3 completions"),
        ('{"scores": [1.0, NaN, 2.0]}', "score nan for completion 1, no finite number"),
        ('{"scores": [1.0, 2.0, Infinity]}', "score inf for completion 2"),
        ({"scores": [1.0, "high", 2.0]}, "score 'high' for completion 1"),
        ({"scores": [1.0, True, 2.0]}, "score True for completion 1"),
        ({"score": 1.0}, "has no list `scores`"),
        ([1.0, 2.0, 3.0], "has no list `scores`"),
        ("<html>welcome</html>", "is no JSON.*<html>welcome"),
    ],
)
def test_wrong_answers_stop_the_run_at_once(server, answer, reason):
    server.answers = [(200, answer)]
    with pytest.raises(RewardError, match=reason):
        ask(HttpReward(server.url, backoff=0))
    assert len(server.requests) == 1


def test_the_token_is_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    server.answers = [(403, "who are you")]
    with pytest.raises(RewardError) as failure:
        ask(HttpReward(server.url, token_variable="JUDGE_TOKEN"))
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(failure.value)
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(RewardError, match="environment variable is not set"):
        HttpReward(server.url, token_variable="JUDGE_TOKEN")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"url": "file:///etc/passwd"}, "not an http address"),
        ({"url": "http://x", "timeout": 0}, "timeout is too small"),
        ({"url": "http://x", "retries": -1}, "retries is too small"),
        ({"url": "http://x", "batch_size": 0}, "batch_size is too small"),
    ],
)
def test_settings_without_meaning_are_refused(settings, reason):
    with pytest.raises(RewardError, match=reason):
        HttpReward(**settings)
