"""Settings for several processes on one study: heartbeats and retries."""

from __future__ import annotations

from heretic.settings.field import LONGEST_SECONDS, SettingsModel, setting


class WorkerSettings(SettingsModel):
    """Several processes on one study, on one machine or many."""

    heartbeat: int = setting(
        15,
        "Seconds between two heartbeats of a worker with a running trial, in a PostgreSQL storage.",
        when="Raise it if hundreds of workers overload the server.",
        ge=1,
        le=LONGEST_SECONDS,
    )
    grace_period: int = setting(
        60,
        "Seconds without a heartbeat after which another worker retries the trial; at least twice `heartbeat`.",
        when="Raise it if machines sleep or the network drops out for longer.",
        ge=2,
        le=LONGEST_SECONDS,
    )
    retry_timeout: int = setting(
        600,
        "Seconds for which a worker tries to reach an unavailable storage before it stops.",
        when="Raise it if the server restarts now and then.",
        ge=0,
        le=LONGEST_SECONDS,
    )
    retries: int = setting(
        2,
        "How often the parameters of a trial are retried after its worker died.",
        when="Set 0 if you suspect that a trial's parameters crash workers.",
        ge=0,
    )
