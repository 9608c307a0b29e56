"""Settings → addresses: `embedded` means the private servers that a running command in this checkout has announced."""

from __future__ import annotations

from worker.core.errors import EmbeddedServerError
from worker.embedded import attach
from worker.embedded.servers import Servers
from worker.settings import Settings
from worker.settings.values import EMBEDDED


def database_url(settings: Settings) -> str:
    """Where PostgreSQL is, for an engine of your own: also where the settings say `embedded`.

    Args:
        settings: as `load_settings()` has them.

    Returns:
        An address for `create_async_engine`; another driver is set by `make_url(…).set(drivername=…)`.

    Raises:
        SettingsError: nothing says where it is.
        EmbeddedServerError: the settings say `embedded`, and no embedded servers are running here.

    """
    url = settings.require_database_url()
    return _embedded(settings).database_url if url == EMBEDDED else url


def redis_url(settings: Settings) -> str:
    """Where Redis is.

    Raises: `SettingsError` when nothing says so, `EmbeddedServerError` when no embedded server runs.
    """
    url = settings.require_redis_url()
    return _embedded(settings).redis_url if url == EMBEDDED else url


def _embedded(settings: Settings) -> Servers:
    servers = attach.find(str(settings.settings_key()))
    if servers is None:
        raise EmbeddedServerError(
            "the settings say `embedded` and no embedded servers are running here; start them with `exarq run` or"
            " `exarq dev`, or set EXARQ_DATABASE_URL and EXARQ_REDIS_URL"
        )
    return servers
