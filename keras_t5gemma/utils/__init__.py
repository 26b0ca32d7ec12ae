"""Helpers: argument checks, texts, files, sizes, rounding, ragged arrays, progress.

Imports nothing else of the package.
"""
