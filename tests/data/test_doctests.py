"""The examples in the docstrings are checked by hand, and by this."""

import doctest
import importlib
import pkgutil

import pytest

import rlhf.data

MODULES = [module.name for module in pkgutil.iter_modules(rlhf.data.__path__, prefix="rlhf.data.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
