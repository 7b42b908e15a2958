"""Every example in a docstring runs, and says what it says."""

import doctest
import importlib
import pkgutil

import pytest

import cab_hf


def modules() -> list[str]:
    """The package's modules with an example."""
    found = []
    for module in pkgutil.walk_packages(cab_hf.__path__, "cab_hf."):
        spec = importlib.util.find_spec(module.name)
        if spec.origin and ">>> " in open(spec.origin, encoding="utf-8").read():
            found.append(module.name)
    return found


@pytest.mark.parametrize("name", modules())
def test_examples(name, tmp_path, monkeypatch):
    if name == "cab_hf.distillation.bridge_kernel":
        pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


def test_there_are_examples():
    assert {"cab_hf.distillation.trainer", "cab_hf.transfer.student"} <= set(modules())
