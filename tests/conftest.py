"""What every test module shares."""

import gc
import os
from pathlib import Path

import pytest
import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the bridge's kernel is imported
# Tests that start a process need the helpers beside this file there, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Every training starts by a garbage collection, which takes most of a tiny run unless modules are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
