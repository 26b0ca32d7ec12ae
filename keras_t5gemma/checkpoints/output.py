"""What comes before writing a large folder: is it new, is there room."""

import shutil

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
