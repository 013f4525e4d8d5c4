"""The wheel works without the checkout: it carries the recipes, their configs and the type markers."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rlhf", "classic_rl", "reward_models")


@pytest.mark.slow
def test_recipes_come_with_the_wheel(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    names = {file.relative_to(installed).parts[0] for file in installed.rglob("*.py")}
    assert names == set(PACKAGES)
    assert all((installed / package / "py.typed").is_file() for package in PACKAGES)
    shipped = {file.relative_to(installed / "rlhf/_recipes") for file in (installed / "rlhf/_recipes").rglob("*.*")}
    there = {
        file.relative_to(ROOT / "recipes") for kind in ("*.py", "*.yaml") for file in (ROOT / "recipes").rglob(kind)
    }
    assert there <= shipped
    scores = "classic_rl/experiments/atari_scores"
    assert {file.name for file in (ROOT / scores).iterdir()} == {file.name for file in (installed / scores).iterdir()}
    # PYTHONPATH comes before the editable install of the checkout.
    environment = os.environ | {"PYTHONPATH": str(installed)}
    listed = subprocess.run(
        [sys.executable, "-m", "rlhf.cli", "ls"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"{file.stem}: " in listed.stdout for file in (ROOT / "recipes").glob("*.py"))
