"""Files of the repository and the pages of the site that are made from them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Files outside `docs/` that are pages or pictures of the site.
COPIED = {
    "guides/README.md": "guides/index.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "experiments/README.md": "experiments.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/generate.png": "generate.png",
    "benchmarks/train.png": "train.png",
    "experiments/losses.png": "losses.png",
    "experiments/frontier.png": "frontier.png",
    "experiments/representation.png": "representation.png",
}
# Target and anchor of a link that is relative.
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]*)(#[^)\s]*)?\)")


def guides():
    """Names of the guides that have a notebook, as guides/README.md lists them."""
    text = (ROOT / "guides/README.md").read_text("utf-8")
    return re.findall(r"\]\((\w+)\.ipynb\)", text)


def guide_pages():
    """Pages of the guides, their list first."""
    return ["guides/index.md", *(f"guides/{name}.md" for name in guides())]


def site_path(path):
    """Page of the site for a file of the repository, or `None`."""
    if path in COPIED:
        return COPIED[path]
    if path.startswith("guides/") and path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return None
