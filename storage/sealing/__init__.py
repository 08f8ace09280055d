"""Seals: signed statements beside a capture file or in a store that let edits, gaps and deletions be found later."""
