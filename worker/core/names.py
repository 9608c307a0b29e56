"""What may be the name of a job or of a queue."""

from __future__ import annotations

from typing import Final

DEFAULT_QUEUE: Final = "default"
LONGEST_NAME = 200
RESERVED_QUEUES = ("arq:", "exarq:")
"""Beginnings of queue names that would collide with other keys in Redis, where a queue's name is its key."""


def is_name(word: object) -> bool:
    """Whether this is text that people can read, and not too long."""
    return isinstance(word, str) and 0 < len(word) <= LONGEST_NAME and word.isprintable()
