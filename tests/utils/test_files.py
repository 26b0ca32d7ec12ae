"""Files are read through `utils.files`, which refuses FIFOs, devices and folders."""

import ast
import os
import signal
from pathlib import Path

import keras
import pytest

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import h5_file
from keras_t5gemma.checkpoints.atomic import atomic_folder, finish_interrupted_save
from keras_t5gemma.checkpoints.folder_lock import LOCK, FolderInUseError
from keras_t5gemma.cli import commands, main
from keras_t5gemma.cli.options import Generate
from keras_t5gemma.evaluation.harness import Runs
from keras_t5gemma.modeling import lora
from keras_t5gemma.recipes.run_directory import describe
from keras_t5gemma.utils import files

pytestmark = pytest.mark.one_backend
PACKAGE = Path(kt.__file__).parent
METHODS = {
    *("open", "read_text", "read_bytes", "File", "memmap", "fromfile", "loadtxt"),
    *("genfromtxt", "safe_open", "read_csv", "read_parquet"),
}
# Calls that open no file of a user's choice, or check it first.
ALLOWED = {
    ("utils/files.py", "open_regular"),
    ("utils/files.py", "_opener"),
    ("utils/options.py", "_class_bodies"),  # Source code of the package.
    ("cli/main.py", "main"),  # The null device.
    ("checkpoints/folder_lock.py", "_create"),  # Written, never waits.
    ("checkpoints/folder_lock.py", "_one_at_a_time"),  # A folder.
    ("checkpoints/h5_file.py", "open_file"),  # After `check_regular`.
    ("training/teacher_scores.py", "_map"),  # After `check_regular`.
}


def opening_calls(tree):
    """`(function, line)` of calls that open files for reading."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        if called not in ("open", "np.load", "json.load") and (
            not owner or name not in METHODS
        ):
            continue
        modes = [a for a in node.args[1:] if isinstance(a, ast.Constant)]
        if modes and str(modes[0].value)[0] in "wax":
            continue
        around = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
        yield max((f.lineno, f.name) for f in around)[1], node.lineno


def test_files_are_opened_in_one_place():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for function, line in opening_calls(ast.parse(path.read_text("utf-8"))):
            found[name, function] = f"{name}:{line}"
    unexpected = [place for key, place in found.items() if key not in ALLOWED]
    assert not unexpected, "use keras_t5gemma.utils.files"
    assert not ALLOWED - set(found)


READERS = {
    "teacher.json": lambda path: kt.TeacherScores(path.parent),
    "log.csv": lambda path: kt.plot_history(path),
    "a.lora.h5": lambda path: lora.load(keras.layers.Layer(), path),
    "state.h5": lambda path: h5_file.open_file(path).__enter__(),
    "samples.jsonl": lambda path: describe({}, {"train": (path, 1)}),
    "ids.npy": lambda path: files.sha256(path),
    "results.json": lambda path: Runs(path.parent, {}),
    "run.yaml": lambda path: main.parse(["finetune", "--config", str(path)]),
    "in.txt": lambda path: commands.read_texts(Generate("preset", file=path)),
    "vocabulary.spm": lambda path: kt.Tokenizer(path),
    ".saved/.manifest.json": lambda path: finish_interrupted_save(path.parent.parent),
}


@pytest.fixture
def at_once():
    """What waits for a FIFO fails instead of hanging."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_other_kinds_of_files(tmp_path, at_once, name, kind):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(
        (ValueError, main.UsageError),
        match=f"{path.name}.*{kind}|{path.name} that was not",
    ):
        READERS[name](path)


@pytest.mark.parametrize("name", [LOCK, "config.json"])
def test_writers_refuse_other_kinds_of_files(tmp_path, at_once, name):
    os.mkfifo(tmp_path / name)
    error = FolderInUseError if name == LOCK else ValueError
    with pytest.raises(error, match=name):
        with atomic_folder(tmp_path) as staging:
            (staging / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_text_files_have_a_bound_and_an_encoding(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert files.read_text(path, "utf-8-sig") == "a\nb"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a.txt is not text in UTF-8"):
        files.read_text(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    path.write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="a.txt has 11 bytes; .* at most 10"):
        files.read_text(path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
def test_files_whose_size_is_not_known_are_read_whole():
    assert files.read_text("/proc/self/stat").split()[0] == str(os.getpid())
