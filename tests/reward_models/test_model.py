"""The score's position, the head, and the folder that transformers opens."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from reward_models.loading import make_reward_model, new_head, open_classifier, prepare_tokenizer
from reward_models.model import RewardModel, length_sorted_chunks, score_head
from rlhf.errors import ModelError
from rlhf.lm.loading import LoraSettings, ModelConfig, character_tokenizer

LENGTHS = [3, 9, 5, 1, 7]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def rows_of(lengths, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 28, (length,), generator=generator).tolist() for length in lengths]


def padded(rows, *, side, extra, pad_id):
    width = max(len(row) for row in rows) + extra
    fill = [[pad_id] * (width - len(row)) for row in rows]
    ids = [row + pad if side == "right" else pad + row for row, pad in zip(rows, fill, strict=True)]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(pad) for pad in fill]
    mask = [one + zero if side == "right" else zero + one for one, zero in zip(ones, zeros, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def one_by_one(model: RewardModel, rows):
    """Transformers' own forward of each row alone, without padding: its head then reads the last token too."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model.classifier(torch.tensor([row])).logits[0] for row in rows])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("pad_id", [0, 2, 11])  # the pad token, the end token, a token that occurs in texts
@pytest.mark.parametrize("chunk_tokens", [1, 16, 8192])
def test_padding_changes_no_score(tokenizer, architecture, side, extra, pad_id, chunk_tokens):
    model = make_reward_model(ModelConfig(config=architecture), tokenizer)
    model.chunk_tokens = chunk_tokens
    rows = rows_of(LENGTHS)
    expected = one_by_one(model, rows)
    with torch.no_grad():
        scores = model(*padded(rows, side=side, extra=extra, pad_id=pad_id))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_pad_token_equal_to_the_end_token_reads_the_end_token(reward_model):
    """PEERS trap 10: transformers' own head would read the token before the end."""
    end = 2
    rows = [[*row, end] for row in rows_of([4, 6])]
    ids, mask = padded(rows, side="right", extra=0, pad_id=end)
    expected = one_by_one(reward_model, rows)
    reward_model.config.pad_token_id = end
    with torch.no_grad():
        torch.testing.assert_close(reward_model(ids, mask), expected, atol=1e-5, rtol=1e-5)
        theirs = reward_model.classifier(ids, attention_mask=mask).logits.squeeze(1)
    assert (theirs - expected).abs().max() > 1e-2


def test_a_body_that_looks_ahead_is_recognised(tokenizer, architecture):
    """Only a causal body may be run without the mask that hides padding."""
    model = make_reward_model(ModelConfig(config=architecture), tokenizer)
    assert model._is_causal
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    assert not RewardModel(model.classifier)._is_causal


def test_shared_beginnings_change_no_score_and_no_gradient(tokenizer, architecture):
    """Against transformers' own body on each row alone."""
    model = make_reward_model(ModelConfig(config=architecture), tokenizer)
    first, second, alone = rows_of([5, 2, 4])
    rows = [[*first, 7, 8, 9], [*second, 7], [*first, 9, 2], alone, [*second, 8, 8, 8, 2]]
    shared = torch.tensor([5, 2, 5, 1, 2])
    weights = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0])
    classifier = model.classifier
    body = getattr(classifier, classifier.base_model_prefix)
    expected = torch.cat([score_head(classifier)(body(input_ids=torch.tensor([row]))[0][0, -1]) for row in rows])
    parameters = list(classifier.parameters())
    slopes = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    scores = model(*padded(rows, side="left", extra=2, pad_id=0), shared)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad((scores * weights).sum(), parameters, allow_unused=True)
    for one, other in zip(got, slopes, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_row_without_tokens_is_refused(reward_model):
    with pytest.raises(ModelError, match="no attended token"):
        reward_model(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 0]]))


def test_chunks_hold_every_row_once_within_the_budget():
    lengths = [3, 90, 5, 1, 7, 40, 41]
    chunks = list(length_sorted_chunks(lengths, 82))
    assert sorted(row for chunk in chunks for row in chunk) == list(range(7))
    assert all(len(chunk) == 1 or len(chunk) * max(lengths[row] for row in chunk) <= 82 for chunk in chunks)
    assert chunks[:2] == [[1], [6, 5]]  # 90 is alone over the budget; 41 and 40 together cost 82


def test_a_chunk_ends_where_padding_would_cost_more_than_another_forward():
    # 300 + (300 - 100) = 500 and 2 x 100 more would pad 400 tokens of the first row's width; 256 are allowed.
    assert list(length_sorted_chunks([100, 300, 290, 100, 100], 8192)) == [[1, 2, 0], [3, 4]]


def test_head_starts_from_the_stated_distribution():
    # N(0, 1/sqrt(h + 1)) with h = 4095: std 1/64, its standard error 1/64 / sqrt(2 x 4095) = 1.7e-4.
    weight = new_head(4095, seed=0).weight
    assert weight.shape == (1, 4095)
    assert weight.std().item() == pytest.approx(1 / 64, abs=7e-4)
    assert abs(weight.mean().item()) < 4 / 64 / math.sqrt(4095)
    assert new_head(4095, seed=0).bias is None
    assert torch.equal(weight, new_head(4095, seed=0).weight)
    assert not torch.equal(weight, new_head(4095, seed=1).weight)


def test_body_is_the_language_models(tmp_path, tokenizer, architecture):
    fresh = make_reward_model(ModelConfig(config=architecture), tokenizer)
    causal = AutoModelForCausalLM.from_config(fresh.config)
    causal.save_pretrained(tmp_path)
    model = make_reward_model(ModelConfig(path=str(tmp_path)), tokenizer)
    body = getattr(model.classifier, model.classifier.base_model_prefix)
    theirs = getattr(causal, causal.base_model_prefix).state_dict()
    assert body.state_dict().keys() == theirs.keys()
    for name, weight in body.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    assert torch.equal(score_head(model.classifier).weight, new_head(32, seed=0).weight)


def test_dropout_is_off(tokenizer):
    settings = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = make_reward_model(ModelConfig(config={**settings, "resid_pdrop": 0.5, "attn_pdrop": 0.5}), tokenizer)
    model.train()
    batch = padded(rows_of(LENGTHS), side="right", extra=0, pad_id=0)
    assert torch.equal(model(*batch), model(*batch))


def test_saved_folder_opens_with_transformers(tmp_path, tokenizer, architecture):
    model = make_reward_model(ModelConfig(config=architecture), tokenizer)
    model.save_pretrained(tmp_path, tokenizer)
    opened, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert opened.config.num_labels == 1
    rows = [[*row, tokenizer.eos_token_id] for row in rows_of(LENGTHS)]
    batch = padded(rows, side="right", extra=2, pad_id=tokenizer.pad_token_id)
    with torch.no_grad():
        ours, theirs = model(*batch), opened(batch[0], attention_mask=batch[1]).logits.squeeze(1)
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-6)
    reopened = make_reward_model(ModelConfig(path=str(tmp_path)), tokenizer, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(reopened(*batch), ours, atol=1e-6, rtol=1e-6)


def test_pipeline_gives_the_same_score(tmp_path, tokenizer, reward_model):
    reward_model.save_pretrained(tmp_path, tokenizer)
    text = "kt>ktaeio"
    classify = pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    row = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    expected = one_by_one(reward_model, [row]).item()
    shown = classify(text + tokenizer.eos_token, function_to_apply="none")[0]["score"]
    assert shown == pytest.approx(expected, abs=1e-6)
    assert classify(text + tokenizer.eos_token)[0]["score"] == pytest.approx(expected, abs=1e-6)


def test_gpt2_like_tokenizer_gets_a_pad_token_of_its_own(tmp_path):
    tokenizer = character_tokenizer("abc")
    tokenizer.pad_token = tokenizer.eos_token
    vocabulary = len(tokenizer)
    prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == vocabulary + 1
    model = make_reward_model(ModelConfig(config=LLAMA), tokenizer)
    model.save_pretrained(tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == model.config.pad_token_id == vocabulary


def test_embedding_grows_for_an_added_pad_token(tmp_path, tokenizer, reward_model):
    causal = AutoModelForCausalLM.from_config(reward_model.config)
    causal.save_pretrained(tmp_path)
    own = character_tokenizer("abcdefghijklmnopqrstuvwxyz> ")
    own.pad_token = own.eos_token
    prepare_tokenizer(own)
    model = make_reward_model(ModelConfig(path=str(tmp_path)), own)
    assert model.classifier.get_input_embeddings().weight.shape[0] == len(own) == len(tokenizer) + 1
    assert model.config.pad_token_id == own.pad_token_id != own.eos_token_id


def test_tokenizer_without_end_token_is_refused():
    tokenizer = character_tokenizer("abc")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end token"):
        prepare_tokenizer(tokenizer)


def test_missing_folder_and_language_model_folder_are_refused_as_reward_models(tmp_path, tokenizer, reward_model):
    with pytest.raises(ModelError, match="no such model folder"):
        open_classifier(tmp_path / "nothing")
    AutoModelForCausalLM.from_config(reward_model.config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"score\.weight"):
        open_classifier(tmp_path)
    with pytest.raises(ModelError):
        make_reward_model(ModelConfig(path=str(tmp_path / "nothing")), tokenizer)


def test_encoder_is_refused(tmp_path, tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a reward model"):
        make_reward_model(ModelConfig(path=str(tmp_path)), tokenizer)


def test_lora_trains_and_saves_the_head(tmp_path, tokenizer, reward_model):
    """PEERS trap 3: without a task type the head stays frozen and is not saved."""
    AutoModelForCausalLM.from_config(reward_model.config).save_pretrained(tmp_path / "base")
    model = make_reward_model(ModelConfig(path=str(tmp_path / "base"), lora=LoraSettings(rank=4)), tokenizer)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)
    rows = [[*row, tokenizer.eos_token_id] for row in rows_of(LENGTHS)]
    batch = padded(rows, side="right", extra=0, pad_id=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model(*batch).detach()
    for _ in range(3):
        optimizer.zero_grad()
        model(*batch).sum().backward()
        optimizer.step()
    with torch.no_grad():
        ours = model(*batch)
    assert (ours - before).abs().min() > 1e-3
    model.save_pretrained(tmp_path / "rm", tokenizer)
    script = (
        "import json, sys, torch; from transformers import AutoModelForSequenceClassification as A;"
        "ids, mask = (torch.tensor(x) for x in json.loads(sys.argv[2]));"
        "print(json.dumps(A.from_pretrained(sys.argv[1])(ids, attention_mask=mask).logits.squeeze(1).tolist()))"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "rm"), json.dumps([x.tolist() for x in batch])]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor(json.loads(output)), ours, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(*batch), ours, atol=1e-6, rtol=1e-6)  # saving left the adapters in place
