"""A progress bar where somebody looks: on a terminal's standard error."""

import contextlib

import rich.console
import rich.progress


@contextlib.contextmanager
def progress_bar(title, total, is_bytes=False, verbose=True):
    """Show how far a long work is.

    Args:
        title: what is being done.
        total: how much there is to do: bytes, or a number of things.
        is_bytes: show sizes and speed.
        verbose: `False` shows nothing, as does a standard error that is no terminal,
            or work of a single thing.

    Yields:
        A function to call with how much more is done.
    """
    amount = (
        (rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn())
        if is_bytes
        else (rich.progress.MofNCompleteColumn(),)
    )
    columns = (
        "[progress.description]{task.description}",
        rich.progress.BarColumn(),
        *amount,
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(stderr=True)
    shown = verbose and console.is_terminal and total > 1
    with rich.progress.Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)
