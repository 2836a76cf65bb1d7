"""What is public is listed, sorted and there; what is imported is no more than is needed."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import stoker

PACKAGES = ["storage", "loaders", "checkpoint", "bench", "testing"]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(stoker.__path__, "stoker.")
    # Command lines are entry points, plugin.py belongs to pytest, and examples are programs.
    if module.name.rpartition(".")[2] not in ("cli", "plugin", "demo") and ".examples" not in module.name
)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_public_names_of_a_package_are_sorted_and_there(name: str) -> None:
    package = importlib.import_module(f"stoker.{name}")
    names = package.__all__
    assert names == sorted(set(names))
    for one in names:
        assert getattr(package, one) is not None
    # Nothing of stoker's stands in the package's namespace without being listed.
    loose = {
        one
        for one, value in vars(package).items()
        if not one.startswith("_")
        and not isinstance(value, ModuleType)
        and str(getattr(value, "__module__", "")).startswith("stoker")
    }
    assert loose <= set(names)


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_lists_is_there(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, "says in its first line what it is for"
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    for one in names:
        assert hasattr(module, one)


def imported_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_storage_pulls_neither_torch_nor_pyarrow() -> None:
    heavy = {"torch", "pyarrow", "numpy", "obstore", "zarr", "fsspec", "pytest"}
    assert not heavy & imported_by("import stoker.storage")
    assert not heavy & imported_by("from stoker.storage import open_store; open_store('/tmp').close()")


def test_the_pytest_plugin_pulls_nothing_heavy_into_every_pytest_run() -> None:
    assert not {"torch", "pyarrow", "numpy", "obstore", "zarr", "fsspec"} & imported_by("import stoker.testing.plugin")
