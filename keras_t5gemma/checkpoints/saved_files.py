"""Which files of a folder this package has written.

Only these are replaced or removed by a later save. Every save notes its files in
`MANIFEST`, with the files themselves. Folders of earlier versions have no manifest:
there, JSON files are recognized by their contents, and weight files by the index.
"""

import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Set
from pathlib import Path

from keras_t5gemma.utils.files import read_json_file

MANIFEST = ".saved_files.json"
SAVING, SAVED = ".saving", ".saved"  # Of a save in progress; see `atomic`.
# Kinds of weight files of which a new save removes all earlier files.
_WEIGHTS = (
    "model*.weights.h5",
    "model.weights.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "state*.h5",
)
# Of a task: the save of a model removes those that it does not write.
_OF_TASKS = ("task.json", "task.weights.h5", "generation_config.json")
# Files that only one of the formats has, or means something else by.
_KERAS = (
    *("preprocessor.json", "tokenizer.json", "assets/tokenizer/vocabulary.spm"),
    *("checksums.json", "metadata.json", "task.json", "task.weights.h5"),
)
_HUGGING_FACE = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_INDICES = ("model.weights.json", "model.safetensors.index.json")
_OURS: dict[str, str | None] = {"registered_name": "keras_t5gemma>"}
# Keys of our JSON files; where the value is a string, its beginning.
_MARKS: dict[str, tuple[dict[str, str | None], ...]] = {
    "config.json": (_OURS, {"model_type": "t5gemma"}, {"model_type": "t5_gemma"}),
    "task.json": (_OURS,),
    "preprocessor.json": (_OURS,),
    "tokenizer.json": (_OURS,),
    "metadata.json": ({"keras_version": None, "keras_hub_version": None},),
    "checksums.json": ({"algorithm": None, "tensors": None},),
    "generation_config.json": ({"eos_token_id": None},),
    "tokenizer_config.json": ({"tokenizer_class": None},),
    "best.json": ({"monitor": None, "mode": None, "value": None}, {"mean_of": None}),
    "progress.json": ({"epoch": None, "batch": None, "data": None, "files": None},),
    "teacher.json": ({"texts": None, "sha256": None},),
}
# Files without a mark, and the file that proves them.
_COMPANIONS = {
    "assets/tokenizer/vocabulary.spm": "tokenizer.json",
    "task.weights.h5": "task.json",
    "tokenizer.model": "tokenizer_config.json",
    "adapters.lora.h5": "best.json",
}


def find(folder: str | os.PathLike[str]) -> set[str]:
    """Relative paths of the files that this package has written into a folder."""
    folder = Path(folder)
    noted = _noted(folder)
    names = {name for name in _MARKS if is_marked(folder / name)}
    names |= {name for name, proof in _COMPANIONS.items() if proof in names}
    if noted is not None:
        return names | noted
    if "config.json" in names:
        names |= _weights_without_manifest(folder)
    if "progress.json" in names:
        names |= _plain(_read(folder / "progress.json")["files"])
    if "teacher.json" in names:
        names |= _plain(_read(folder / "teacher.json")["sha256"])
    return names


def is_marked(path: Path) -> bool:
    """Whether a JSON file has the keys that this package writes into such files."""
    value = _read(path)
    return any(
        all(
            key in value and (start is None or str(value[key]).startswith(start))
            for key, start in keys.items()
        )
        for keys in _MARKS[path.name]
    )


def refuse_foreign(folder: Path, new: Iterable[str]) -> None:
    """Raise `ValueError` if new files would replace some that we have not written."""
    there = [name for name in new if os.path.lexists(folder / name)]
    if foreign := sorted(set(there) - find(folder) - {MANIFEST}):
        raise ValueError(
            f"{folder} has {', '.join(foreign)}, not written by keras_t5gemma, which "
            "would be replaced. Move what you need, or choose another folder; nothing "
            "was changed."
        )


def replaced(folder: Path, new: Set[str]) -> set[str]:
    """Files of an earlier save that do not belong to a save of the files `new`."""
    if not _weights(new) or not folder.is_dir():
        return set()
    found = find(folder)
    of_task = found.intersection(_OF_TASKS if "config.json" in new else ())
    return (_weights(found) | of_task | _of_other_format(found, new)) - new


def _of_other_format(found, new):
    """Files of an earlier save in another format than that of `new`."""
    if any(name.endswith(".safetensors") for name in new):
        is_keras = found & {"preprocessor.json", "checksums.json"}
        return found.intersection(_KERAS if is_keras else ())
    is_hugging_face = "tokenizer_config.json" in found
    return found.intersection(_HUGGING_FACE if is_hugging_face else ())


def manifest(folder: Path, new: Set[str], removed: Set[str]) -> str:
    """Content of the manifest after a save of `new` into a folder."""
    kept = {name for name in _noted(folder) or () if (folder / name).exists()}
    return json.dumps({"files": sorted((kept - removed) | new)}, indent=1) + "\n"


def left_behind(folder: Path, new: Set[str]) -> set[str]:
    """Index and shards of an earlier save, once the files of `new` have moved up.

    For a save that a version without manifests has begun.
    """
    stale = [index for index in _INDICES if index not in new]
    found = {name for index in stale for name in _indexed(folder, index)}
    return found - new if _weights(new) else set()


def remove(folder: str | os.PathLike[str], also: Iterable[str] = ()) -> None:
    """Remove the files of our saves; then the folder, if nothing else is in it.

    Args:
        folder: path; it need not exist.
        also: names of more files that the caller has written there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    names = find(folder)
    known = names | set(_COMPANIONS)
    parents = {parent for name in known for parent in Path(name).parents}
    # The manifest goes last: an interruption before leaves all others known.
    for name in [*sorted(names | set(also)), MANIFEST]:
        (folder / name).unlink(missing_ok=True)
    for parent in sorted(parents - {Path()}, key=lambda p: -len(p.parts)):
        remove_if_empty(folder / parent)
    for staging in (SAVING, SAVED):
        shutil.rmtree(folder / staging, ignore_errors=True)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder unless it has files."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _noted(folder):
    value = _read(folder / MANIFEST)
    return _plain(value["files"]) if "files" in value else None


def _weights(names):
    return {n for n in names if any(fnmatch.fnmatchcase(n, kind) for kind in _WEIGHTS)}


def _weights_without_manifest(folder):
    """Weight files of a checkpoint, in the format given by its config.json."""
    is_keras = "registered_name" in _read(folder / "config.json")
    single = "model.weights.h5" if is_keras else "model.safetensors"
    index = _INDICES[0 if is_keras else 1]
    return _indexed(folder, index) or {single} & set(os.listdir(folder))


def _indexed(folder, index):
    """An index file and the shards it names; empty without one."""
    shards = _read(folder / index).get("weight_map")
    if not isinstance(shards, dict):
        return set()
    files = [f for v in shards.values() for f in (v if isinstance(v, list) else [v])]
    return {index} | {name for name in _plain(files) if (folder / name).is_file()}


def _plain(names):
    """The names that stay inside the folder."""
    names = names if isinstance(names, list | dict) else ()
    found = {name for name in names if isinstance(name, str) and name}
    return {n for n in found if not Path(n).is_absolute() and ".." not in Path(n).parts}


def _read(path):
    """A JSON object; empty for anything else."""
    try:
        if not path.is_file():
            return {}
        value = read_json_file(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
