"""Conversion: Gemma 2 to T5Gemma, format to format, averages, verification.

`adapt` turns decoder-only Gemma 2 models (`gemma2_reader`) into a T5Gemma, which
`adaptation_checks` verifies; `convert` changes the format, `average` averages
checkpoints, `compare` compares them. May import `data`, `tokenization`, `modeling` and
the layers below them.
"""
