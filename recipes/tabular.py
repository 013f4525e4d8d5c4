"""Solve a small environment exactly, or learn its action values step by step; judged by exact evaluation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from classic_rl.saving import save_agent
from classic_rl.tabular.solving import Algorithm, TabularEnvironment, make_solver
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.run import Run, RunConfig


class TabularConfig(Config):
    """A run: an environment, a method, and how many steps it may make."""

    environment: TabularEnvironment
    algorithm: Annotated[Algorithm, Field(discriminator="type")]
    total_steps: int = Field(100_000, ge=1)
    """Steps in the environment; methods that know the process make none."""
    iterations: int = Field(20, ge=1)
    """Lines of metrics over the run; each is evaluated where run.evaluate_every says so."""
    run: RunConfig = RunConfig()


def main(config: TabularConfig) -> dict[str, float]:
    """Solve or learn; evaluate the greedy policy; save the policy and its values."""
    solver = make_solver(config.environment, config.algorithm, total_steps=config.total_steps, seed=config.run.seed)
    iterations = config.iterations if solver.learns else 1
    run = Run(config.run, resolved=config, iterations=iterations, recipe="tabular")
    run.evaluate = solver.evaluate
    run.track(solver=solver)
    try:
        for iteration in run.iterations():
            until = config.total_steps * iteration // iterations
            run.finish_iteration(iteration, None, solver.advance(until))
    except BaseException:
        run.stopped()
        raise
    solver.save(run.directory / "values.npz")
    save_agent(run.directory / "policy", solver)
    return run.finish()


CONFIG = TabularConfig

if __name__ == "__main__":
    launch(__file__)
