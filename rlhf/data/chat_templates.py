"""Chat templates: what a conversation looks like as text, and which token closes an assistant's turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rlhf.data.continuation import plain_ids
from rlhf.data.records import Message
from rlhf.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, where: str | None = None) -> str:
    """Return the text of a conversation up to where the assistant's next word begins.

    Raises:
        DataError: The template refuses the conversation.
        ModelError: The tokenizer has no template.
    """
    if messages[-1]["role"] == "assistant":
        return render(tokenizer, messages, where=where, continue_final_message=True)
    return render(tokenizer, messages, where=where, add_generation_prompt=True)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, where: str | None = None, **settings: Any
) -> str:
    """Return the text of a conversation, as the template prints it with these settings.

    Raises:
        DataError: The template refuses the conversation.
        ModelError: The tokenizer has no template.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise ModelError(
            "the data holds chat messages, but the tokenizer has no chat template",
            where=tokenizer.name_or_path or None,
            remedy="Use the model's chat version, give the tokenizer a template, or turn the messages into strings.",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        roles = [message.get("role") for message in messages]
        raise DataError(f"the chat template refuses this conversation: {error}", where=where, got=roles) from error


_KNOWN_TURN_ENDS: WeakKeyDictionary[Any, tuple[str, int | None]] = WeakKeyDictionary()


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token with which the template closes an assistant's turn; None without one."""
    template = str(tokenizer.chat_template)
    if not tokenizer.chat_template:
        return None
    known = _KNOWN_TURN_ENDS.get(tokenizer)
    if known is None or known[0] != template:  # the template may be set after the tokenizer was first used here
        known = _KNOWN_TURN_ENDS[tokenizer] = (template, _find_turn_end(tokenizer))
    return known[1]


def _find_turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    question: list[Message] = [{"role": "user", "content": "a"}]
    prompt = render_prompt(tokenizer, question)
    whole = render(tokenizer, [*question, {"role": "assistant", "content": "a"}])
    special = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    after_content = whole[len(prompt) :].partition("a")[2] if whole.startswith(prompt) else whole.rpartition("a")[2]
    return next((token for token in plain_ids(tokenizer, after_content) if token in special), None)
