"""Texts to token ids and back, such that training sees what generation saw.

Prompt and completion are tokenized apart and concatenated, never jointly: in RL the model continues *the prompt's
tokens* with tokens of its own, and a joint tokenization may merge the last letters of the prompt with the first of the
completion into a token that generation can never produce at that place. Chat templates separate the two by special
tokens and newlines, and there both ways agree; `encode_completion` then returns exactly what follows the prompt in the
tokenization of the whole conversation.

A completion ends with the token that ends the assistant's turn. What a template prints after it (ChatML's newline)
belongs to the next turn: a policy stops before it and is never trained on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from rlhf.data.chat_templates import render, render_prompt, turn_end_id
from rlhf.data.continuation import continuation_ids, continuation_text, plain_ids, tokenize
from rlhf.data.records import Message, Prompt, Text, is_chat
from rlhf.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_PROBLEMS = 5


# --- prompts ------------------------------------------------------------------------------------------------------


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, *, max_length: int | None = None, where: str | None = None
) -> list[int]:
    """Tokenize a prompt so that the model's next token is the completion's first.

    Chat messages go through the chat template, with the header of the assistant's turn at the end; a last message of
    the assistant's is left open and continued. A string gets the tokenizer's beginning-of-text token, once even if
    the string already begins with it, and no end token.

    Args:
        tokenizer: The policy's tokenizer.
        prompt: A string or chat messages.
        max_length: Most tokens allowed; None allows any number.
        where: File and line of the prompt, for the error.

    Returns:
        The token ids.

    Raises:
        DataError: The prompt has more than `max_length` tokens or none, or the template refuses the conversation.
        ModelError: Chat messages, but the tokenizer has no chat template.
    """
    ids = _encode_chat_prompt(tokenizer, prompt, where) if is_chat(prompt) else _encode_string_prompt(tokenizer, prompt)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"the prompt {_preview(prompt)} has {len(ids)} tokens",
            where=where,
            expected=f"at most {max_length}",
            remedy="Raise the prompt length, or take such prompts out of the data; nothing is cut silently.",
        )
    return ids


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, max_length: int | None = None
) -> list[list[int]]:
    """Tokenize many prompts; those that cannot be are listed in one error.

    Raises:
        DataError: Some prompts are too long or refused by the template: source and reason of the first few.
        ModelError: See `encode_prompt`.
    """
    encoded: list[list[int]] = []
    problems: list[DataError] = []
    for index, prompt in enumerate(prompts):
        try:
            where = prompt.source or f"prompt {index}"
            encoded.append(encode_prompt(tokenizer, prompt.prompt, max_length=max_length, where=where))
        except DataError as problem:
            problems.append(problem)
    if not problems:
        return encoded
    if len(problems) == 1:
        raise problems[0]
    shown = "\n  ".join(str(problem) for problem in problems[:SHOWN_PROBLEMS])
    more = f"\n  ... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    raise DataError(f"{len(problems)} of {len(prompts)} prompts cannot be used:\n  {shown}{more}")


def _encode_string_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenize(tokenizer, text)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
    if end is not None and ids[-1:] == [end] and plain_ids(tokenizer, text)[-1:] != [end] and ids != [begin]:
        # Some tokenizers close every text with the end token; a prompt that is closed cannot be continued.
        ids = ids[:-1]
    return ids


def _encode_chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str | None) -> list[int]:
    return list(_prompt_ids(tokenizer, render_prompt(tokenizer, messages, where=where)))


_LAST_PROMPT: WeakKeyDictionary[Any, tuple[str, list[int]]] = WeakKeyDictionary()


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a rendered prompt; the last is kept, because the K completions of a prompt come one after another."""
    last = _LAST_PROMPT.get(tokenizer)
    if last is None or last[0] != text:
        last = _LAST_PROMPT[tokenizer] = (text, plain_ids(tokenizer, text))
    return last[1]


# --- completions --------------------------------------------------------------------------------------------------


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    *,
    add_end: bool = True,
    inner_end: Literal["refuse", "text"] = "refuse",
    where: str | None = None,
) -> list[int]:
    """Tokenize a completion so that `encode_prompt(prompt)` followed by it is what the model should have written.

    Args:
        tokenizer: The policy's tokenizer.
        prompt: A string or chat messages.
        completion: A string; or, after a chat prompt, the messages that follow it (a string stands for one message
            of the assistant's).
        add_end: Close the completion with the end token, exactly once even if a string already ends with it. False
            leaves it open.
        inner_end: What to do where the text spells the end token in its midst: `refuse` it, as data must be, or take
            the spelling as plain `text`, as when a policy's output is scored.
        where: File and line of the record, for the errors.

    Returns:
        The token ids, without the prompt's.

    Raises:
        DataError: The completion holds the end token in its midst: generation would have stopped there.
        ModelError: No end token, no chat template for chat messages, or a template that prints the prompt
            differently once an answer follows it.
    """
    if is_chat(prompt):
        ids, end = _encode_turns(tokenizer, prompt, completion, where)
    elif is_chat(completion):
        raise DataError("a string prompt cannot be continued by chat messages", where=where, remedy="Set `chat: true`.")
    else:
        ids, end = continuation_ids(tokenizer, completion), _eos_id(tokenizer)
        if add_end and end is None:
            raise _no_end_token(tokenizer)
        if ids[-1:] == [end]:
            ids.pop()
    single = not is_chat(completion) or len(completion) == 1
    if single and any(token in ids for token in end_token_ids(tokenizer)):
        if inner_end == "refuse":
            raise _inner_end(completion, where)
        ids = continuation_ids(tokenizer, _content_of(completion), split_special_tokens=True)
    return [*ids, end] if add_end and end is not None else ids


def _encode_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], completion: Text, where: str | None
) -> tuple[list[int], int]:
    """Tokens that the template adds to the prompt, up to the last end of a turn; and the token of that end."""
    answers: list[Message] = completion if is_chat(completion) else [{"role": "assistant", "content": completion}]
    prompt_text = render_prompt(tokenizer, prompt, where=where)
    whole_text = render(tokenizer, _join(prompt, answers), where=where)
    if not whole_text.startswith(prompt_text):
        raise ModelError(
            "the chat template prints the prompt differently once an answer follows it",
            where=where,
            got=(prompt_text[-60:], whole_text[-100:]),
            remedy="Give the tokenizer a template whose generation prompt is the beginning of the assistant's turn.",
        )
    prompt_ids, whole_ids = _prompt_ids(tokenizer, prompt_text), plain_ids(tokenizer, whole_text)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        ids = whole_ids[len(prompt_ids) :]
    else:
        # A merge across the boundary (a newline of the header with one of the answer): see the module's docstring.
        ids = continuation_ids(tokenizer, whole_text[len(prompt_text) :])
    ends = end_token_ids(tokenizer)
    places = [index for index, token in enumerate(ids) if token in ends]
    if not places:
        raise _no_end_token(tokenizer)
    return ids[: places[-1]], ids[places[-1]]


def _join(prompt: list[Message], answers: list[Message]) -> list[Message]:
    """The whole conversation; an assistant's turn that the prompt left open is continued, not followed by a second."""
    if prompt[-1]["role"] != "assistant" or answers[0]["role"] != "assistant":
        return [*prompt, *answers]
    content = prompt[-1]["content"] + answers[0]["content"]
    return [*prompt[:-1], {**answers[0], "content": content}, *answers[1:]]


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which a completion is over: the end token, and the one that closes the template's assistant turn.

    They differ where a base model's tokenizer got a chat template (`<|end_of_text|>` against `<|eot_id|>`); a
    generator has to stop at either.
    """
    ends = [token for token in (_eos_id(tokenizer), turn_end_id(tokenizer)) if token is not None]
    return list(dict.fromkeys(ends))


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], mask: Iterable[bool] | None = None
) -> str:
    """Turn a completion's tokens into the text that follows the prompt, special tokens left out.

    Tokenizers of the sentencepiece kind drop the space before the first word of a text; after a prompt that space is
    real and is kept.

    Args:
        tokenizer: The policy's tokenizer.
        ids: [T] token ids, a list or a tensor.
        mask: [T] True where a token belongs to the completion; None takes all.
    """
    tokens = _to_list(ids)
    if mask is not None:
        tokens = [token for token, kept in zip(tokens, _to_list(mask), strict=True) if kept]
    return continuation_text(tokenizer, tokens)


def _to_list(values: Iterable[Any]) -> list[Any]:
    """A tensor in one copy: walking over it makes a tensor of every element, which takes longer than decoding."""
    return values.tolist() if hasattr(values, "tolist") else list(values)  # type: ignore[attr-defined]


def require_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ModelError` with its remedy where the pad or the end token is missing."""
    if tokenizer.eos_token_id is None:
        raise _no_end_token(tokenizer)
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no pad token",
            where=tokenizer.name_or_path or None,
            remedy=f"Set model.pad_token (from Python, tokenizer.pad_token), for instance to the end token "
            f"{tokenizer.eos_token!r}: masks come from lengths here, so the two may be the same.",
        )


def _no_end_token(tokenizer: PreTrainedTokenizerBase) -> ModelError:
    if tokenizer.eos_token is not None:
        return ModelError(
            "the chat template does not close the assistant's turn with an end token, so an answer could never end",
            where=tokenizer.name_or_path or None,
            got=str(tokenizer.chat_template)[-120:],
            remedy=f"Let the template print {tokenizer.eos_token!r} after the assistant's words.",
        )
    return ModelError(
        "the tokenizer has no end token, so a completion could never end",
        where=tokenizer.name_or_path or None,
        remedy="Set tokenizer.eos_token to the token that ends an answer; a chat template must close turns with it.",
    )


def _inner_end(completion: Text, where: str | None) -> DataError:
    return DataError(
        f"the completion {_preview(completion)} holds the end token in its midst",
        where=where,
        expected="the end token at the end only, where it is added",
        remedy="Remove it from the text.",
    )


def _content_of(text: Text) -> str:
    return text if not is_chat(text) else str(text[-1].get("content", ""))


def _preview(text: Text) -> str:
    words = _content_of(text)
    return repr(words if len(words) <= 60 else words[:60] + "...")


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    end: Any = tokenizer.eos_token_id  # typed for tokenizers that have lists of special tokens
    return end
