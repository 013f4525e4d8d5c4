"""LoRA reward models: trained, saved merged and apart, opened by a new process, by transformers and by peft."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from reward_models.loading import make_reward_model, open_classifier, prepare_tokenizer
from reward_models.scorer import RewardModelScorer
from reward_models.settings import RewardModelConfig
from reward_models.trainer import make_trainer
from rlhf.data.records import Ranking
from rlhf.errors import ModelError
from rlhf.lm.loading import LoraSettings, ModelConfig, character_tokenizer, load_causal_lm

ALPHABET = "abcdefghijklmnopqrstuvwxyz> "
PROMPTS, COMPLETIONS = ["ab>", "x>", "abcabc>"], ["cd", "q", ""]
RANKINGS = [Ranking("ab>", ("cd", "efgh", "q"), (0, 1, 2)), Ranking("x>", ("qqqqqq", "r"), (1, 0))] * 4
NEW_PROCESS = (
    "import json, sys; from reward_models import RewardModelScorer;"
    "folders, *texts = json.loads(sys.argv[1]);"
    "print(json.dumps({folder: RewardModelScorer.from_pretrained(folder)(*texts) for folder in folders}))"
)


def trained(folder, reward_model, *, pad_is_end=False):
    """A scorer trained with LoRA on a saved language model, normalised."""
    load_causal_lm(ModelConfig(config=reward_model.config.to_dict()), character_tokenizer(ALPHABET)).save_pretrained(
        folder
    )
    tokenizer = character_tokenizer(ALPHABET)
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token  # a pad token is added then, and the embedding grows
    tokenizer = prepare_tokenizer(tokenizer)
    model = make_reward_model(ModelConfig(path=str(folder), lora=LoraSettings(rank=4)), tokenizer)
    settings = RewardModelConfig(learning_rate=2e-2, batch_prompts=4, epochs=3)
    trainer = make_trainer(model, tokenizer, RANKINGS, held_out=RANKINGS, settings=settings)
    before = model.classifier.score.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.classifier.score.weight, before), "PEERS trap 3: the head stayed frozen"
    return RewardModelScorer.from_trainer(trainer)


@pytest.mark.slow
def test_a_new_process_gives_the_same_scores(tmp_path, reward_model):
    """TRL issues 578 and 1379: the head was lost between training and use."""
    expected = {}
    for pad_is_end in (False, True):
        scorer = trained(tmp_path / f"base_{pad_is_end}", reward_model, pad_is_end=pad_is_end)
        for adapters in ("merge", "keep"):
            folder = tmp_path / f"{adapters}_{pad_is_end}"
            scorer.save_pretrained(folder, adapters=adapters)
            expected[str(folder)] = scorer(PROMPTS, COMPLETIONS)  # saving leaves the adapters in place
    command = [sys.executable, "-c", NEW_PROCESS, json.dumps([list(expected), PROMPTS, COMPLETIONS])]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    for folder, scores in json.loads(done.stdout).items():
        assert scores == pytest.approx(expected[folder], abs=1e-6), folder


def test_kept_adapters_open_with_us_with_transformers_and_with_peft(tmp_path, reward_model):
    scorer = trained(tmp_path / "base", reward_model)
    scorer.save_pretrained(tmp_path / "saved", adapters="keep")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    opened = RewardModelScorer.from_pretrained(tmp_path / "saved")
    assert (opened.mean, opened.std) == (scorer.mean, scorer.std)
    assert opened(PROMPTS, COMPLETIONS) == pytest.approx(scorer(PROMPTS, COMPLETIONS), abs=1e-5)
    ids = torch.tensor([[*scorer.tokenizer("ab>cd")["input_ids"], scorer.tokenizer.eos_token_id]])
    expected = scorer.raw_scores(["ab>"], ["cd"])[0]
    for auto in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
        with torch.no_grad():
            logits = auto.from_pretrained(str(tmp_path / "saved"), num_labels=1)(ids).logits
        assert logits.item() == pytest.approx(expected, abs=1e-5)


def test_training_goes_on_from_kept_adapters(tmp_path, reward_model):
    scorer = trained(tmp_path / "base", reward_model)
    scorer.save_pretrained(tmp_path / "saved", adapters="keep")
    again = make_reward_model(ModelConfig(path=str(tmp_path / "saved")), scorer.tokenizer, seed=5)
    raw = RewardModelScorer(again, scorer.tokenizer).raw_scores(PROMPTS, COMPLETIONS)
    assert raw == pytest.approx(scorer.raw_scores(PROMPTS, COMPLETIONS), abs=1e-5)


def test_an_adapter_folder_without_the_head_is_refused(tmp_path, reward_model):
    """Elsewhere such a folder opens with a random head (TRL issues 578 and 1379)."""
    scorer = trained(tmp_path / "base", reward_model)
    scorer.save_pretrained(tmp_path / "saved", adapters="keep")
    file = tmp_path / "saved/adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(ModelError, match="saved without the reward model's head"):
        open_classifier(tmp_path / "saved")


def test_a_foreign_peft_folder_opens(tmp_path, reward_model, tokenizer):
    """As TRL's RewardTrainer saves one: no config of ours beside it."""
    load_causal_lm(ModelConfig(config=reward_model.config.to_dict()), tokenizer).save_pretrained(tmp_path / "base")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs = get_peft_model(theirs, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    ids = [*tokenizer("ab>cd")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([ids])).logits.item()
    scorer = RewardModelScorer.from_pretrained(tmp_path / "saved")
    assert scorer(["ab>"], ["cd"])[0] == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_kept_or_opened_is_refused(tmp_path, reward_model, tokenizer):
    with pytest.raises(ModelError, match="a model without adapters"):
        reward_model.save_pretrained(tmp_path / "a", tokenizer, adapters="keep")
    fresh = make_reward_model(ModelConfig(config=reward_model.config.to_dict(), lora=LoraSettings(rank=2)), tokenizer)
    with pytest.raises(ModelError, match="a fresh model"):
        fresh.save_pretrained(tmp_path / "b", tokenizer, adapters="keep")
    scorer = trained(tmp_path / "base", reward_model)
    scorer.save_pretrained(tmp_path / "saved", adapters="keep")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="Adapters need their base"):
        open_classifier(tmp_path / "saved")
