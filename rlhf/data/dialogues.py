"""Dialogues written as one text, as in Anthropic's hh-rlhf and in Nectar, as chat messages."""

from __future__ import annotations

import re

from rlhf.errors import DataError

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_dialogue(text: str) -> list[dict[str, str]]:
    r"""Cut a dialogue at its turns; blanks around what was said are not part of it.

    A last turn of the assistant's may be empty, where an answer is asked for; so `[:-1]` is the prompt in any case.

    Args:
        text: "\n\nHuman: ...\n\nAssistant: ...", with or without the first blank line.

    Raises:
        DataError: It does not begin with a turn, or another turn than the last is empty.

    >>> split_dialogue("\n\nHuman: Hi\n\nAssistant: Hello\n\nthere")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello\n\nthere'}]
    >>> split_dialogue("Human: Hi\n\nAssistant:")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': ''}]
    """
    before, *pieces = _TURN.split(text)
    if before.strip() or not pieces:
        raise DataError("not a dialogue", got=text[:60], expected='a text that begins with "Human:" or "Assistant:"')
    messages = [
        {"role": _ROLES[name], "content": said.strip()} for name, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    asks = messages[-1] == {"role": "assistant", "content": ""}
    if any(not message["content"] for message in messages[: -1 if asks else None]):
        raise DataError("a turn of the dialogue is empty", got=text[-60:])
    return messages
