"""Scenes for all fault tests, and a way to print counts."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.scenes import Scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Scenes:
    """The commands with their inputs."""
    return Scenes(tmp_path_factory.mktemp("scenes"), make_checkpoint)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of a seed that FAULTS_SEED sets."""
    return random.Random(f"{os.environ.get('FAULTS_SEED', '0')} {request.node.name}")


@pytest.fixture
def tell(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line, whatever pytest captures."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{request.node.name} (FAULTS_SEED={os.environ.get('FAULTS_SEED', '0')}): {text}")

    return show
