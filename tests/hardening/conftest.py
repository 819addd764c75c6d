"""One set of weights, clip and runs for all quick tests here."""
import shutil

import pytest
from hardening import trial
from hardening.warm import warm as shared_warm


@pytest.fixture(scope="session")
def warm():
    return shared_warm()


@pytest.fixture(scope="session")
def stock(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hardening") / "stock"
    folder.mkdir()
    return trial.stock(folder, warm)


@pytest.fixture
def place(stock, tmp_path):
    """A copy of the stock that a test may spoil."""
    return shutil.copytree(stock, tmp_path / "place")
