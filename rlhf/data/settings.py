"""The settings of a data source: one `DataConfig` per file, folder or hub set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config import Config

Format = Literal["auto", "jsonl", "json", "csv", "text", "parquet", "datasets"]


class DataConfig(Config):
    """Where rows come from and how they become records."""

    path: str
    """A file (.jsonl, .json, .csv, also with .gz; .parquet), a folder written by `save_to_disk`, or a hub id."""
    format: Format = "auto"
    """Told by the path's ending when auto. `text` makes every piece of a plain text file a row `{text}`."""
    split: str = "train"
    """Which split of a `datasets` folder or hub set; files have none."""
    name: str | None = None
    """Which configuration of a hub set, such as `main` for openai/gsm8k."""
    records_at: str | None = None
    """The key under which a JSON object holds its list of rows, with dots for deeper ones."""
    separator: str = "\n"
    """What separates the pieces of a text file; a blank line is "\\n\\n"."""
    columns: dict[str, str] = {}
    """Our name -> the file's name, such as `completions: responses`. The column is renamed; a column of the file that
    already has our name is replaced."""
    derive: dict[str, str] = {}
    """Our name -> a Jinja template over the row's columns ("{{ Body }} {{ Question }}", giving a string), or, without
    braces, a Jinja expression (`[response1, response2]`, giving any value). Further filters: `from_json`, `log`,
    `logit`, and `dialogue`, which cuts a text of "Human:" and "Assistant:" turns into chat messages."""
    keep: list[str] | None = None
    """Which further columns prompts pass on to reward functions; None passes all."""
    chat: bool = False
    """Wrap string prompts into a user message and string completions into an assistant message."""
    system: str | None = None
    """A system message for every chat prompt that has none."""
    assistant_turns: Literal["last", "all"] = "last"
    """Which assistant turns of `messages` become demonstrations."""
    order: Literal["auto", "ranks", "scores", "best_first"] = "auto"
    """What orders completions; auto takes `ranks`, else `scores`. `best_first` trusts the order of the list."""
    min_score_gap: float = Field(0.0, ge=0)
    """Scores nearer than this to the next one are ties (see `ranks_from_scores`)."""
    tied: Literal["refuse", "keep", "drop"] = "refuse"
    """What to do with a ranking that prefers nothing."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """`drop` leaves bad rows out, with one warning that counts them and shows the first."""
    offset: int = Field(0, ge=0)
    """Rows left out at the start."""
    limit: int | None = Field(None, ge=1)
    """Rows read at most, counted before any is dropped."""
