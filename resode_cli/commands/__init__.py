"""The verbs of the command line: parse, load, one core call, save, print.

Nothing here imports torch before a command runs, so that `resode --help` is instant.
"""
