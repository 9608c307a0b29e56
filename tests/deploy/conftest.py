"""The images as folders, and an empty database."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.deploy.image import Image, built
from tests.servers import TestServers
from worker.embedded.account import server_account, temporary_base


@pytest.fixture(scope="session")
def images() -> Iterator[dict[str, Image]]:
    """The images by the names of their stages, below a folder that their user can reach."""
    account = server_account()
    with tempfile.TemporaryDirectory(prefix="exarq-image-", dir=temporary_base(account)) as folder:
        Path(folder).chmod(0o711)
        with built(Path(folder), account) as images:
            yield images


@pytest.fixture
async def empty(servers: TestServers) -> AsyncIterator[AsyncEngine]:
    """An engine on a database without our schema."""
    name = f"exarq_test_deploy_{os.getpid()}"
    servers.sql(f"CREATE DATABASE {name}")
    engine = create_async_engine(servers.admin_url.set(database=name))
    try:
        yield engine
    finally:
        await engine.dispose()
        servers.sql(f"DROP DATABASE {name} WITH (FORCE)")
