"""Exact names of published checkpoints, also as folders and in the hubs' caches."""

import os
from collections.abc import Iterable
from pathlib import Path


def is_published(preset: str | os.PathLike[str], published: Iterable[str]) -> bool:
    """Whether a name, folder or handle is exactly a published one.

    Args:
        preset: a name; a handle, in any version; a folder of the name itself, e.g.
            `t5gemma-b-b-prefixlm-it`; or a folder of the cache of a hub's client, e.g.
            `models--google--t5gemma-b-b-prefixlm-it/snapshots/<hash>`.
        published: published names and handles.
    """
    given = os.fspath(preset).rstrip("/")
    known = {_without_version(name) for name in published}
    if "://" in given:
        return _without_version(given) in known
    if given in known:
        return True
    handles = [name.partition("://")[2] for name in known if "://" in name]
    path = Path(os.path.abspath(given))
    if path.parent.name == "snapshots":
        return path.parents[1].name in {
            "models--" + handle.replace("/", "--") for handle in handles
        }
    own_names = {name.rpartition("/")[2] for name in known}
    if path.name in own_names:
        return True
    is_version = path.name.isdigit()
    return is_version and any(str(path.parent).endswith("/" + h) for h in handles)


def _without_version(handle):
    """A handle without the version number that ends those of Kaggle."""
    stem, _, last = handle.rpartition("/")
    return stem if "://" in stem and last.isdigit() else handle
