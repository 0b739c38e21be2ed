"""One finished study for all tests of the stages."""

import pytest

from tests.helpers.study import shared_study


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a tiny study after every stage but `track`; a test changes a copy of it (tests/conftest.py, `study`)."""
    return shared_study(tmp_path_factory, tasks=["ar", "copying", "text"])
