"""One writer of a folder at a time: a lock file that names its owner."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_t5gemma.utils.files import read_json_file, read_text

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_UNFINISHED = 5.0  # Seconds after which an unreadable lock file is a dead writer's.


class FolderInUseError(OSError):
    """Another process or thread is writing the folder."""


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only writer of a folder within the `with` block.

    The lock of a process of this host that has ended is taken over.

    Args:
        folder: path; it is created if it does not exist, and removed at the end if it
            is empty then.

    Raises:
        FolderInUseError: if another process, or another thread, holds the lock.
    """
    folder = Path(folder)
    existed = folder.exists()
    lock = acquire(folder)
    try:
        yield
    finally:
        release(lock)
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()


def acquire(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write the lock file of a folder, which is created if needed.

    Returns:
        The lock, for `release`.

    Raises:
        FolderInUseError: see `folder_lock`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.absolute() / LOCK  # The working directory may change.
    owner = _this_owner()
    if not _create(path, owner):
        _await_writer(path)
        with _one_at_a_time(folder):
            found = _read(path)
            if not _is_stale(path, found):
                raise _in_use(path, found)
            path.unlink(missing_ok=True)
            if not _create(path, owner):
                raise _in_use(path, _read(path))
    return path, owner


def release(lock: tuple[Path, dict[str, Any]]) -> None:
    """Remove a lock file, unless it is another owner's or this is a forked process."""
    path, owner = lock
    if owner["pid"] == os.getpid() and _read(path) == owner:
        path.unlink(missing_ok=True)


def _this_owner():
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process started": _start_of(os.getpid()),
        "thread": threading.get_ident(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _create(path, owner):
    """Write the lock file; whether there was none."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(owner))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path):
    """Owner recorded in the lock file; `None` if it is missing or incomplete."""
    try:
        owner = read_json_file(path)
    except (OSError, ValueError):
        return None
    is_owner = isinstance(owner, dict) and isinstance(owner.get("pid"), int)
    return owner if is_owner else None


def _await_writer(path):
    """Wait while another process is writing the lock file."""
    end = time.monotonic() + 2 * _UNFINISHED
    while _is_unfinished(path) and time.monotonic() < end:
        time.sleep(0.05)


def _is_unfinished(path):
    """Whether the file can be read, holds no owner yet, and is new."""
    if _read(path) is not None or not path.is_file() or not _is_readable(path):
        return False
    return not _is_stale(path, None)


def _is_readable(path):
    """Whether this user may read a file; a missing one counts as such."""
    return os.access(path, os.R_OK) or not os.access(path, os.F_OK)


def _is_stale(path, owner):
    if owner is None:  # Removed by now, or its process is writing it, or died then.
        if not _is_readable(path):  # Another user's, who may still be writing.
            return False
        try:
            return time.time() - path.stat().st_mtime > _UNFINISHED
        except OSError:
            return True
    if owner.get("host") != socket.gethostname():
        return False
    started, noted = _start_of(owner["pid"]), owner.get("process started")
    if started is None or (started and noted and started != noted):
        return True
    if owner["pid"] != os.getpid():
        return False
    others = {thread.ident for thread in threading.enumerate()}
    # The same thread still holds the lock: its earlier save was interrupted.
    return owner.get("thread") not in others - {threading.get_ident()}


def _start_of(pid):
    """Start time of a process, to detect a reused process id.

    Returns:
        Text; empty where the system does not report it; `None` if it has ended.
    """
    if os.name != "nt":  # On Windows signal 0 would terminate the process.
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass  # Of another user.
    try:
        fields = read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, ValueError, IndexError):
        return ""


@contextlib.contextmanager
def _one_at_a_time(folder):
    """Serialize the takeover of a stale lock among processes of this host."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network file systems have none.
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _in_use(path, owner):
    if owner is None:
        return FolderInUseError(
            f"{path.parent} is being written by another process. If there is none, "
            f"remove {path}."
        )
    text = (
        f"{path.parent} is being written by process {owner['pid']} on host "
        f"{owner.get('host')} since {owner.get('since')}. Wait for it, or choose "
        "another folder."
    )
    if owner.get("host") != socket.gethostname():
        text += f" If that process has ended, remove {path}."
    elif owner["pid"] == os.getpid():
        text = text.replace(f"process {owner['pid']}", "another thread of this process")
    return FolderInUseError(text)
