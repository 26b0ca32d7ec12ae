"""Random texts in many scripts."""

import numpy as np

from helpers.models import CONTROLS, SENTENCES

# First and last character of blocks of Unicode: 20 scripts, symbols, controls, spaces.
BLOCKS = """
    20-7E A0-FF 100-17F 370-3FF 400-4FF 530-58F 590-5FF 600-6FF 780-7BF 900-97F
    980-9FF B80-BFF E00-E7F F00-FFF 10A0-10FF 1200-137F 1780-17FF 3041-30FF 4E00-9FFF
    AC00-D7A3 1F300-1F6FF 2000-206F 2580-25FF 300-36F 0-1F FE00-FE0F 10FFF0-10FFFD
""".split()
WORDS = [*"".join(SENTENCES).split(), *CONTROLS[:5], "<end_of_turn>", "<bos>", "<pad>"]
WORDS += [
    "<0x41>",
    "<0x0A>",
    "<unused999>",
    "\u2581",
    " ",
    "  ",
    " " * 40,
    "\n\n\t\r\n",
]
WORDS += ["\n\n\t\r\n", "oooooooo", "a" * 33, "<unk>", "<", "of_turn>"]


def random_texts(count, seed=0, longest=12):
    """Texts of words, control tokens and letters of blocks, the same at every call."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.integers(0, longest)):
            if rng.random() < 0.5:
                parts.append(WORDS[rng.integers(len(WORDS))])
                continue
            first, last = (int(x, 16) for x in BLOCKS[rng.integers(27)].split("-"))
            letters = rng.integers(first, last + 1, rng.integers(1, 9))
            parts.append("".join(map(chr, letters)))
        yield rng.choice(["", " "]).join(parts)
