"""The command line: `rlhf ls`, `cp`, `run`, `eval`, `explain`, `show-batch`, `table`, `version`.

Torch and transformers are imported inside the commands that need them, so that `rlhf --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import print_exc
from typing import Annotated

import typer

from rlhf.errors import UserError

app = typer.Typer(
    help="Fine-tune language models with reinforcement learning, and try the same objectives on CartPole.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line with the arguments of this process."""
    app(prog_name="rlhf")


def launch(file: str) -> None:
    """Run the recipe in `file` with the arguments of this process.

    Recipes end with `if __name__ == "__main__": launch(__file__)`, so that `python recipes/grpo.py --config X a.b=c`
    and `accelerate launch recipes/grpo.py --config X` mean the same as `rlhf run grpo`.
    """
    app(["run", str(Path(file).resolve()), *sys.argv[1:]], prog_name=Path(file).name)


@app.command("ls")
def list_command() -> None:
    """List the recipes and their configs."""
    from rlhf.commands.recipes import config_summary, list_recipes

    with user_errors():
        for recipe in list_recipes():
            typer.echo(f"{recipe.name}: {recipe.summary}")
            width = max((len(name) for name in recipe.configs), default=0)
            for name, file in recipe.configs.items():
                typer.echo(f"  {name:<{width}}  {config_summary(file)}".rstrip())


@app.command("cp")
def copy_command(
    recipe: Annotated[str, typer.Argument(help="A recipe's name.")],
    folder: Annotated[Path, typer.Argument(help="Where to put NAME.py and configs/NAME/*.yaml.")],
) -> None:
    """Copy a recipe and its configs, to edit them."""
    from rlhf.commands.recipes import copy_recipe, find_recipe

    with user_errors():
        files = copy_recipe(find_recipe(recipe), folder)
        typer.echo("\n".join(str(file) for file in files))
        typer.echo(f"Run it with: rlhf run {files[0]}")


@app.command("run")
def run_command(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .py file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, such as update.learning_rate=1e-3.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="A config's name, or the path of a YAML file.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Training processes on this machine.")] = 1,
    seeds: Annotated[str | None, typer.Option(help="Run once per seed, such as 0,1,2, and print a table.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many seeds run at the same time.")] = 1,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of user errors, too.")] = False,
) -> None:
    """Run a recipe."""
    from rlhf.commands import running

    with user_errors(traceback=traceback):
        request = running.Request.make(recipe, config=config, overrides=overrides or [])
        if seeds is not None:
            code = running.run_seeds(request, running.read_seeds(seeds), jobs=jobs, processes=processes)
        elif processes > 1:
            code = running.run_processes(request, processes, traceback=traceback)
        else:
            code = running.run_here(request)
    raise typer.Exit(code)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="A model's folder, or a hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, such as evaluation.greedy=false.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A config of the recipe `evaluate`, such as gsm8k, or a YAML file.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine that share the prompts.")] = 1,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of user errors, too.")] = False,
) -> None:
    """Evaluate a model: `rlhf run evaluate` with the model's place, and a run directory of its own for each model."""
    from rlhf.commands import evaluating, running

    with user_errors(traceback=traceback):
        request = evaluating.make_request(model, config=config, overrides=overrides or [])
        if processes > 1:
            code = running.run_processes(request, processes, traceback=traceback)
        else:
            code = running.run_here(request)
    raise typer.Exit(code)


@app.command("explain")
def explain_command(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .py file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, such as algorithm=grpo.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="A config's name, or the path of a YAML file.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Training processes that share the batches.")] = 1,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="They share weights, gradients and optimizer states too (FSDP2).")
    ] = False,
) -> None:
    """Print what a run would do, take and use: batches, memory, and every setting as a YAML file to start from."""
    from rlhf.commands import running
    from rlhf.commands.explaining import explain_config, explain_plan

    with user_errors():
        _, resolved = running.Request.make(recipe, config=config, overrides=overrides or []).load()
        typer.echo(explain_plan(resolved, processes=processes, sharded=sharded) + explain_config(resolved), nl=False)


@app.command("show-batch")
def show_batch_command(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .py file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, such as training.packing=true.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="A config's name, or the path of a YAML file.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to print.")] = 4,
) -> None:
    """Print the first batch of a recipe token by token: what is learned in colour, special tokens spelled out."""
    from rlhf.commands import running
    from rlhf.commands.showing import show_batch

    with user_errors():
        _, resolved = running.Request.make(recipe, config=config, overrides=overrides or []).load()
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for line in show_batch(resolved, rows=rows, colour=colour):
            typer.echo(line)


@app.command("table")
def table_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN_DIR...", help="Folders of runs, searched to any depth.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TITLE=]NAME[@ITERATION][@each]",
            help="A column: a metric at the end or at an iteration, its mean or each seed's value; may be repeated.",
        ),
    ] = None,
    row: Annotated[
        str | None, typer.Option(help="What names a row: a setting's path, config, folder, or seed (a row per run).")
    ] = None,
    update: Annotated[
        Path | None, typer.Option(help="Write the tables of this markdown file anew, each from its own command.")
    ] = None,
) -> None:
    """Print a table of finished runs in markdown: mean and standard deviation over the seeds of each config."""
    from rlhf.commands.table_blocks import update_tables
    from rlhf.commands.tables import make_table

    with user_errors():
        if update is not None:
            typer.echo("\n".join(update_tables(update)))
        if folders or update is None:
            typer.echo(make_table(folders or [Path("runs")], metrics=metric, row=row))


@app.command("version")
def version_command() -> None:
    """Print the version."""
    from rlhf import __version__

    typer.echo(f"rlhf-toolkit {__version__}")


@contextmanager
def user_errors(*, traceback: bool = False) -> Iterator[None]:
    """End the process with one sentence where the user can mend something: exit code 2, or 130 when interrupted.

    Args:
        traceback: Print the traceback of user errors, too.
    """
    try:
        yield
    except UserError as error:
        if traceback:
            print_exc()
        typer.echo(f"{_process_name()}error: {error}", err=True)
        raise typer.Exit(EXIT_USER_ERROR) from error
    except KeyboardInterrupt as error:
        typer.echo(f"{_process_name()}interrupted; the checkpoints written so far are kept.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def _process_name() -> str:
    """Say which of several training processes speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f"[process {os.environ.get('RANK', '?')}] "


if __name__ == "__main__":
    main()
