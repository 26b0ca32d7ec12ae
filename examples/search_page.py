"""A page in the browser: shorten a description, and search packages by meaning.

    pip install gradio
    python examples/search_page.py                 # http://127.0.0.1:7860

The packages are rows of a CSV file with the columns name, section and description.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import keras_t5gemma

DATA = Path(__file__).parent / "data" / "packages.csv"
EXAMPLES = (
    "This library reads and writes JSON files. It is written in C.",
    "A chess program for one or two players. The board is shown in a window.",
)


class Search:
    """The rows of a CSV file and their vectors, in memory.

    Args:
        path: of the file.
        preset: of the encoder.
    """

    def __init__(self, path: Path = DATA, preset: str = "t5gemma_mini") -> None:
        with open(path, encoding="utf-8", newline="") as file:
            self.rows = list(csv.DictReader(file))
        # Half of a vector is the meaning, half the words, weighted by rarity.
        self.embedder = keras_t5gemma.TextEmbedder.from_preset(preset, lexical_dim=4096)
        self.vectors = self.embedder.embed([r["description"] for r in self.rows])

    def __call__(self, query: str, count: int = 5) -> list[list]:
        """Rows `[similarity, name, section, description]`, the nearest first."""
        if not query.strip():
            return []
        vector = self.embedder.embed([query])
        numbers, cosines = keras_t5gemma.nearest(vector, self.vectors, k=int(count))
        return [
            [round(float(cosine), 2)]
            + [self.rows[n][key] for key in ("name", "section", "description")]
            for n, cosine in zip(numbers[0], cosines[0], strict=True)
        ]


class Summarizer:
    """One-line summaries.

    Args:
        preset: of the model.
    """

    def __init__(self, preset: str = "t5gemma_mini_synopsis") -> None:
        self.model = keras_t5gemma.Seq2SeqLM.from_preset(preset)

    def __call__(self, text: str, beams: int = 4) -> str:
        """The summary of a text; several by their score, one a line, with beams."""
        if not text.strip():
            return ""
        beams = int(beams)
        if beams == 1:
            return self.model.generate(text)
        answers = self.model.generate(
            text, num_beams=beams, num_return_sequences=min(beams, 3)
        )
        return "\n".join(answers)


def make_page(summarize: Summarizer, search: Search) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio

    with gradio.Blocks(title="keras_t5gemma", analytics_enabled=False) as page:
        gradio.Markdown("## A small T5Gemma, on this computer")
        with gradio.Tab("Summarize"):
            text = gradio.Textbox(EXAMPLES[0], lines=5, label="Description")
            beams = gradio.Slider(1, 8, 4, step=1, label="Beams")
            button = gradio.Button("Summarize", variant="primary")
            answer = gradio.Textbox(lines=3, label="Summaries, the best first")
            gradio.Examples([[e] for e in EXAMPLES], [text])
            button.click(summarize, [text, beams], answer)
        with gradio.Tab("Search"):
            query = gradio.Textbox("solve puzzles with numbers", label="Query")
            count = gradio.Slider(1, 10, 5, step=1, label="Results")
            find = gradio.Button("Find", variant="primary")
            table = gradio.Dataframe(
                headers=["similarity", "name", "section", "description"],
                label=f"{len(search.rows)} packages",
                wrap=True,
                column_widths=["15%", "15%", "15%", "55%"],
            )
            gradio.on([find.click, query.submit], search, [query, count], table)
    return page


def main(arguments: list[str] | None = None) -> None:
    """Load the models and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="a CSV file")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args(arguments)
    make_page(Summarizer(), Search(options.data)).launch(server_port=options.port)


if __name__ == "__main__":
    main()
