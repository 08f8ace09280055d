"""Units of time in nanoseconds."""

MS = 1_000_000
S = 1_000_000_000
