"""Settings of every test: one set of random numbers, and uninitialized memory that shows (NaN) when it is read."""

import os
from collections.abc import Iterator

import pytest
import torch

LONGEST = ("test_in_the_interpreter", "test_every_kernel_compiles", "test_a_small_run_shows_what_the_demo_claims")


def pytest_configure() -> None:
    """Workers that run side by side share the cores, and so do the processes that their tests start."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests evenly spread: workers begin with equal shares of the list, and steal from its shares' ends."""
    longest = [item for item in items if item.name.partition("[")[0] in LONGEST]
    items[:] = [item for item in items if item not in longest]
    for i, item in enumerate(longest):
        items.insert(i * len(items) // len(longest), item)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty``, also those of C++ kernels, with NaN for the length of a test."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = was_filled
