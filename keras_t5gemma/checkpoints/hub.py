"""Files of `hf://` and `kaggle://` handles, through the hubs' own libraries."""

import os
import socket
import urllib.request
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

_PATTERNS = ["*.json", "*.safetensors", "*.h5", "assets/*", "tokenizer.model"]


def get_file(location: str, name: str) -> str:
    """The local path of one file of a folder or handle, downloaded if need be.

    Args:
        location: a local folder, `hf://owner/name` or
            `kaggle://owner/model/keras/variation`.
        name: path of the file in it, with slashes.

    Raises:
        FileNotFoundError: when the folder or the model on the hub has no such file.
        ValueError: for another scheme.
        Exception: what the hub's library raises, when the hub cannot be reached or
            refuses.
    """
    scheme, handle = split(location)
    if scheme == "hf":
        return _hugging_face_file(handle, name)
    if scheme == "kaggle":
        return _kaggle_file(handle, name)
    path = os.path.join(location, name)
    if not os.path.exists(path):
        raise FileNotFoundError(_missing(location, name))
    return path


def get_folder(location: str) -> Path:
    """The local folder of a location with all its files, downloaded if need be.

    Raises:
        ValueError: for another scheme than those of `get_file`.
        Exception: what the hub's library raises.
    """
    scheme, handle = split(location)
    if scheme == "hf":
        import huggingface_hub

        repository, subfolder, revision = split_hugging_face(handle)
        patterns = [f"{subfolder}/{kind}" if subfolder else kind for kind in _PATTERNS]
        folder = huggingface_hub.snapshot_download(
            repository,
            allow_patterns=patterns,
            local_files_only=_is_offline(),
            **revision,
        )
        return Path(folder) / subfolder
    if scheme == "kaggle":
        import kagglehub

        return Path(kagglehub.model_download(handle))
    return Path(location)


def split(location: str) -> tuple[str | None, str]:
    """`("hf", "owner/name")` of a handle, `(None, location)` of a folder.

    Raises:
        ValueError: for another scheme than hf:// and kaggle://.
    """
    scheme, separator, handle = location.partition("://")
    if not separator:
        return None, location
    if scheme not in ("hf", "kaggle"):
        raise ValueError(f"{location!r} must start with hf:// or kaggle://.")
    if scheme == "hf":
        split_hugging_face(handle)
    return scheme, handle


def split_hugging_face(handle: str) -> tuple[str, str, dict[str, Any]]:
    """Repository, subfolder and revision of `owner/name@revision/sub/folder`.

    Returns:
        `("owner/name", "sub/folder", {"revision": "..."})`; `""` and `{}` where a
        part is missing.

    Raises:
        ValueError: for a subfolder that leaves the repository.
    """
    owner, _, rest = handle.strip("/").partition("/")
    name, _, subfolder = rest.partition("/")
    name, _, revision = name.partition("@")
    return (
        f"{owner}/{name}" if name else owner,
        check_subfolder(subfolder) if subfolder else "",
        {"revision": revision} if revision else {},
    )


def check_subfolder(subfolder: str) -> str:
    """A relative path that stays below its folder; else `ValueError`."""
    if not isinstance(subfolder, str) or not subfolder:
        raise ValueError(f"`subfolder` must be a relative path; got {subfolder!r}.")
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts or "\\" in subfolder:
        raise ValueError(
            f"`subfolder` must stay inside the folder or repository; got {subfolder!r}."
        )
    return path.as_posix()


def _hugging_face_file(handle, name):
    import huggingface_hub
    from huggingface_hub import errors

    repository, subfolder, revision = split_hugging_face(handle)
    path = f"{subfolder}/{name}" if subfolder else name
    try:
        return huggingface_hub.hf_hub_download(
            repository, path, local_files_only=_is_offline(), **revision
        )
    except errors.LocalEntryNotFoundError as error:
        # The hub was not reached. It is a FileNotFoundError too, which here would
        # say that the model has no such file: the cache knows that of some files.
        if huggingface_hub.try_to_load_from_cache(repository, path, **revision):
            raise FileNotFoundError(_missing(f"hf://{handle}", name)) from error
        raise ConnectionError(
            f"{name} is not in the local cache and the hub was not reached: {error}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(_missing(f"hf://{handle}", name)) from error


def _is_offline():
    """Whether the hub's name has no address: the library would try for 23 seconds."""
    from huggingface_hub import constants

    if urllib.request.getproxies():  # The proxy knows the address.
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(endpoint.hostname, endpoint.port or 443)
    except socket.gaierror:
        return True
    return False


def _kaggle_file(handle, name):
    import kagglehub
    from kagglehub.exceptions import KaggleApiHTTPError

    try:
        return kagglehub.model_download(handle, path=name)
    except KaggleApiHTTPError as error:
        if error.response is None or error.response.status_code != 404:
            raise
        raise FileNotFoundError(_missing(f"kaggle://{handle}", name)) from error
    except ValueError as error:
        # Kaggle's library says so of a model of one archive.
        if "is not present in the model files" not in str(error):
            raise
        raise FileNotFoundError(_missing(f"kaggle://{handle}", name)) from error


def _missing(location, name):
    return f"{name} is not in {location}."
