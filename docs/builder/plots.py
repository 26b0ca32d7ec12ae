"""Bar charts of the tables in benchmarks/RESULTS.md."""

import io
import re

from matplotlib.figure import Figure
from tables import tables_in

# Columns of which a chart is drawn, where at least this many rows compare something.
COLUMNS = ("ms per token", "s per step")
MIN_ROWS = 4
OURS, OTHERS = "#3f51b5", "#9e9e9e"


def with_plots(text):
    """`(Markdown, {file: picture})`: a chart below each table with such a column."""
    pictures = {}

    def add(match):
        block = match.group()
        ((header, rows),) = tables_in(block)
        for column in COLUMNS:
            if column in header and len(rows) >= MIN_ROWS:
                name = f"plots/{len(pictures)}.png"
                place = header.index(column)
                bars = [(row[0], first_number(row[place])) for row in rows]
                pictures[name] = draw(bars, column, header[0])
                title = f"{column}: {header[0]}"
                return f"{block}\n![{title}]({name})\n"
        return block

    return re.sub(r"(?:^\|.*\|\n)+", add, text, flags=re.M), pictures


def first_number(cell):
    """The first of the numbers in a cell."""
    return float(re.search(r"[\d,.]*\d", cell).group().replace(",", ""))


def draw(bars, column, title):
    """Horizontal bars, the smallest on top, as PNG."""
    bars = sorted(bars, key=lambda bar: -bar[1])
    figure = Figure(figsize=(7, 0.7 + 0.3 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    names, values = zip(*bars, strict=True)
    colors = [OURS if "keras_t5gemma" in name else OTHERS for name in names]
    drawn = axes.barh(names, values, color=colors)
    axes.bar_label(drawn, padding=3)
    axes.margins(x=0.1)
    axes.set_xlabel(column)
    if title != "peer":
        axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=110)
    return file.getvalue()
