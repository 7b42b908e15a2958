"""What every test module shares."""

import gc
import os

import pytest
import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the bridge's kernel is imported


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Every training starts by a garbage collection, which takes most of a tiny run unless modules are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
