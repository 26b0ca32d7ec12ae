"""Adapt decoder-only Gemma 2 to T5Gemma from file to file: `keras-t5gemma adapt`.

python tools/adapt_gemma2.py gemma2_9b_en gemma2_2b_en --output FOLDER
"""

import sys

from keras_t5gemma.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["adapt", *sys.argv[1:]]))
