import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see launch/process/environment.py
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # real runs are of more ranks than a machine may have GPUs

import pytest

from tests.support.ranks import pool


@pytest.fixture(scope="session", params=[1, 2, 3, 4], ids="{}rank".format)
def ranks(request):
    """The shared pool of 1, 2, 3 and 4 gloo ranks in turn."""
    return pool(request.param)
