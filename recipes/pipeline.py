"""Run recipes one after another, each starting from what an earlier one left; one table and one figure at the end."""

from __future__ import annotations

from pydantic import Field

from rlhf.cli import launch
from rlhf.commands.stage_report import Panel, draw_panels, print_table, report_table, sample_pages
from rlhf.commands.stages import Stage, run_stage
from rlhf.config import Config
from rlhf.markdown import markdown_table
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class PipelineConfig(Config):
    """Stages in order, and what is shown of them."""

    stages: list[Stage] = Field(min_length=1)
    columns: dict[str, list[str]]
    """Column of the final table -> metrics; the first that a stage reports is shown. `stage:metric` is of one stage."""
    panels: list[Panel] = []
    """Panels of the figure, side by side."""
    run: RunConfig = RunConfig()


def main(config: PipelineConfig) -> dict[str, float]:
    """Run every stage; write `table.md`, `curves.png` and `samples.md` to the run directory."""
    run = Run(config.run, resolved=config, iterations=len(config.stages), recipe="pipeline")
    results = []
    for number, stage in enumerate(config.stages, start=1):
        run.say(f"\nstage {number} of {len(config.stages)}: {stage.title}")
        results.append(run_stage(stage, run.directory, config.run))
    rows = report_table(results, config.columns)
    print_table(rows)
    (run.directory / "table.md").write_text(markdown_table(rows[0], rows[1:]) + "\n", encoding="utf-8")
    (run.directory / "samples.md").write_text(sample_pages(results), encoding="utf-8")
    if config.panels:
        draw_panels(results, config.panels, run.directory / "curves.png")
    run.say(f"table.md, samples.md and curves.png are in {run.directory}; the models in its folders")
    return run.finish(
        **{f"{result.stage.name}/{name}": value for result in results for name, value in result.metrics.items()},
        **{f"{result.stage.name}/seconds": result.seconds for result in results},
    )


CONFIG = PipelineConfig

if __name__ == "__main__":
    launch(__file__)
