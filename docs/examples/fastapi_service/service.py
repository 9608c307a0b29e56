"""A FastAPI service that enqueues in its requests' own transactions.

In this folder, with `pip install fastapi uvicorn`, and EXARQ_DATABASE_URL and EXARQ_REDIS_URL set:

    exarq db upgrade                           # once
    uvicorn service:app                        # the service
    EXARQ_JOBS_MODULES=orders exarq run        # a worker

Or without servers of yours, both set to `embedded`: `EXARQ_JOBS_MODULES=orders exarq dev`, then the service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Request
from orders import Base, Order, confirm
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from worker import JobCancelled, JobFailed, Publisher, ResultTimeout, database_url, handle_of, load_settings

IN_STOCK = 100


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One engine, one session factory and one publisher for all requests."""
    settings = load_settings()
    engine = create_async_engine(database_url(settings))
    publisher = Publisher.from_settings(settings)
    app.state.sessions = async_sessionmaker(engine, expire_on_commit=False, info=publisher.info)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)  # your migrations do this
    yield
    await publisher.close()
    await engine.dispose()


async def get_db(request: Request) -> AsyncIterator[AsyncSession]:
    """The session of one request; what the route has not committed is rolled back."""
    async with request.app.state.sessions() as session:
        yield session


Db = Annotated[AsyncSession, Depends(get_db)]
app = FastAPI(lifespan=lifespan)


class Wanted(BaseModel):
    """The body of an order."""

    item: str
    quantity: int = 1


class Placed(BaseModel):
    """An order that is stored, and the job that confirms it."""

    order_id: int
    job_id: UUID


@app.get("/health", status_code=204)
async def health() -> None:
    """That it answers; to start it anew because PostgreSQL is away wins nothing."""


@app.post("/orders", status_code=201)
async def place(wanted: Wanted, db: Db) -> Placed:
    """The order and its job, in one transaction."""
    order = Order(item=wanted.item, quantity=wanted.quantity)
    db.add(order)
    await db.flush()
    handle = await confirm.enqueue(db, order_id=order.id)
    if wanted.quantity > IN_STOCK:
        raise HTTPException(409, "not enough in stock")  # neither the order nor its job will have been
    await db.commit()  # here and not in get_db, whose end comes after the answer
    return Placed(order_id=order.id, job_id=handle.id)


@app.get("/orders/{order_id}")
async def look(order_id: int, db: Db) -> dict[str, bool]:
    """Whether the order is confirmed."""
    if (order := await db.get(Order, order_id)) is None:
        raise HTTPException(404, "no such order")
    return {"confirmed": order.confirmed}


@app.get("/jobs/{job_id}/result")
async def result(job_id: UUID, db: Db, timeout: float = 30) -> dict[str, str]:
    """What the job returned, for which the request waits; it holds no connection meanwhile."""
    try:
        return {"result": await handle_of(db, job_id, confirm).result(timeout=timeout)}
    except ResultTimeout as late:
        raise HTTPException(504, str(late)) from late
    except (JobFailed, JobCancelled) as ended:
        raise HTTPException(502, str(ended)) from ended
