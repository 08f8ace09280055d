"""Delays and windows -> somewhere. Imports the shared part of `mace` only."""
