"""A page on training runs, in one file: no scripts, no requests, pictures as data URIs.

markup: text that is HTML, and everything else escaped · plots: curves as SVG · style: the sheet ·
curves, runs, held_out: the page's parts · page: all of it.
"""
