"""After a lost device the next worker starts one step more careful: slow service is better than none."""

from __future__ import annotations

import logging
from dataclasses import replace

from server.config import Settings

DEVICE_LOST = 75
"""Exit code of a worker whose device only a new process can use again."""

logger = logging.getLogger(__name__)


def more_careful(settings: Settings) -> Settings:
    """Without recordings and compiled layers; if it was so already, with torch's own attention."""
    if not settings.eager:
        logger.error("the device was lost: the next worker records and compiles nothing (--eager)")
        return replace(settings, eager=True)
    if settings.attention != "sdpa":
        logger.error("the device was lost again: the next worker attends by torch (--attention sdpa)")
        return replace(settings, attention="sdpa")
    return settings
