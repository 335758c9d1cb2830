"""Modules that stand for those that a package's own files import and that cannot be had: classes of nothing."""

import importlib.abc
import importlib.machinery
import os
import pathlib
import types


def wheel_of(name, version):
    """The wheel of a version, in the folder that DAM_ENGINE_WHEELS names; None where there is none."""
    folder = os.environ.get("DAM_ENGINE_WHEELS")
    wheels = sorted(pathlib.Path(folder).glob(f"{name}-{version}-*.whl")) if folder else []
    return wheels[0] if wheels else None


class _Nothing(type):
    """Of classes that have any attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Stub(types.ModuleType):
    """Has whatever is imported from it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Nothing(name, (), {"__init__": lambda self, *_, **__: None})
        setattr(self, name, made)
        return made


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds whatever of packages nothing in front of it does.

    Args:
        packages: names.
        given: what modules are to have, by name.
    """

    def __init__(self, packages, given):
        self.packages, self.given = packages, given

    def find_spec(self, name, path=None, target=None):
        own = name.split(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if own else None

    def create_module(self, spec):
        module = Stub(spec.name)
        vars(module).update(self.given.get(spec.name, {}))
        return module

    def exec_module(self, module):
        pass
