"""The examples in the docstrings are checked by hand, and by this."""

import doctest
import importlib
import pkgutil

import pytest

import rlhf.rewards

MODULES = [module.name for module in pkgutil.iter_modules(rlhf.rewards.__path__, prefix="rlhf.rewards.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
