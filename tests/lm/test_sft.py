"""Supervised fine-tuning: what is learned, what is written, what is refused."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlhf.data.records import Demonstration
from rlhf.errors import ConfigError, DataError, ModelError, TrainingError
from rlhf.lm.loading import LoraSettings, ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.sft import (
    IGNORED_LABEL,
    SftConfig,
    make_sft_trainer,
    optimize_sft,
    tokenize_demonstrations,
    train_sft,
)
from rlhf.lm.sft_rows import warn_of_unlearned_ends
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig

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


@pytest.mark.parametrize("completion_only", [True, False])
def test_packed_rows_do_not_see_one_another(tmp_path, completion_only):
    """Nor is the first token of one learned from the last of another."""
    losses = []
    for packing in (False, True):
        told = []
        settings = config(
            max_steps=1,
            batch_size=3,
            learning_rate=1e-9,
            packing=packing,
            max_length=32,
            completion_only=completion_only,
        )
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


# --- chats --------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<' + message['role'][0] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def chat_tokenizer():
    """`<u>hello<end><a>` and so on; the end of a turn is another token than the end of a text."""
    tokenizer = character_tokenizer("abc>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<u>", "<a>", "<end>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def turns(*contents):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def test_assistant_only_learns_every_turn_of_the_assistants_with_its_end():
    tokenizer = chat_tokenizer()
    user, assistant, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<u>", "<a>", "<end>"))
    demonstration = Demonstration(turns("a", "bc", "c"), [{"role": "assistant", "content": "b"}])
    ids = [user, A, end, assistant, B, C, end, user, C, end, assistant, B, end]
    for assistant_only, learned in ((False, {11, 12}), (True, {4, 5, 6, 11, 12})):
        rows, _ = tokenize_demonstrations(tokenizer, [demonstration], config=config(assistant_only=assistant_only))
        labels = [token if place in learned else IGNORED_LABEL for place, token in enumerate(ids)]
        assert rows == [{"input_ids": ids, "labels": labels}]


def test_a_template_that_prints_earlier_turns_differently_is_refused():
    """As Qwen3's does, which leaves out what was thought in earlier turns."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "message['content']", "(message['content'] if loop.last or message['role'] == 'assistant' else 'c')"
    )
    demonstration = Demonstration(turns("a", "b", "a"), [{"role": "assistant", "content": "b"}])
    with pytest.raises((DataError, ModelError), match="differently"):
        tokenize_demonstrations(tokenizer, [demonstration], config=config(assistant_only=True))


def test_a_missing_chat_template_is_refused_with_its_remedy():
    with pytest.raises(ModelError, match=r"no chat template.*chat version"):
        tokenize_demonstrations(
            TOKENIZER, [Demonstration(turns("a"), [{"role": "assistant", "content": "b"}])], config=config()
        )


def test_strings_that_pass_by_the_template_are_warned_of(caplog):
    tokenize_demonstrations(chat_tokenizer(), DEMONSTRATIONS, config=config())
    assert "set `chat: true`" in caplog.text


def test_an_end_that_is_not_learned_is_warned_of(caplog):
    learned = {"input_ids": [A, END], "labels": [A, END]}
    hidden = {"input_ids": [A, END], "labels": [A, IGNORED_LABEL]}
    endless = {"input_ids": [A, B], "labels": [A, B]}
    warn_of_unlearned_ends([learned, learned], TOKENIZER)
    assert not caplog.text
    warn_of_unlearned_ends([learned, hidden, endless, learned], TOKENIZER)
    assert "50.0 %" in caplog.text
    assert "rlhf show-batch" in caplog.text


def test_the_saved_model_stops_at_the_end_of_a_turn(tmp_path):
    """Otherwise transformers and vLLM stop at eos_token only, which this model was never shown."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(config=MODEL), tokenizer)
    chats = [Demonstration(turns("a"), [{"role": "assistant", "content": "b"}])]
    train_sft(model, tokenizer, chats, config=config(max_steps=1, batch_size=1), folder=tmp_path)
    ends = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert ends == [END, tokenizer.convert_tokens_to_ids("<end>")]


# --- noise, best model, early stop, resume -------------------------------------------------------------------------


def test_noise_on_the_embeddings_changes_training_and_not_evaluation(tmp_path):
    told = {}
    for noise in (None, 5.0):
        steps = []
        metrics = train_sft(
            make_model(),
            TOKENIZER,
            DEMONSTRATIONS,
            config=config(max_steps=1, batch_size=3, learning_rate=1e-9, neftune_noise=noise),
            folder=tmp_path / str(noise),
            held_out=DEMONSTRATIONS,
            on_log=lambda step, metrics, steps=steps: steps.append(metrics["loss"]),
        )
        told[noise] = (steps[0], metrics["evaluation_loss"])
    assert told[None][0] != pytest.approx(told[5.0][0], abs=1e-6)
    assert told[None][1] == pytest.approx(told[5.0][1], abs=1e-6)


def start_run(folder, *, training, **run):
    settings = RunConfig(directory=str(folder), progress_bar=False, **run)
    trainer = make_sft_trainer(make_model(), TOKENIZER, DEMONSTRATIONS, config=training, held_out=DEMONSTRATIONS)
    return trainer, Run(
        settings, resolved=training, iterations=trainer.optimizer_steps, accelerator=trainer.accelerator
    )


@pytest.mark.slow
def test_the_run_ends_when_evaluation_gets_no_better_and_the_best_model_is_kept(tmp_path):
    training = config(max_steps=20, batch_size=3, patience=2)
    trainer, run = start_run(tmp_path, training=training, evaluate_every=2, best_metric="merit", best_is="highest")
    merits = {0: 0.0, 2: 1.0, 4: 3.0, 6: 2.0, 8: 3.0}  # best at 4; 6 and 8 are no better

    optimize_sft(trainer, run, judge=lambda: {"merit": merits[trainer.state.global_step]}, patience=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["iteration"] == 8
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "not better than 3" in summary["ended_because"]
    assert (summary["metrics"]["best/merit"], summary["metrics"]["best/step"]) == (3, 4)
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "model_best").state_dict()
    trainer, run = start_run(tmp_path / "again", training=config(max_steps=20, batch_size=3), checkpoint_every=4)
    trainer.add_callback(_StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        optimize_sft(trainer, run)
    at_four = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "checkpoints" / "trainer" / "checkpoint-4")
    for name, weight in at_four.state_dict().items():
        torch.testing.assert_close(best[name], weight)


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **others):
        if state.global_step == self.step + 1:
            raise KeyboardInterrupt


def test_patience_without_evaluations_is_refused(tmp_path):
    trainer, run = start_run(tmp_path, training=config())
    with pytest.raises(ConfigError, match="evaluate_every"):
        optimize_sft(trainer, run, patience=1)


@pytest.mark.slow
def test_resume_goes_on_exactly(tmp_path):
    training = config(max_steps=6, batch_size=2)
    trainer, run = start_run(tmp_path / "whole", training=training)
    optimize_sft(trainer, run)
    whole = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer, run = start_run(tmp_path / "parts", training=training, checkpoint_every=3)
    trainer.add_callback(_StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        optimize_sft(trainer, run)
    trainer, run = start_run(tmp_path / "parts", training=training, resume=True)
    assert run.completed == 3
    optimize_sft(trainer, run)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, whole[name]), name
