"""Helpers that know nothing of models: checks, sizes, rounding, ragged arrays.

Imports nothing else of the package.
"""
