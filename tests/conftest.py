"""What every test module shares."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Every training starts by a garbage collection, which takes most of a tiny run unless modules are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
