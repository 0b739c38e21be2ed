"""One finished study for all tests of the stages."""

import pytest

from tests.helpers.study import finished_study


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a tiny study after every stage but `track`; a test changes a copy of it (tests/conftest.py, `study`)."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finished_study(folder, tasks=["ar", "copying", "text"])
    return folder
