"""The version of MACE, as streams and stores record it; pyproject.toml reads it from this file."""

from typing import Final

VERSION: Final = "0.1.0"
