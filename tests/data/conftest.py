from collections.abc import Callable
from pathlib import Path

import pytest

from peerscale.config.schema import DataConfig


@pytest.fixture
def text_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A configuration of source `text` that keeps what it prepares in this test's folder."""

    def make(path: Path, **settings) -> DataConfig:
        settings = {"vocab_size": 512, "evaluation": {"validation": 1024}, **settings}
        return DataConfig(source="text", path=str(path), directory=str(tmp_path / "data"), **settings)

    return make
