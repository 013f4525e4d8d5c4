"""The tokens between two turns of an assistant: what a template prints when the conversation goes on.

In a multi-turn episode the policy's own tokens are never decoded and encoded again: several spellings decode to one
text, so the tokens that are trained on would not be those that were drawn. Only what others say is tokenized, and it
is appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.data.chat_templates import render_prompt
from rlhf.data.continuation import continuation_ids
from rlhf.data.records import Message
from rlhf.data.tokenization import end_token_ids
from rlhf.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAND_IN = "stand-in.for.the.assistant"
"""Rendered in place of what the policy wrote, and never tokenized."""


def following_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ended: bool) -> list[int]:
    """Tokenize what stands between an assistant's turn and its next one.

    That is the rest of the turn's end (ChatML prints a newline after `<|im_end|>`), the messages, and the header of
    the assistant's next turn.

    Args:
        tokenizer: The policy's, with a chat template.
        messages: What was said in answer to the assistant, at least one message.
        ended: Whether the assistant's turn holds its end token already. A turn that was cut gets it from here.

    Returns:
        The token ids to append to the assistant's own.

    Raises:
        DataError: The template refuses the conversation.
        ModelError: No template, or one that does not close an assistant's turn with an end token.
    """
    before: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": STAND_IN}]
    text = render_prompt(tokenizer, [*before, *messages], where="text environment")
    _, found, after = text.partition(STAND_IN)
    ids = continuation_ids(tokenizer, after) if found else []
    if not ids or ids[0] not in end_token_ids(tokenizer):
        raise ModelError(
            "the chat template does not close an assistant's turn with an end token",
            where=tokenizer.name_or_path or None,
            got=text[-120:],
            remedy="Give the tokenizer a template that prints its end token right after the assistant's words.",
        )
    return ids[1:] if ended else ids
