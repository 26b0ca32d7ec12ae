"""Atomic directory writes: a save appears as a whole or not at all.

Files are written into `.saving` inside the target folder. Renaming it to `.saved`
commits the save: before that the folder has its old content, afterwards the new files
only have to be moved up. If the process dies while moving them, the next process that
opens the folder continues (`finish_interrupted_save`).
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from keras_t5gemma.distribution import process_group

SAVING, SAVED = ".saving", ".saved"
_MANIFEST = ".manifest.json"
_WEIGHTS = (
    "model*.weights.h5",
    "model.weights.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)


@contextlib.contextmanager
def atomic_folder(
    folder: str | os.PathLike[str], together: bool = False
) -> Iterator[Path]:
    """Yield a staging folder whose files appear in `folder` together, or never.

    Files of other names in `folder` stay; weight files of an earlier checkpoint are
    removed when the new one has weights. With several processes all of them call it,
    with a folder that all of them see; an error in one of them is raised in all.

    Args:
        folder: path; created if it does not exist.
        together: with several processes, keep the files of all of them. Otherwise
            only those of the first are kept.

    Raises:
        OSError: e.g. when the disk is full; then nothing is left behind.
    """
    if process_group.process_count() == 1:
        with _staging(folder) as staging:
            yield staging
        return
    with (
        process_group.all_or_none(f"{folder} was saved"),
        contextlib.ExitStack() as stack,
    ):
        with process_group.all_or_none(f"{folder} was prepared"):
            staging = Path(folder) / SAVING
            if process_group.process_index() == 0:
                staging = stack.enter_context(_staging(folder))
            elif not together:
                staging = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with process_group.all_or_none(f"{folder} was written"):
            yield staging


@contextlib.contextmanager
def atomic_file(path):
    """A path whose file replaces `path` when the block ends without an error.

    Args:
        path: of the file, in a folder that exists.

    Yields:
        `pathlib.Path` to write the new content to.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}{SAVING}")
    try:
        yield staged
        _flush(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _flush(path):
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _staging(folder):
    folder = Path(folder)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    finish_interrupted_save(folder)
    staging = folder / SAVING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        files = [p for p in sorted(staging.rglob("*")) if p.is_file()]
        for file in files:
            _flush(file)
        names = [str(file.relative_to(staging)) for file in files]
        (staging / _MANIFEST).write_text(json.dumps(names), encoding="utf-8")
        os.rename(staging, folder / SAVED)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"{folder} could not be written: {error.strerror}. Nothing was kept; "
                "free disk space and run it again",
            ) from error
        raise
    finish_interrupted_save(folder)


def finish_interrupted_save(folder: str | os.PathLike[str]) -> None:
    """Move the files of a committed save into place, if it was interrupted there."""
    folder = Path(folder)
    saved = folder / SAVED
    manifest = saved / _MANIFEST
    if not manifest.exists():
        return
    names = json.loads(manifest.read_text(encoding="utf-8"))
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # Moved before.
            os.replace(saved / name, target)
    new = set(names)
    weights = {p.name for kind in _WEIGHTS for p in folder.glob(kind)}
    if new & weights:
        for name in weights - new:
            (folder / name).unlink()
    shutil.rmtree(saved)


def has_incomplete_save(folder: str | os.PathLike[str]) -> bool:
    """Whether a save into the folder was interrupted before it was committed."""
    return (Path(folder) / SAVING).is_dir()


def check_overwrite(folder: Path, overwrite: bool) -> None:
    """Raise `ValueError` if the folder is not empty, unless `overwrite`."""
    if folder.is_dir():
        finish_interrupted_save(folder)
        occupied = any(path.name != SAVING for path in folder.iterdir())
    else:
        occupied = folder.exists()
        overwrite = False  # A file is not a checkpoint.
    if occupied and not overwrite:
        raise ValueError(
            f"`folder` {folder} exists already; pass `overwrite` (--overwrite) to "
            "replace the checkpoint in it."
        )


def check_free_space(folder: Path, needed: int) -> None:
    """Raise `OSError` if the disk of a folder has fewer than `needed` free bytes."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB "
            "free. Nothing was written."
        )
