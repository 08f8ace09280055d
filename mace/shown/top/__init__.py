"""The live table of `mace top`: what it shows (`feed`, `rows`, `drawing`), and the screen (`screen`).

Only `screen` knows Textual.
"""
