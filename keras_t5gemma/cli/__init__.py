"""The `keras-t5gemma` command: parses options, calls the package, prints results.

It may import every other package. `main`, `options` and `commands` import Keras and
backends only inside the functions that run a command.
"""
