"""Perfetto traces that hold ftrace events."""
