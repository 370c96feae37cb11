"""Bytes and time of checkpoints."""

from dataclasses import dataclass

from geneformer_pretrain.config.training import TrainingConfig

CHECKPOINT_BYTES = 12
"""Bytes a parameter of a checkpoint: the FP32 weight and AdamW's two moments."""
MODEL_BYTES = 4
"""Bytes a parameter of an export."""
TO_HOST = 42e9
"""Bytes per second from a GPU into pinned host memory: 3.8 GB in 0.09 s, 1.28 GB in 0.03 s (H200, 2026-11-24)."""
PINNING = 5.1e9
"""Bytes per second at which host memory for that is pinned, once after each start: 34.9 GB in 6.8 s, 1.28 GB in 0.16 s
(H200, 2026-11-27)."""
TO_DISK = 0.54e9
"""Bytes per second to disk, checksums included: 3.8 GB in 7 s (one disk, 2026-11-24)."""


@dataclass(frozen=True)
class Saving:
    """Time that checkpoints take.

    Attributes
    ----------
    interval_seconds
        Time from one to the next; at least a step.
    background_seconds
        Time of the writing beside the training.
    stop_seconds
        Time for which one stops the training.
    first_stop_seconds
        The same of the first after a start, for which host memory is pinned.
    host_bytes
        That memory, of each rank.
    share
        Of the run's time, for which training stands still; without what the first one takes longer.
    """

    interval_seconds: float
    background_seconds: float
    stop_seconds: float
    first_stop_seconds: float
    host_bytes: float
    share: float


def save_interval(training: TrainingConfig, step_seconds: float) -> float:
    """Return the seconds between two checkpoints: the shorter of `save_every_n_steps` and `save_every_minutes`.

    A key that is null or 0 does not count.
    """
    every_steps = training.save_every_n_steps or 0
    intervals = [every_steps * step_seconds, 60 * training.save_every_minutes]
    return max(step_seconds, min(interval for interval in intervals if interval > 0))


def saving(
    training: TrainingConfig, num_parameters: int, ranks: int, step_seconds: float, disk: float = TO_DISK
) -> Saving:
    """Compute how long checkpoints stop the training.

    An asynchronous save stops it for the copy to host memory, and until the one before is written.

    Parameters
    ----------
    ranks
        Each saves about as much; with DDP the most that one saves is 1.2 to 1.5 times the mean.
    disk
        Bytes per second that all ranks together write.
    """
    size = CHECKPOINT_BYTES * num_parameters
    host = size / ranks
    interval, background = save_interval(training, step_seconds), size / disk
    stop = host / TO_HOST + (max(0.0, background - interval) if training.async_save else background)
    return Saving(interval, background, stop, stop + host / PINNING, host, stop / (interval + stop))


def kept_checkpoints(training: TrainingConfig) -> int:
    """Count the checkpoints that lie on disk at a time: those kept, the best one, and the one being written."""
    return training.keep_last_n + int(training.keep_best) + 1
