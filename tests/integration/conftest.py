"""What most integration tests start from."""

from pathlib import Path

import pytest

from tests.support.runs import write_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, its tokenizer and a configuration of every family, anew for each module."""
    folder = tmp_path_factory.mktemp("assets")
    write_assets(folder)
    return folder
