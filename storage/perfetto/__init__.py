"""Writes traces for Perfetto's timeline."""
