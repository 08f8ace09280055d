"""A plugin for pytest: `collector.compiled.loops` is the extension that MACE_EXTENSION names, not that of the tree."""

import importlib.abc
import importlib.util
import os
import sys

NAME = "collector.compiled.loops"


class OtherExtension(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        return importlib.util.spec_from_file_location(NAME, os.environ["MACE_EXTENSION"]) if fullname == NAME else None


assert NAME not in sys.modules, "too late: the tree's own extension is in use"
sys.meta_path.insert(0, OtherExtension())
