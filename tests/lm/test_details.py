"""The table of details names tests; a test that is renamed or removed must not stay in it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "rlhf" / "lm" / "README.md").read_text(encoding="utf-8")
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
}


def test_every_named_test_exists():
    named = set(re.findall(r"`(test_\w+)`", TABLE))
    assert len(named) > 60
    assert named <= TESTS, f"not found: {sorted(named - TESTS)}"


@pytest.mark.parametrize("number", range(1, 35))
def test_every_detail_has_a_row_with_a_test(number):
    row = re.search(rf"^\| {number} \|.*$", TABLE, flags=re.MULTILINE)
    assert row is not None
    assert "`test_" in row.group()
