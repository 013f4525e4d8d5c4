"""Small random models of many architectures, made fresh for each test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf.lm.policy import LanguageModelPolicy

VOCABULARY = 61
PAD, BOS, END = 0, 1, 2

_WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_GROUPED},
    "llama_tied": {"model_type": "llama", **_WIDE, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **_GROUPED},
    "qwen3": {"model_type": "qwen3", **_GROUPED, "head_dim": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"model_type": "gpt_neox", **_WIDE},
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi: no position_ids
    "gemma": {"model_type": "gemma", **_GROUPED, "head_dim": 8},
    "gemma2": {  # soft-capped attention and logits, every other layer with a short window
        "model_type": "gemma2",
        **_GROUPED,
        "head_dim": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
        "attn_implementation": "eager",
    },
    "gemma3": {"model_type": "gemma3_text", **_GROUPED, "head_dim": 8, "sliding_window": 6},
    "mistral": {"model_type": "mistral", **_GROUPED, "sliding_window": 6},
    "mixtral": {"model_type": "mixtral", **_GROUPED, "num_local_experts": 4},
    "cohere": {"model_type": "cohere", **_GROUPED, "logit_scale": 0.25},
    "granite": {"model_type": "granite", **_GROUPED, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "phi3": {"model_type": "phi3", **_GROUPED},
    "olmo2": {"model_type": "olmo2", **_GROUPED},
    "gpt_oss": {  # attention sinks
        "model_type": "gpt_oss",
        **_GROUPED,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "deepseek_v3": {  # multi-head latent attention: keys and values differ in width
        "model_type": "deepseek_v3",
        **_WIDE,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
}


def fresh_model(
    name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """A random model, its weights enlarged so that its distributions are far from uniform."""
    settings = {**CONFIGS[name], **changes}
    attention = settings.pop("attn_implementation", None)
    config = AutoConfig.for_model(
        settings.pop("model_type"),
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
        **settings,
    )
    torch.manual_seed(seed)
    arguments = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model


def left_padded(
    lengths: tuple[int, ...], *, seed: int = 1, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of the given lengths: ids [N, P] and mask [N, P]."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    return ids.masked_fill(~mask, PAD), mask


def mixed_precision_gaps(
    model: Any, prompts: tuple[torch.Tensor, torch.Tensor], result: Any, *, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean distance in nats of the trainer's bfloat16 log-probs from its own float32 ones, and from the sampler's."""
    ids, mask = (tensor.repeat_interleave(group_size, dim=0) for tensor in prompts)
    inputs = {"prompt_ids": ids, "prompt_mask": mask, "completion_mask": result.completion_mask}
    policy = LanguageModelPolicy(model)
    with torch.no_grad():
        exact = policy(inputs, result.completion_ids).log_probs
        with torch.autocast(ids.device.type, torch.bfloat16):
            trainers = policy(inputs, result.completion_ids).log_probs
    rounding, mismatch = (trainers - exact).abs(), (trainers - result.sampling_log_probs).abs()
    return rounding[result.completion_mask].mean(), mismatch[result.completion_mask].mean()
