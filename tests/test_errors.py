"""The one sentence a user reads."""

import pickle

import pytest

from rlhf import errors
from rlhf.errors import DataError, UserError


def test_every_part_appears_in_order():
    error = UserError(
        "no field `prompt`", where="a.jsonl:3", got={"q": 1}, expected="a string", remedy="Map the columns."
    )
    assert str(error) == "a.jsonl:3: no field `prompt`; got {'q': 1}; expected a string. Map the columns."


def test_only_what_is_wrong_is_required():
    assert str(UserError("the file is empty")) == "the file is empty"


def test_none_can_be_what_was_found():
    assert str(UserError("not a score", got=None)) == "not a score; got None"


@pytest.mark.parametrize("value", ["x" * 10_000, list(range(10_000))])
def test_long_values_are_cut(value):
    assert len(str(UserError("too long", got=value))) < 250


def test_is_a_value_error_so_that_callers_need_no_import():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) >= 6
    assert all(issubclass(kind, ValueError) for kind in kinds)


def test_survives_the_way_between_processes():
    error = DataError("no field `prompt`", where="a.jsonl:3", remedy="Map the columns.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is DataError
    assert str(copy) == str(error)
    assert copy.where == "a.jsonl:3"
