"""MkDocs hooks: pages made in the build, and links that lead out of `docs/`."""

import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import notebooks  # noqa: E402
import places  # noqa: E402
import plots  # noqa: E402
import reference  # noqa: E402
import tables  # noqa: E402


def on_config(config):
    """Put all generated pages of a folder into the navigation."""
    pages = {
        "guides/": places.guide_pages(),
        "api/": list(reference.api_pages()),
    }

    def expand(items):
        for item in filter(lambda item: isinstance(item, dict), items):
            for title, value in item.items():
                if isinstance(value, list):
                    expand(value)
                else:
                    item[title] = pages.get(value, value)

    expand(config.nav)
    return config


@event_priority(100)  # Before plugins look at the files.
def on_files(files, config):
    """Add the generated pages."""
    made = {**reference.api_pages(), "cli.md": reference.cli_page()}
    for path, target in places.COPIED.items():
        made[target] = (places.ROOT / path).read_bytes()
    for name in places.guides():
        made |= notebooks.page(places.ROOT / f"guides/{name}.ipynb")
    results, pictures = plots.with_plots(made["benchmarks.md"].decode())
    made |= {"benchmarks.md": results, **pictures}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


@event_priority(100)
def on_page_markdown(markdown, page, config, files):
    """Fill in tables, and point links to files of the repository elsewhere."""
    path = page.file.src_uri
    source = {target: origin for origin, target in places.COPIED.items()}
    origin = source.get(path, f"docs/{path}")

    def replace(match):
        target, anchor = match.group(1), match.group(2) or ""
        here = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if files.get_file_from_path(here) is not None:
            return match.group()
        found = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        inside = places.site_path(found)
        if inside is not None:
            relative = posixpath.relpath(inside, posixpath.dirname(path) or ".")
            return f"]({relative}{anchor})"
        if not (places.ROOT / found).exists():
            raise ValueError(f"{origin}: {target} does not exist")
        return f"](repository:{found}{anchor})"

    markdown = tables.fill(markdown)
    if not path.startswith(("api/", "guides/")) or path == "guides/index.md":
        markdown = places.LINK.sub(replace, markdown)
    return to_repository(markdown)


def to_repository(markdown):
    """Links to files that are no page: to the repository if it is known, else text."""
    url = os.environ.get("REPOSITORY_URL")
    pattern = r"\[([^\]\[]*)\]\(repository:([^)]*)\)"
    if url:
        return re.sub(pattern, rf"[\1]({url}/blob/main/\2)", markdown)
    return re.sub(pattern, r"`\2`", markdown)
