"""Nanoseconds in what tests say their times in."""

MS = 1_000_000
S = 1_000_000_000
