"""Two writers of one folder: the second is told who the first is."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time

import pytest

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import folder_lock as module
from keras_t5gemma.checkpoints.atomic import atomic_folder
from keras_t5gemma.checkpoints.folder_lock import LOCK, FolderInUseError, folder_lock
from keras_t5gemma.recipes.run_directory import RunDirectory

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@contextlib.contextmanager
def another_process(folder):
    """A forked process that holds the lock; yields its id."""
    ready, done = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), folder_lock(folder):
            os.write(done, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        os.close(ready)
        os.close(done)


def write_lock(folder, **changes):
    owner = {**module._this_owner(), **changes}
    (folder / LOCK).write_text(json.dumps(owner))
    return owner


def test_a_second_process_is_refused_and_a_dead_one_replaced(
    model, tmp_path, tmp_path_factory
):
    data = tmp_path_factory.mktemp("data")
    (data / "own").mkdir()
    rows = "".join(json.dumps({"text": "a", "label": x}) + "\n" for x in "xy")
    for split in ("train", "valid", "test"):
        (data / "own" / f"{split}.jsonl").write_text(rows)
    model.compile("sgd")
    host = socket.gethostname()
    with another_process(tmp_path) as child:
        message = f"{tmp_path} is being written by process {child} on host {host} since"
        with pytest.raises(FolderInUseError, match=message):
            model.backbone.save_to_preset(tmp_path)
        with pytest.raises(FolderInUseError, match=message):
            backup = kt.callbacks.BackupAndRestore(tmp_path)
            model.fit(["a"], ["b"], batch_size=1, verbose=0, callbacks=[backup])
        with (
            pytest.raises(FolderInUseError, match=message),
            RunDirectory(tmp_path).locked(),
        ):
            pass
        with pytest.raises(FolderInUseError, match=message):
            kt.evaluate_encoders(tasks=["own"], tfidf=True, data=data, output=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        os.kill(child, signal.SIGKILL)
        end = time.monotonic() + 30
        while module._start_of(child) is not None:  # Until it is a zombie.
            assert time.monotonic() < end
            time.sleep(0.001)
        model.backbone.save_to_preset(tmp_path)
    assert not (tmp_path / LOCK).exists()
    kt.Backbone.from_preset(tmp_path)


def test_threads_of_one_process(tmp_path):
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with atomic_folder(tmp_path) as staging:
            (staging / "a.txt").write_text("first")
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    try:
        with pytest.raises(FolderInUseError, match="by another thread of this process"):
            with atomic_folder(tmp_path):
                pass
    finally:
        leave.set()
        thread.join()
    assert (tmp_path / "a.txt").read_text() == "first"
    with atomic_folder(tmp_path) as staging:
        (staging / "a.txt").write_text("second")
    assert (tmp_path / "a.txt").read_text() == "second"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_released_after_an_error(tmp_path, error):
    folder = tmp_path / "new"
    with pytest.raises(error), folder_lock(folder):
        assert (folder / LOCK).exists()
        raise error
    assert not folder.exists()


def test_other_hosts_are_never_taken_over(tmp_path):
    owner = write_lock(tmp_path, host="elsewhere", pid=2**30)
    message = f"process {2**30} on host elsewhere.*If that process has ended, remove"
    with pytest.raises(FolderInUseError, match=message):
        with folder_lock(tmp_path):
            pass
    assert json.loads((tmp_path / LOCK).read_text()) == owner


def test_numbers_that_are_used_again(tmp_path):
    """A later process, or thread, with the number of the owner is not the owner."""
    if sys.platform == "linux":
        assert int(module._start_of(os.getpid())) > 0
    for changes in (
        {"process started": "1"},  # As in a container that has started again.
        {"pid": 1, "process started": "another"},
        {"thread": 1},
        {"pid": 2**30},
    ):
        write_lock(tmp_path, **changes)
        with folder_lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK).exists()


def test_a_lock_that_was_not_finished(tmp_path, monkeypatch):
    """Its process died while it wrote it: it is replaced after a moment."""
    monkeypatch.setattr(module, "_UNFINISHED", 0.3)
    path = tmp_path / LOCK
    path.write_text("")
    start = time.monotonic()
    with folder_lock(tmp_path):
        assert 0.2 < time.monotonic() - start < 5
    path.write_text("")  # One that is finished in time is another's.
    owner = json.dumps({**module._this_owner(), "host": "elsewhere"})
    timer = threading.Timer(0.1, path.write_text, (owner,))
    timer.start()
    with pytest.raises(FolderInUseError, match="on host elsewhere"):
        module.acquire(tmp_path)
    timer.join()
    path.write_text("")
    os.utime(path, (2**32, 2**32))  # A clock that is wrong.
    with pytest.raises(FolderInUseError, match=f"If there is none, remove {path}"):
        with folder_lock(tmp_path):
            pass
    os.utime(path, (0, 0))
    with folder_lock(tmp_path):
        pass


def test_a_forked_process_does_not_release(tmp_path):
    lock = module.acquire(tmp_path)
    child = os.fork()
    if not child:
        module.release(lock)
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    module.release(lock)
    assert not (tmp_path / LOCK).exists()


def test_one_of_many_takes_a_stale_lock(tmp_path):
    write_lock(tmp_path, pid=2**30)
    barrier, taken, refused = threading.Barrier(8), [], []

    def take():
        barrier.wait()
        try:
            taken.append(module.acquire(tmp_path))
        except FolderInUseError:
            refused.append(1)
        barrier.wait()  # All threads live until all have tried.

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)


def test_a_lock_that_cannot_be_read_is_in_use(tmp_path, monkeypatch):
    """Of another user, whose umask hides the owner; it was taken over."""
    path = tmp_path / LOCK
    path.write_text(json.dumps(module._this_owner()))
    os.utime(path, (0, 0))
    may = os.access

    def access(file, mode):
        return may(file, mode) and not (mode == os.R_OK and str(file) == str(path))

    monkeypatch.setattr(os, "access", access)  # Root may read everything.
    monkeypatch.setattr(module, "_read", lambda path: None)
    with pytest.raises(FolderInUseError, match=f"If there is none, remove {path}"):
        module.acquire(tmp_path)
    assert path.exists()


def test_waiting_is_not_done_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_UNFINISHED", 0.5)
    path = tmp_path / LOCK
    path.write_text("")
    os.utime(path, (2**32, 2**32))
    waiting, start = [], time.monotonic()

    def wait():
        with pytest.raises(FolderInUseError):
            module.acquire(tmp_path)
        waiting.append(time.monotonic() - start)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waiting) == 4 and max(waiting) - min(waiting) < 0.9
