"""The version of everything here, as streams and stores carry it; pyproject.toml reads it from this file."""

from typing import Final

VERSION: Final = "0.1.0"
