"""A drain commits: it is refused where the database is none that was made for tests."""

from __future__ import annotations

import pytest

from worker.client import Client
from worker.settings import load_settings
from worker.testing import NoHints, NotATestDatabase, drain


async def test_a_client_of_the_configured_database_is_not_drained_unless_that_is_said(exarq_client: Client) -> None:
    shop = load_settings(database={"url": "postgresql://127.0.0.1:1/shop"})

    async with Client(shop, publisher=NoHints()) as client:
        with pytest.raises(NotATestDatabase, match=r"in the database 'shop'.*any_database=True"):
            await drain(client)
        with pytest.raises(ConnectionRefusedError):
            await drain(client, any_database=True)
    assert await drain(exarq_client) == []
