"""One warm interpreter, and one set of weights, clip and runs, for all quick tests here."""
import pytest
import trial
from warm import Warm


@pytest.fixture(scope="session")
def warm():
    warm = Warm()
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def stock(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hardening") / "stock"
    folder.mkdir()
    return trial.stock(folder, warm)


@pytest.fixture
def place(stock, tmp_path):
    """A copy of the stock that a test may spoil."""
    import shutil
    shutil.copytree(stock, tmp_path / "place")
    return tmp_path / "place"
