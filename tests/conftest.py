import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see launch/process/environment.py
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # real runs are of more ranks than a machine may have GPUs

from pathlib import Path

import pytest

from tests.support.ranks import pool


@pytest.fixture(scope="session", params=[1, 2, 3, 4], ids="{}rank".format)
def ranks(request):
    """The shared pool of 1, 2, 3 and 4 gloo ranks in turn."""
    return pool(request.param)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keep tests that start runs in one worker of `pytest -n 2 --dist loadgroup`: two at once would be too many."""
    for item in items:
        if Path(__file__).with_name("runs") in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("runs"))
