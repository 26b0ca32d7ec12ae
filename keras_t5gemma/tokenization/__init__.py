"""Text to arrays of token ids: tokenizer, preprocessor, padding, truncation.

May import `modeling` and the layers below it; imports neither data sets, training
nor generation.
"""
