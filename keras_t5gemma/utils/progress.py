"""Progress bar on the standard error of a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


def to_terminal() -> bool:
    """Whether standard output is a terminal; a closed one is `None`."""
    return sys.stdout is not None and sys.stdout.isatty()


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, is_bytes: bool = False, verbose: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show the progress of a long operation.

    Args:
        title: description of the operation.
        total: amount of work: bytes, or a number of items.
        is_bytes: show sizes and speed.
        verbose: `False` shows nothing. Nothing is shown either if standard error is
            not a terminal, or for a single item.

    Yields:
        A function to call with the amount of work done since the last call.
    """
    if not verbose:
        yield lambda amount: None
        return
    amount: tuple[rich.progress.ProgressColumn, ...] = (
        (rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn())
        if is_bytes
        else (rich.progress.MofNCompleteColumn(),)
    )
    columns: tuple[str | rich.progress.ProgressColumn, ...] = (
        "[progress.description]{task.description}",
        rich.progress.BarColumn(),
        *amount,
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(stderr=True)
    shown = console.is_terminal and total > 1
    with rich.progress.Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)
