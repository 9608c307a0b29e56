"""How isolated a transaction is: as the definition says, else as the engine does."""

from __future__ import annotations

from sqlalchemy import Engine


def isolation_of(engine: Engine, declared: str | None) -> str | None:
    """The isolation level of an attempt's transaction; None while no connection has told the server's default.

    Args:
        engine: the jobs' engine.
        declared: what the definition says; None takes the engine's.

    """
    chosen = declared or engine.get_execution_options().get("isolation_level")
    # Where create_engine() was given a level, the first connection tells that one.
    level: str | None = chosen or getattr(engine.dialect, "default_isolation_level", None)
    return None if level is None else level.replace("_", " ").upper()
