"""Traces for Perfetto's timeline."""
