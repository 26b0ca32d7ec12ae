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

from keras_t5gemma.checkpoints import saved_files
from keras_t5gemma.checkpoints.folder_lock import LOCK, folder_lock
from keras_t5gemma.checkpoints.saved_files import SAVED as SAVED
from keras_t5gemma.checkpoints.saved_files import SAVING as SAVING
from keras_t5gemma.distribution import process_group
from keras_t5gemma.utils.files import open_regular, read_json_file

_COMMIT = ".manifest.json"  # Of the files in `SAVED`.


@contextlib.contextmanager
def atomic_folder(
    folder: str | os.PathLike[str], together: bool = False, lock: bool = True
) -> Iterator[Path]:
    """Yield a staging folder whose files appear in `folder` together, or never.

    Other files in `folder` stay; weight files that an earlier save has written are
    removed when the new one has weights. With several processes all of them call it,
    with a folder that all of them see; an error in one of them is raised in all.

    Args:
        folder: path; created if it does not exist.
        together: with several processes, keep the files of all of them. Otherwise
            only those of the first are kept.
        lock: refuse other writers meanwhile; `False` if the caller has the lock.

    Raises:
        ValueError: if a file that this package has not written would be replaced.
        FolderInUseError: if another process or thread is writing the folder.
        OSError: e.g. when the disk is full; then nothing is left behind.
    """
    if Path(folder).name == SAVING:  # Part of another save.
        yield Path(folder)
        return
    if process_group.process_count() == 1:
        with _staging(folder, lock) as staging:
            yield staging
        return
    with (
        process_group.all_or_none(f"{folder} was saved"),
        contextlib.ExitStack() as stack,
    ):
        with process_group.all_or_none(f"{folder} was prepared"):
            staging = Path(folder) / SAVING
            if process_group.process_index() == 0:
                staging = stack.enter_context(_staging(folder, lock))
            elif not together:
                staging = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                staging /= SAVING  # The name that all processes see.
                staging.mkdir()
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
    with open_regular(path) as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _staging(folder, lock):
    folder = Path(folder)
    existed = folder.exists()
    staging = folder / SAVING
    try:
        with folder_lock(folder) if lock else contextlib.nullcontext():
            folder.mkdir(parents=True, exist_ok=True)
            finish_interrupted_save(folder)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                yield staging
                _commit(folder, staging)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            finish_interrupted_save(folder)
    except BaseException as error:
        if not existed:
            saved_files.remove_if_empty(folder)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"{folder} could not be written: {error.strerror}. Nothing was kept; "
                "free disk space and run it again",
            ) from error
        raise


def _commit(folder, staging):
    """Decide that the staged files replace earlier ones of ours in the folder."""
    files = [p for p in sorted(staging.rglob("*")) if p.is_file()]
    new = {file.relative_to(staging).as_posix() for file in files}
    saved_files.refuse_foreign(folder, new)
    removed = saved_files.replaced(folder, new)
    text = saved_files.manifest(folder, new, removed)
    (staging / saved_files.MANIFEST).write_text(text, encoding="utf-8")
    names = [*sorted(new), saved_files.MANIFEST]
    text = json.dumps({"files": names, "removed": sorted(removed)})
    (staging / _COMMIT).write_text(text, encoding="utf-8")
    for name in (*names, _COMMIT):
        _flush(staging / name)
    os.rename(staging, folder / SAVED)


def finish_interrupted_save(folder: str | os.PathLike[str]) -> None:
    """Move the files of a committed save into place, if it was interrupted there."""
    folder = Path(folder)
    saved = folder / SAVED
    try:
        commit = read_json_file(saved / _COMMIT)
    except (FileNotFoundError, NotADirectoryError):
        shutil.rmtree(saved, ignore_errors=True)  # Finished but for empty folders.
        return
    is_old = isinstance(commit, list)  # Of a version without `saved_files`.
    names = commit if is_old else commit["files"]
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # Moved before.
            os.replace(saved / name, target)
    new = set(names)
    removed = saved_files.left_behind(folder, new) if is_old else commit["removed"]
    for name in removed:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(saved, ignore_errors=True)  # Another reader may do the same.


def has_incomplete_save(folder: str | os.PathLike[str]) -> bool:
    """Whether a save into the folder was interrupted before it was committed."""
    return (Path(folder) / SAVING).is_dir()


def has_files(folder: Path) -> bool:
    """Whether a folder has files, except those of an interrupted save."""
    if not folder.is_dir():
        return False
    return any(path.name not in (SAVING, LOCK) for path in folder.iterdir())


def check_overwrite(folder: Path, overwrite: bool) -> None:
    """Raise `ValueError` if the folder is not empty, unless `overwrite`."""
    if folder.is_dir():
        finish_interrupted_save(folder)
        occupied = has_files(folder)
    else:
        if folder.exists():
            raise ValueError(f"`folder` {folder} is a file; it must be a folder.")
        occupied = False
    if occupied and not overwrite:
        raise ValueError(
            f"`folder` {folder} exists already; pass `overwrite` to replace the "
            "checkpoint in it."
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
