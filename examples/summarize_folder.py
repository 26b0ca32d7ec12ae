"""Summarize every text of a folder in one line, from the command line.

    python examples/summarize_folder.py examples/data/texts
    python examples/summarize_folder.py FOLDER --preset my_preset --output summaries.tsv

The embedded preset shortens descriptions of software. For other texts fine-tune it on
pairs of your own: `keras-t5gemma finetune --help`.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import keras_t5gemma

SUFFIXES = (".txt", ".md", ".rst")


def read_text(path: Path) -> str:
    """The text of a file without the marks of Markdown, as one line."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    text = re.sub(r"^#+ .*$|^[=\-~]{3,}$", "", text, flags=re.M)  # Headings, rules.
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # Links and images.
    return " ".join(text.replace("`", "").split())


def summarize(
    folder: Path, preset: str = "t5gemma_mini_synopsis", num_beams: int = 4
) -> list[tuple[str, str]]:
    """`(path in the folder, summary)` of the texts in a folder, sorted by path."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    texts = {path: text for path in files if (text := read_text(path))}
    if not texts:
        raise SystemExit(f"{folder} has no texts ({', '.join(SUFFIXES)}).")
    model = keras_t5gemma.Seq2SeqLM.from_preset(preset)
    # Beams find better lines than greedy decoding; no pair of tokens comes twice.
    answers = model.generate(
        list(texts.values()), num_beams=num_beams, no_repeat_ngram_size=2
    )
    names = [path.relative_to(folder).as_posix() for path in texts]
    return list(zip(names, answers, strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, and print or write the summaries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="t5gemma_mini_synopsis")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--output", type=Path, help="a .tsv file; else the screen")
    options = parser.parse_args(arguments)
    rows = summarize(options.folder, options.preset, options.beams)
    if options.output is None:
        width = max(len(name) for name, _ in rows)
        for name, summary in rows:
            print(f"{name:{width}}  {summary}")
        return
    with open(options.output, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, dialect="excel-tab")
        writer.writerows([("file", "summary"), *rows])
    print(f"{len(rows)} summaries in {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
