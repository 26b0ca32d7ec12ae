"""Executed notebooks as Markdown pages with the theme's code blocks."""

import nbformat
from nbconvert import MarkdownExporter


def page(path):
    """`{file: content}`: the page of a notebook, and its pictures."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"unique_key": path.stem, "output_files_dir": "."}
    text, found = MarkdownExporter().from_notebook_node(notebook, resources=resources)
    download = f"[Download the notebook]({path.name}){{ .md-button }}"
    title, _, rest = text.strip().partition("\n")
    made = {
        f"guides/{path.stem}.md": f"{title}\n\n{download}\n\n{rest}\n",
        f"guides/{path.name}": path.read_bytes(),
    }
    for name, data in found["outputs"].items():
        made[f"guides/{name}"] = data
    return made
