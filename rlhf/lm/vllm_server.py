"""A vLLM server on GPUs of its own, reached through TRL's client: prompts by HTTP, weights by NCCL.

Start it with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \
        --logprobs-mode processed_logprobs

MODEL is the folder or hub id that training starts from. Every training process sends its own prompts; the main one
streams the weights. Tested against a local stand-in; not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.lm.engine import Answer
from rlhf.lm.generator_config import VllmGeneratorConfig

REQUESTS_AT_ONCE = 64
"""Connections of one process, where each prompt is a request with a seed of its own; the size of the client's pool."""

START = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs"
)


class ServerEngine:
    """An `Engine` on a server.

    Args:
        config: Its address.
        accelerator: Whose processes take part; the main one joins the server's workers to send weights.
        connect: Makes the client from (address, port, timeout); None takes TRL's.

    Raises:
        ConfigError: No server answers, or it was started with other settings than it needs.
    """

    def __init__(
        self, config: VllmGeneratorConfig, accelerator: Accelerator, *, connect: Callable[..., Any] | None = None
    ) -> None:
        assert config.server is not None
        self._accelerator, self._address = accelerator, config.server
        try:
            self._client = (connect or _connect)(config.server, config.server_weights_port, config.server_timeout)
            _require_processed_log_probs(self._client.get_server_info(), config.server)
            if accelerator.is_main_process:
                self._client.init_communicator(device=accelerator.device)
        except (OSError, RuntimeError, ImportError) as error:  # the client's own words name what is missing
            raise ConfigError(
                str(error).strip().splitlines()[0],
                where="generator.server",
                got=config.server,
                remedy=f"Start it with: {START}",
            ) from error
        self._announced: list[tuple[str, str, list[int]]] | None = None

    def complete(
        self, prompts: Sequence[list[int]], *, count: int, settings: dict[str, Any], seeds: list[int] | None
    ) -> list[Answer]:
        """As in `Engine`."""
        named = {name: settings[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "logprobs")}
        others = {name: value for name, value in settings.items() if name not in named}

        def ask(some: list[list[int]], seed: int | None) -> list[Answer]:
            more = others if seed is None else {**others, "seed": seed}
            return _read(self._client.generate(prompts=some, n=count, generation_kwargs=more, **named))

        if seeds is None:
            return ask(list(prompts), None)
        # A request has one seed for all of its prompts, with which two equal prompts would get equal answers.
        with ThreadPoolExecutor(max_workers=min(REQUESTS_AT_ONCE, len(prompts))) as threads:
            parts = list(threads.map(lambda pair: ask([pair[0]], pair[1]), zip(prompts, seeds, strict=True)))
        return [answer for part in parts for answer in part]

    def load(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """As in `Engine`: nobody generates meanwhile, and nobody goes on before the last tensor arrived."""
        self._accelerator.wait_for_everyone()
        if self._announced is None:  # the server must know every tensor before the first one comes
            self._announced = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in weights()]
        if self._accelerator.is_main_process:
            self._client.update_named_params(self._announced, weights())
            self._client.reset_prefix_cache()
        else:
            for _ in weights():  # shards are gathered by all
                pass
        self._accelerator.wait_for_everyone()


def _connect(address: str, weights_port: int, timeout: float) -> Any:
    from trl.generation.vllm_client import VLLMClient

    return VLLMClient(base_url=address, group_port=weights_port, connection_timeout=timeout)


def _read(reply: dict[str, Any]) -> list[Answer]:
    """TRL's reply: token ids, and per token a list of log-probs, of which the only one is the chosen token's."""
    return [
        Answer(list(ids), [float("nan") if at[0] is None else float(at[0]) for at in log_probs])
        for ids, log_probs in zip(reply["completion_ids"], reply["logprobs"], strict=True)
    ]


def _require_processed_log_probs(settings: dict[str, Any], address: str) -> None:
    """Without it the server reports log-probs before temperature and filters, which nothing was sampled from."""
    found = settings.get("model_config", {}).get("logprobs_mode")
    if found != "processed_logprobs":
        raise ConfigError(
            "the server reports log-probs of another distribution than it samples from",
            where="generator.server",
            got=f"{address}: logprobs_mode {found}",
            expected="processed_logprobs",
            remedy=f"Start it with: {START}",
        )
