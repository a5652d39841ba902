"""Errors that only the command line knows."""

from __future__ import annotations

from typing import Any

from migrate.errors import MigrateError, Outcome


class ClusterNotFound(MigrateError):
    """No cluster could be found, or none of its nodes be reached; nothing was done.

    Args:
        message: See `MigrateError`.
        cluster: The name or address that was looked for.
        **fields: See `MigrateError`.
    """

    default_outcome = Outcome.NOT_DONE

    def __init__(self, message: str, *, cluster: str = "", **fields: Any) -> None:
        super().__init__(message, **fields)
        self.cluster = cluster
