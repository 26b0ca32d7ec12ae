"""Process group: several processes that train one model.

`jax.distributed` aborts the processes if one of them is missing at the start.
Therefore they first meet over a plain socket: the first process waits for the others,
compares their settings, and tells all of them to continue or what is wrong. Later, JAX
ends a process whose peer has died after `heartbeat` seconds.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_t5gemma import _compat
from keras_t5gemma.utils.checks import instance, number, shown, whole_number

_LARGEST_MESSAGE = 2**20


def connect(
    address: str,
    processes: int,
    index: int,
    timeout: float = 300,
    heartbeat: int = 100,
    same: dict[str, Any] | None = None,
) -> None:
    """Join the other processes of a training, on the JAX backend.

    Every process calls it, before anything is computed. All of them get the random
    seed of the first one.

    Args:
        address: `"host:port"` of the first process, reachable from all of them.
        processes: number of processes.
        index: number of this process, from 0.
        timeout: seconds to wait for the others.
        heartbeat: seconds after which JAX ends a process whose peer has died.
        same: values that must be equal in all processes, e.g. a configuration:
            numbers, strings, lists and dicts. Versions of Keras and JAX are added.

    Raises:
        ValueError: for another backend or an invalid argument;
            in every process if `same` differs, naming the values.
        TimeoutError: in every process if one is missing, naming it.
    """
    if keras.config.backend() != "jax":
        raise ValueError(
            "`connect` needs the JAX backend; this is "
            f"{keras.config.backend()}, which has other means (see the guide)."
        )
    whole_number(processes, "processes", 1)
    whole_number(index, "index", 0, processes - 1)
    number(timeout, "timeout", above=0)
    whole_number(heartbeat, "heartbeat", 1)
    instance(same or {}, "same", dict, "a dict or None")
    host, _, port = str(address).rpartition(":")
    if not host or not (port.isdecimal() and int(port) < 2**16):
        raise ValueError(f"`address` must be 'host:port'; got {shown(address)}.")
    import jax

    versions = {"keras": keras.__version__, "jax": jax.__version__}
    mine = {"processes": processes, "versions": versions, **(same or {})}
    seed = _compat.random_seed()
    if seed is None:
        seed = int(np.random.randint(2**31))
    until = time.monotonic() + timeout
    if index == 0:
        verdict = _await_others(host, int(port), processes, mine, seed, until)
    else:
        verdict = _report(host, int(port), index, mine, until)
    if "missing" in verdict:
        raise TimeoutError(
            f"{verdict['missing']} of {processes} did not connect to {address} within "
            f"{timeout} seconds (`timeout`). Start all processes, each with its index "
            "and this `address`."
        )
    if "different" in verdict:
        raise ValueError(f"The processes differ: {verdict['different']}.")
    jax.distributed.initialize(
        address,
        processes,
        index,
        initialization_timeout=max(1, round(timeout)),
        heartbeat_timeout_seconds=heartbeat,
    )
    keras.utils.set_random_seed(verdict["seed"])


def _await_others(host, port, processes, mine, seed, until):
    """In the first process: collect the others' settings, send them the verdict."""
    brought, peers = {0: mine}, []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(host, port, processes))
        while len(brought) < processes:
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                break
            stack.enter_context(peer)
            # Connections that do not speak this protocol are ignored.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                peer.settimeout(min(10, max(until - time.monotonic(), 0.01)))
                message = _receive(peer)
                brought[int(message["index"])] = message["same"]
                peers.append(peer)
        verdict = {"seed": seed}
        missing = sorted(set(range(processes)) - set(brought))
        if missing:
            verdict = {"missing": f"Process {', '.join(map(str, missing))}"}
        elif different := _differences(list(brought.items())):
            verdict = {"different": different}
        for peer in peers:
            with contextlib.suppress(OSError):
                _send(peer, verdict)
    return verdict


def _listen(host, port, processes):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server(
        (host.strip("[]"), port), family=family, backlog=processes
    )


def _report(host, port, index, mine, until):
    """In another process: send the settings to the first one, receive the verdict."""
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), port), left) as peer:
                _send(peer, {"index": index, "same": mine})
                # The first process decides when the time is over.
                peer.settimeout(max(until - time.monotonic(), 0) + 5)
                return _receive(peer)
        except (OSError, ValueError):  # The first process is not listening.
            time.sleep(min(0.2, left))
    return {"missing": "Process 0"}


def _send(peer, message):
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer):
    with peer.makefile("rb") as file:
        line = file.readline(_LARGEST_MESSAGE)
    return json.loads(line)


def process_count() -> int:
    """Number of processes; 1 without `connect`."""
    if keras.config.backend() != "jax":
        return 1
    import jax

    return jax.process_count()


def process_index() -> int:
    """Number of this process, from 0."""
    if keras.config.backend() != "jax":
        return 0
    import jax

    return jax.process_index()


def gather(data: bytes) -> list[bytes]:
    """The data of every process, ordered by process index; all of them call it.

    Args:
        data: bytes of any length.
    """
    if process_count() == 1:
        return [data]
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.array([len(data)], "int32")).ravel()
    padded = np.zeros(max(sizes.max(), 1), "uint8")
    padded[: len(data)] = np.frombuffer(data, "uint8")
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """Broadcast a JSON-ready value of the first process to all of them."""
    return json.loads(gather(json.dumps(value).encode())[0])


def require_same(**values: Any) -> None:
    """Raise `ValueError` in all processes if values differ, naming them."""
    texts = gather(json.dumps(values, sort_keys=True, default=str).encode())
    if len(set(texts)) > 1:
        brought = [(i, json.loads(text)) for i, text in enumerate(texts)]
        raise ValueError(f"The processes differ: {_differences(brought)}.")


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Raise an error of one process in all of them, at the end of the `with` block.

    The others raise an `OSError` if it is one, else a `RuntimeError`.

    Args:
        what: description of the work, for the message in the other processes.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # Raised below, after the others know of it.
        error = raised
    note = "" if error is None else f"{type(error).__name__}: {error}"
    notes = gather(json.dumps([note, isinstance(error, OSError)]).encode())
    if error is not None:
        raise error
    for i, (note, is_os_error) in enumerate(map(json.loads, notes)):
        if note:
            kind = OSError if is_os_error else RuntimeError
            raise kind(f"Process {i} failed while {what}: {note}")


def local_rows(rows: int) -> slice:
    """Rows of a batch that the devices of this process hold.

    Args:
        rows: number of rows of the batch, in all processes together.

    Raises:
        ValueError: if the mesh does not divide it.
    """
    distribution = keras.distribution.distribution()
    if process_count() == 1 or distribution is None:
        return slice(rows)
    sharding = distribution.get_data_layout((rows,)).backend_layout
    pieces = len(set(map(str, sharding.devices_indices_map((rows,)).values())))
    if rows % pieces:
        raise ValueError(
            f"`batch_size` must be a multiple of {pieces}, the size of the mesh axis "
            f"{distribution.batch_dim_name!r}; got {rows}."
        )
    held = [i[0] for i in sharding.addressable_devices_indices_map((rows,)).values()]
    ends = [part.indices(rows)[:2] for part in held]
    return slice(min(low for low, _ in ends), max(high for _, high in ends))


def _differences(brought):
    """Differences between dicts, `[(index, dict)]`, as text; "" if there are none."""
    flat = [(index, _flatten(values)) for index, values in brought]
    names = {name: None for _, values in flat for name in values}
    words = []
    for name in names:
        found = [(index, values.get(name, "nothing")) for index, values in flat]
        if any(value != found[0][1] for _, value in found):
            words.append(
                f"{name} is "
                + ", ".join(f"{value!r} in process {index}" for index, value in found)
            )
    return "; ".join(words)


def _flatten(values, prefix=""):
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = json.loads(json.dumps(value, default=str))
    return flat
