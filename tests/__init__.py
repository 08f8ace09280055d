"""Tests; a regular package, so that the `tests` of another distribution cannot shadow it."""
