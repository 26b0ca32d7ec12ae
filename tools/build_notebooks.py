"""Guides as executed notebooks: `python tools/build_notebooks.py [NAME ...]`.

Makes `guides/NAME.ipynb` from `guides/NAME.py` (jupytext's percent format), runs it in
an empty folder, and keeps its outputs; without names all guides, two at a time.
Cells tagged `skip-execution`, which install packages on a hosted notebook service, are
not run. Needs jupytext, nbclient, ipykernel, and what the guides need
(`nox -s notebooks` installs it).
"""

import argparse
import base64
import concurrent.futures
import io
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from PIL import Image

GUIDES = Path(__file__).resolve().parent.parent / "guides"
MAX_BYTES = 200_000
SECONDS = 600  # Per cell.
COLOR = re.compile(r"\x1b\[[0-9;]*m")
COLORS = 64  # Of a picture: plots have few, and a palette makes them small.
# The backend that starts fastest, unless KERAS_BACKEND is set; two guides at a time.
ENVIRONMENT = {
    "KERAS_BACKEND": "torch",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def guides():
    """Names of all guides."""
    return sorted(path.stem for path in GUIDES.glob("*.py"))


def read_script(name):
    """The notebook of a guide's script, without outputs; equal scripts, equal bytes."""
    notebook = jupytext.read(GUIDES / f"{name}.py", fmt="py:percent")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
    return notebook


def execute(notebook):
    """Run all cells in an empty folder, and clean their outputs."""
    from nbclient import NotebookClient  # Only here: the tests run no notebook.

    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=SECONDS,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.metadata.pop("execution", None)
                cell.outputs = clean(cell.outputs, folder)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def clean(outputs, folder):
    """Outputs without the machine's paths and logs, and with small pictures.

    Raises:
        RuntimeError: for a warning that asks the user for a change.
    """
    kept = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            # Log lines of the libraries about this machine, e.g. that it has no GPU.
            if "UserWarning" in output.text:
                raise RuntimeError(output.text)
            continue
        if output.output_type == "stream":
            output.text = without_paths(output.text, folder)
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        for kind, value in output.get("data", {}).items():
            if kind == "image/png":
                output.data[kind] = compress(value)
            elif isinstance(value, str):
                output.data[kind] = without_paths(value, folder)
        kept.append(output)
    return kept


def without_paths(text, folder):
    """Text in which paths are relative, and a progress bar is its last state."""
    text = re.sub(r"/\S*/ipykernel_\d+/\d+\.py", "cell", text)
    places = {folder: ".", str(GUIDES.parent): ".", sys.prefix: "ENVIRONMENT"}
    places |= {os.path.realpath(path): name for path, name in places.items()}
    for path in sorted(places, key=len, reverse=True):
        if places[path] == ".":
            text = text.replace(f"{path}{os.sep}", "")
        text = text.replace(path, places[path])
    lines = COLOR.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def compress(png):
    """A picture in base64 with a palette in place of three bytes a pixel."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    small = io.BytesIO()
    picture.quantize(COLORS).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def build(name):
    """Write a guide's notebook; returns `(name, bytes, seconds)`."""
    start = time.perf_counter()
    text = nbformat.writes(execute(read_script(name))) + "\n"
    path = GUIDES / f"{name}.ipynb"
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return name, path.stat().st_size, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="guides; default all")
    names = parser.parse_args().names or guides()
    for name in sorted(set(names) - set(guides())):
        parser.error(f"unknown guide {name!r}; there are {', '.join(guides())}")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    start, failed = time.perf_counter(), []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        jobs = {pool.submit(build, name): name for name in names}
        for job in concurrent.futures.as_completed(jobs):
            try:
                name, size, seconds = job.result()
            except Exception as error:  # The others are of interest too.
                failed.append(jobs[job])
                message = COLOR.sub("", str(error))[-2000:]
                print(f"{jobs[job]}: {message}", file=sys.stderr)
                continue
            print(f"{name:32} {size / 1e3:6.0f} kB {seconds:6.0f} s", flush=True)
            if size > MAX_BYTES:
                failed.append(name)
                print(f"{name} is over {MAX_BYTES / 1e3:.0f} kB", file=sys.stderr)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
