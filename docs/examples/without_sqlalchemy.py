"""A service that uses no SQLAlchemy itself: `python without_sqlalchemy.py 7` confirms order 7."""

import asyncio
import sys

from worker import Client, load_settings


async def main(order_id: int) -> None:
    async with Client(load_settings()) as client:
        handle = await client.enqueue("orders.confirm", {"order_id": order_id}, key=f"order-{order_id}")
        print(await handle.result(timeout=60))


asyncio.run(main(int(sys.argv[1])))
