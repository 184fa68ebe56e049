"""Several processes on one study: how they hear of each other, and how long they wait."""

from __future__ import annotations

from heretic.settings.field import LONGEST_SECONDS, SettingsModel, setting


class WorkerSettings(SettingsModel):
    """Several processes on one study, on one machine or many."""

    heartbeat: int = setting(
        15,
        "Seconds between two signs of life of a worker with a trial under way, in a storage on a server.",
        when="up, where hundreds of workers burden the server.",
        ge=1,
        le=LONGEST_SECONDS,
    )
    grace_period: int = setting(
        60,
        "Seconds without a sign of life after which a worker counts as dead and another one tries its trial again. At least "
        "twice `heartbeat`.",
        when="up, where machines sleep or the network drops out for longer; a dead worker's trial waits that long.",
        ge=2,
        le=LONGEST_SECONDS,
    )
    retry_timeout: int = setting(
        600,
        "Seconds for which a worker goes on trying to reach a storage that is away before it gives up.",
        when="up, for a server that is restarted now and then.",
        ge=0,
        le=LONGEST_SECONDS,
    )
    retries: int = setting(
        2,
        "How often the parameters of a trial are tried again whose worker died; then others are drawn.",
        when="0, where a trial's parameters are suspected of killing workers.",
        ge=0,
    )
