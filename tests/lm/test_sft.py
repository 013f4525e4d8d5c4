"""Supervised fine-tuning: what is learned, what is written, what is refused."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.records import Demonstration
from rlhf.errors import DataError, ModelError, TrainingError
from rlhf.lm.loading import LoraSettings, ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.sft import IGNORED_LABEL, SftConfig, make_sft_trainer, tokenize_demonstrations, train_sft

TOKENIZER = character_tokenizer("abc>")
PAD, END, A, B, C, ARROW = 0, 2, 3, 4, 5, 6
MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MODEL |= {"num_attention_heads": 2, "max_position_embeddings": 64}
DEMONSTRATIONS = [Demonstration("ba>", "ab"), Demonstration("c>", "c"), Demonstration("cab>", "abc")]


def make_model(**settings):
    torch.manual_seed(0)
    return load_causal_lm(ModelConfig(config=MODEL, **settings), TOKENIZER)


def config(**settings) -> SftConfig:
    return SftConfig(**{"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, **settings})


def test_labels_are_the_completion_and_its_end_token():
    rows, dropped = tokenize_demonstrations(TOKENIZER, DEMONSTRATIONS[:1], config=config())
    assert rows == [{"input_ids": [B, A, ARROW, A, B, END], "labels": [IGNORED_LABEL] * 3 + [A, B, END]}]
    assert dropped == 0


def test_prompts_are_learned_where_asked():
    rows, _ = tokenize_demonstrations(TOKENIZER, DEMONSTRATIONS[:1], config=config(completion_only=False))
    assert rows[0]["labels"] == rows[0]["input_ids"]


def test_the_end_token_is_learned_even_where_it_pads():
    """A collator that masks labels by pad id would hide every end token; the model would never stop."""
    tokenizer = character_tokenizer("abc>")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make_sft_trainer(make_model(), tokenizer, DEMONSTRATIONS, config=config())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    assert batch["labels"][1].tolist() == [IGNORED_LABEL] * 2 + [C, END] + [IGNORED_LABEL] * 4
    assert (batch["labels"] == END).sum() == 3


def test_the_loss_is_the_mean_over_completion_tokens(tmp_path):
    model = make_model()
    total, tokens = 0.0, 0
    for prompt, completion in (("ba>", [A, B, END]), ("c>", [C, END]), ("cab>", [A, B, C, END])):
        ids = TOKENIZER(prompt)["input_ids"] + completion
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(ids) - len(completion), len(ids)):
            total -= log_probs[place - 1, ids[place]].item()
            tokens += 1
    told = []
    train_sft(
        model,
        TOKENIZER,
        DEMONSTRATIONS,
        config=config(max_steps=1, batch_size=3, learning_rate=1e-9),
        folder=tmp_path,
        on_log=lambda step, metrics: told.append((step, metrics)),
    )
    assert told[0][0] == 1
    assert told[0][1]["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_microbatch_changes_no_weight(tmp_path):
    """Four rows of different lengths, whole or in four pieces."""
    rows = [*DEMONSTRATIONS, Demonstration("a>", "a")]
    for name, size in (("whole", None), ("pieces", 1)):
        settings = config(microbatch_size=size, max_steps=1)
        train_sft(make_model(), TOKENIZER, rows, config=settings, folder=tmp_path / name)
    whole, pieces = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "pieces"))
    for name, weight in whole.items():
        torch.testing.assert_close(pieces[name], weight, rtol=1e-4, atol=1e-5)


def test_packed_rows_do_not_see_one_another(tmp_path):
    losses = []
    for packing in (False, True):
        told = []
        settings = config(max_steps=1, batch_size=3, learning_rate=1e-9, packing=packing, max_length=32)
        train_sft(
            make_model(),
            TOKENIZER,
            DEMONSTRATIONS,
            config=settings,
            folder=tmp_path / str(packing),
            on_log=lambda step, metrics, told=told: told.append(metrics["loss"]),
        )
        losses.append(told[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_it_learns_and_writes_an_ordinary_folder(tmp_path):
    metrics = train_sft(
        make_model(), TOKENIZER, DEMONSTRATIONS, config=config(max_steps=40), folder=tmp_path, held_out=DEMONSTRATIONS
    )
    assert metrics["steps"] == 40.0
    # A fresh model knows nothing: log 7 = 1.9 nats a token.
    assert metrics["evaluation_loss"] < 1.0
    assert metrics["evaluation_perplexity"] == pytest.approx(math.exp(metrics["evaluation_loss"]))
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".bin"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("c>")["input_ids"]])
    assert END in model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0]


def test_a_lora_folder_opens_as_one_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    adapted = load_causal_lm(ModelConfig(path=str(tmp_path / "base"), lora=LoraSettings(rank=2)))
    train_sft(adapted, TOKENIZER, DEMONSTRATIONS, config=config(max_steps=3), folder=tmp_path / "lora")
    merged = load_causal_lm(ModelConfig(path=str(tmp_path / "lora")))
    ids = torch.tensor([[A, ARROW]])
    assert not torch.allclose(merged(ids).logits, model(ids).logits)


def test_too_long_demonstrations_are_refused_or_counted(tmp_path):
    with pytest.raises(DataError, match=r"demonstration 2.*8 tokens.*at most 7"):
        tokenize_demonstrations(TOKENIZER, DEMONSTRATIONS, config=config(max_length=7))
    rows, dropped = tokenize_demonstrations(TOKENIZER, DEMONSTRATIONS, config=config(max_length=7, too_long="drop"))
    assert (len(rows), dropped) == (2, 1)
    with pytest.raises(DataError, match="no demonstration is left"):
        tokenize_demonstrations(TOKENIZER, DEMONSTRATIONS, config=config(max_length=2, too_long="drop"))


def test_a_tokenizer_without_a_pad_token_is_refused():
    tokenizer = character_tokenizer("abc>")
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="pad token"):
        make_sft_trainer(make_model(), tokenizer, DEMONSTRATIONS, config=config())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        train_sft(model, TOKENIZER, DEMONSTRATIONS, config=config(), folder=tmp_path)


def test_nothing_is_told_to_anyone(tmp_path, monkeypatch):
    """TRL reports usage by default."""
    import trl.trainer.base_trainer

    def refuse(*arguments, **named):
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", refuse)
    train_sft(make_model(), TOKENIZER, DEMONSTRATIONS, config=config(max_steps=1), folder=tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
