"""A service that cannot import the job's code: `python by_name.py 7` confirms order 7."""

import asyncio
import sys

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from worker import Publisher, database_url, enqueue, load_settings


async def main(order_id: int) -> None:
    settings = load_settings()
    engine, publisher = create_async_engine(database_url(settings)), Publisher.from_settings(settings)
    sessions = async_sessionmaker(engine, info=publisher.info)
    async with sessions.begin() as session:  # whatever else this service writes belongs to the same transaction
        handle = await enqueue(session, "orders.confirm", {"order_id": order_id})
    print(await handle.result(timeout=60))
    await publisher.close()
    await engine.dispose()


asyncio.run(main(int(sys.argv[1])))
