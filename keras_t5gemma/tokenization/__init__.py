"""Text to arrays of token ids: tokenizer, preprocessor, padding, truncation.

May import `modeling` and the layers below it; knows nothing of data sets, training or
generation.
"""
