from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

FORMULAS = ["advantages", "aggregation", "corrections", "groups", "kl", "masking", "ratios", "surrogates", "values"]
OTHERS = ["advantage_axis", "algorithm", "entropy", "estimate", "objective", "presets", "surrogate_axis", "types"]


@pytest.mark.parametrize("name", FORMULAS + OTHERS)
def test_examples_in_docstrings_are_true(name):
    module = importlib.import_module(f"rlhf.core.{name}")
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted > 0 or name in OTHERS


@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_carries_an_example(name):
    module = importlib.import_module(f"rlhf.core.{name}")
    without = [
        function.__name__
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not function.__name__.startswith("_")
        and ">>>" not in (function.__doc__ or "")
    ]
    # The reduction of one process and the choice of a rule are no formulas.
    assert set(without) <= {"identity", "make_kl_coefficient"}
