"""A plugin for pytest: a compiled module is the extension that MACE_EXTENSION names, not that of the tree.

MACE_EXTENSION is the module's name, "=", and the path of the extension.
"""

import importlib.abc
import importlib.util
import os
import sys

NAME, _, PATH = os.environ["MACE_EXTENSION"].partition("=")


class OtherExtension(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        return importlib.util.spec_from_file_location(NAME, PATH) if fullname == NAME else None


assert NAME not in sys.modules, "too late: the tree's own extension is in use"
sys.meta_path.insert(0, OtherExtension())
