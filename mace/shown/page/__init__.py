"""The page in the browser: its parts, and the file that `mace report --html` writes."""
