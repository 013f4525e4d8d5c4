"""Reading rows from files, folders and the hub, each with the place it came from.

A row that cannot be read does not stop the reading: it carries its problem, so that the caller can list every bad
line of a file at once, before any training starts.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.settings import DataConfig, Format
from rlhf.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its source, or the reason why it cannot be read."""

    where: str
    values: dict[str, Any]
    problem: DataError | None = None


def read_rows(data: DataConfig) -> Iterator[Row]:
    """Yield the rows of a source in order, after `offset` and up to `limit`.

    Raises:
        DataError: The source is missing, unreadable as a whole, or of an unknown format.
    """
    rows = _open(data)
    for index, row in enumerate(rows):
        if index < data.offset:
            continue
        if data.limit is not None and index >= data.offset + data.limit:
            return
        yield row


def _open(data: DataConfig) -> Iterator[Row]:
    path = Path(data.path).expanduser()
    file_format = _file_format(path) if data.format == "auto" else data.format
    if path.is_dir() or file_format in ("datasets", "parquet"):
        return _read_dataset(data, path)
    if path.is_file():
        readers = {"jsonl": _read_json_lines, "json": _read_json, "csv": _read_csv, "text": _read_text_pieces}
        if file_format not in readers:
            raise DataError(
                "cannot tell the format of this file",
                where=str(path),
                got=path.name,
                expected=".jsonl, .json, .csv or .parquet",
                remedy="Set `format`; `format: text` reads a plain text file piece by piece.",
            )
        return readers[file_format](path, data)
    if file_format == "auto" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.path):
        return _read_dataset(data, path)
    raise DataError(
        "no such file or folder", where=data.path, remedy="Check the path; it is relative to the working directory."
    )


def _file_format(path: Path) -> Format:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    formats: dict[str, Format] = {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".json": "json",
        ".csv": "csv",
        ".parquet": "parquet",
    }
    return formats.get(suffixes[-1] if suffixes else "", "auto")


# --- files --------------------------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error


def _read_all(path: Path) -> str:
    content = _read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"is not UTF-8: {error.reason}", where=f"{path}, line {line}", remedy="Save the file as UTF-8."
        ) from error


def _read_json_lines(path: Path, data: DataConfig) -> Iterator[Row]:
    # Split at line feeds only: str.splitlines also cuts at U+2028, which JSON allows inside a string.
    lines = _read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError("the file is empty", where=str(path), expected="one JSON object a line")
    for number, line in enumerate(lines, start=1):
        yield _parse_line(line, f"{path}, line {number}")


def _parse_line(line: bytes, where: str) -> Row:
    if not line.strip():
        return Row(where, {}, DataError("the line is empty", expected="a JSON object"))
    try:
        return _row(json.loads(line.decode("utf-8")), where)
    except UnicodeDecodeError as error:
        return Row(where, {}, DataError(f"is not UTF-8: {error.reason}", remedy="Save the file as UTF-8."))
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} at column {error.colno}"
        return Row(where, {}, DataError(problem, got=line.decode("utf-8")[:80]))
    except RecursionError:
        return Row(where, {}, DataError("is nested too deeply to be read as JSON"))


def _row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return Row(where, {"text": value})
    if not isinstance(value, dict):
        return Row(where, {}, DataError("is no JSON object", got=value, expected='{"prompt": ..., ...}'))
    return Row(where, value)


def _read_json(path: Path, data: DataConfig) -> Iterator[Row]:
    """A JSON array, an object that holds one, or JSON lines under a .json name (as several published sets have)."""
    text = _read_all(path)
    start = text.lstrip()[:1]
    if data.records_at is not None:
        yield from _read_nested(text, path, data.records_at)
    elif start == "[":
        yield from _read_array(text, path)
    elif start:
        yield from _read_json_lines(path, data)
    else:
        raise DataError("the file is empty", where=str(path), expected="a JSON array of objects")


def _read_array(text: str, path: Path) -> Iterator[Row]:
    """Decode one item after the other, so that each knows its line."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line, counted, number = text.index("[") + 1, 1, 0, 0
    while True:
        gap = blank.match(text, position)
        assert gap is not None
        position, number = gap.end(), number + 1
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}, line {line}, item {number}"
        # The gap before an item holds exactly one comma, and none stands before the first or after the last.
        commas, closing = gap.group().count(","), text[position : position + 1] == "]"
        if commas != (0 if closing or number == 1 else 1):
            raise DataError("the JSON array has a comma too many or too few", where=where)
        if closing:
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}", where=where
            ) from error
        yield _row(value, where)
    if text[position + 1 :].strip():
        raise DataError("something follows the JSON array", where=where, got=text[position + 1 :].strip())
    if number == 1:
        raise DataError("the JSON array is empty", where=str(path), expected="one object or more")


def _read_nested(text: str, path: Path, key: str) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise DataError(f"is not JSON: {error.msg} at column {error.colno}", where=where) from error
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"nothing stands at {key!r}", where=str(path), got=got, remedy="Mend `records_at`.")
        value = value[part]
    if not isinstance(value, list) or not value:
        raise DataError(f"{key}: is no list of rows", where=str(path), got=value, expected="a list of objects")
    for number, item in enumerate(value, start=1):
        yield _row(item, f"{path}, {key}, item {number}")


def _read_csv(path: Path, data: DataConfig) -> Iterator[Row]:
    # The default limit of 131,072 characters a cell is below what a long dialogue takes.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_read_all(path), newline=""), strict=True)
    header: list[str] = next(reader, [])
    if not any(header):
        raise DataError("the file is empty", where=str(path), expected="a header line, then one row a line")
    if len(set(header)) < len(header):
        raise DataError("two columns have the same name", where=f"{path}, line 1", got=header)
    blank: list[Row] = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"is not CSV: {error}", where=where) from error
        if not cells:
            blank.append(Row(where, {}, DataError("the line is empty", expected=f"{len(header)} cells")))
            continue
        yield from blank
        blank.clear()
        problem = None
        if len(cells) != len(header):
            problem = DataError("wrong number of cells", got=len(cells), expected=f"{len(header)}, as in the header")
        yield Row(where, dict(zip(header, cells, strict=False)), problem)


def _read_text_pieces(path: Path, data: DataConfig) -> Iterator[Row]:
    """Pieces are stripped. An empty line among lines is a bad row; around longer separators it is mere layout."""
    if not data.separator:
        raise DataError("separator: is empty", where=str(path), remedy='Give what separates pieces, such as "\\n".')
    text = _read_all(path).replace("\r\n", "\n").rstrip()
    if not text:
        raise DataError("the file is empty", where=str(path), expected="pieces of text")
    line = 1
    for piece in text.split(data.separator):
        leading = piece[: len(piece) - len(piece.lstrip())]
        where = f"{path}, line {line + leading.count(chr(10))}"
        if piece.strip():
            yield Row(where, {"text": piece.strip()})
        elif data.separator == "\n":
            yield Row(where, {}, DataError("the line is empty", expected="a text"))
        line += piece.count("\n") + data.separator.count("\n")


# --- datasets -----------------------------------------------------------------------------------------------------


def _read_dataset(data: DataConfig, path: Path) -> Iterator[Row]:
    dataset = _load_dataset(data, path)
    label = f"{data.path}[{data.split}]" if path.suffix.lower() != ".parquet" else data.path
    if len(dataset) == 0:
        raise DataError("the dataset has no row", where=label)
    for number, values in enumerate(dataset, start=1):
        yield Row(f"{label}, row {number}", dict(values))


def _load_dataset(data: DataConfig, path: Path) -> Any:
    import datasets

    try:
        if path.suffix.lower() == ".parquet" and path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(str(path))
        else:
            return datasets.load_dataset(data.path, data.name, split=data.split)
    except Exception as error:  # `datasets` raises a dozen unrelated types for what is one mistake to the user
        raise DataError(
            f"`datasets` cannot load it: {type(error).__name__}: {error}",
            where=data.path,
            remedy="What is no file or folder here is taken for a hub id. Check the path, `split` and `name`, and that "
            "the hub can be reached.",
        ) from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if data.split not in dataset:
        raise DataError(
            f"there is no split {data.split!r}",
            where=data.path,
            expected=" or ".join(map(str, dataset)),
            remedy="Set `split`.",
        )
    return dataset[data.split]
