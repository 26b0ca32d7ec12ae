"""What comes before and beside writing a large folder: room, and a progress bar."""

import contextlib
import shutil

import rich.console
import rich.progress

from keras_t5gemma.checkpoints.atomic import SAVING, finish


def check_is_new(folder, overwrite):
    """Raise `ValueError` when the folder holds something, unless `overwrite`."""
    if folder.is_dir():
        finish(folder)
        occupied = any(path.name != SAVING for path in folder.iterdir())
    else:
        occupied = folder.exists()
        overwrite = False  # A file is no checkpoint.
    if occupied and not overwrite:
        raise ValueError(
            f"`folder` {folder} exists already; pass `overwrite` (--overwrite) to "
            "replace the checkpoint in it."
        )


def check_room(folder, needed):
    """Raise `OSError` when the disk lacks the bytes that are needed."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB "
            "free. Nothing was written."
        )


@contextlib.contextmanager
def progress_bar(total, verbose=True):
    """A bar on a terminal's standard error.

    Args:
        total: bytes.
        verbose: `False` shows nothing.

    Yields:
        A function to call with the bytes of each tensor that is done.
    """
    columns = (
        "[progress.description]{task.description}",
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(stderr=True)
    shown = verbose and console.is_terminal
    with rich.progress.Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("Writing", total=total)
        yield lambda size: bar.advance(task, size)
