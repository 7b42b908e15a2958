"""What every test module shares."""

import gc
import os
import signal
from pathlib import Path


# Tiny tensors gain nothing by a second thread, which would take a core from the other worker. Read by torch's import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the bridge's kernel is imported
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it in the background, for children, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests that start a process need the helpers beside this file there, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that start processes come first: of two workers, none is left alone with them at the end.

    All families of transformers are built where they are asked for alone: `-m families`.
    """
    if "families" not in config.getoption("markexpr"):
        items[:] = [item for item in items if item.get_closest_marker("families") is None]
    slow = {item.path for item in items if item.get_closest_marker("distributed") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Every training starts by a garbage collection, which takes most of a tiny run unless modules are left out."""
    gc.collect()
    gc.freeze()
