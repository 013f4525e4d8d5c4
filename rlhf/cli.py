"""The command line: `rlhf ls`, `rlhf cp`, `rlhf run`, `rlhf table`."""


def main() -> None:
    """Run the command line."""


def launch(file: str) -> None:
    """Run the recipe in `file` with the arguments of this process."""
