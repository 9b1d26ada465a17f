"""Shared by the tests of the small models: real digits."""

import pytest

from tests.mnist import real


@pytest.fixture(scope="session")
def digits():
    return real.digits()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return real.write_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def fashion(tmp_path_factory):
    """The same digits where FashionMNIST would lie, so that nothing else can have been read."""
    return real.write_folder(tmp_path_factory.mktemp("clothes"), "FashionMNIST")
