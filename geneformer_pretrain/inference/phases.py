"""Seconds of a command's phases, and of waiting."""

from time import perf_counter
from typing import Any

from geneformer_pretrain.distributed.agreement import Ranks


class Phases:
    """Seconds that the phases of a command take on this rank, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.of_ranks: dict[str, list[float]] = {}
        self.waits: dict[str, float] = {}
        self._since = perf_counter()

    def end(self, name: str) -> None:
        """Count the time since the last phase ended as that of this one."""
        now = perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def end_forward(self, ranks: Ranks, *, packs: float, writing: float) -> None:
        """End the phase "forward" once all ranks are through with it, and keep what it took each of them.

        Parameters
        ----------
        packs, writing
            Seconds of it in which this rank waited for packs to be built and for results to be written.
        """
        took, for_packs, for_writing = zip(*ranks.gather((perf_counter() - self._since, packs, writing)), strict=True)
        if ranks.size > 1:
            self.of_ranks["forward"] = list(took)
        self.waits = {"packs": max(for_packs), "writing": max(for_writing)}
        self.end("forward")

    def total(self, *names: str) -> float:
        """Seconds of some phases."""
        return sum(self.seconds[name] for name in names)

    @property
    def line(self) -> str:
        """The phases in words."""
        parts = []
        for name, seconds in self.seconds.items():
            parts.append(f"{name} {seconds:.1f}")
            if name in self.of_ranks:
                parts[-1] += f" (ranks {min(self.of_ranks[name]):.1f} to {max(self.of_ranks[name]):.1f})"
        waits = " and ".join(f"{seconds:.1f} for {what}" for what, seconds in self.waits.items())
        at_most = " at most" if self.of_ranks else ""
        return f"Seconds: {', '.join(parts)}." + (f" Forward passes waited {waits}{at_most}." if waits else "")

    @property
    def values(self) -> dict[str, Any]:
        """The phases for a report."""
        values: dict[str, Any] = {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}
        values |= {f"{name}_seconds_of_ranks": seconds for name, seconds in self.of_ranks.items()}
        values |= {f"waited_for_{what}_seconds": seconds for what, seconds in self.waits.items()}
        return {name.replace("-", "_"): value for name, value in values.items()}
