"""MACE's own capture files."""
