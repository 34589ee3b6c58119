"""Signals that a run has a problem: a loss that jumps, a router that collapses, a throughput that falls by half.

They depend only on the rows of `metrics.jsonl`, so that a resumed run or an upload finds the same signals.
"""

from bisect import insort
from collections.abc import Mapping
from statistics import median

WINDOW = 10
"""Number of earlier rows with which a loss is compared, and that are needed before a throughput is judged."""

LOSS_JUMP = 0.3
"""Nats above the median of the rows before. In 103 healthy runs no row was more than 0.05 above it; 0.3 means that
perplexity rises by a third."""

COLLAPSED = 0.1
"""Share of the experts that the counted tokens could reach. Healthy PEER, PKM and MoE layers stay above 0.15."""

SLOW, SLOW_ROWS = 0.5, 5
"""A throughput is low if the median of `SLOW_ROWS` rows is below `SLOW` times that of the rows before. A single slow
row can be due to a checkpoint or another program."""


class Watch:
    """Reads the rows of one run in order; a state that lasts is reported once, when it begins."""

    def __init__(self, n_experts: int = 0, per_token: int = 0) -> None:
        """Number of experts that the layer's router chooses among, and of choices per token (`FfnConfig.routed`)."""
        self.n_experts, self.per_token = n_experts, per_token
        self.losses: list[float] = []
        self.speeds: list[float] = []
        """Of the last `SLOW_ROWS` rows."""
        self.earlier_speeds: list[float] = []
        """Of all rows before, ascending, so that their median needs no sorting."""
        self.lasting: set[str] = set()

    def see(self, row: Mapping[str, float]) -> dict[str, str]:
        """The signals that begin with `row`: what happened, by kind."""
        found = {
            "loss spike": self._spike(row["loss"]),
            "router collapse": self._collapse(row),
            "throughput halved": self._slow(row["tokens_per_s"]),
        }
        begun = {kind: text for kind, text in found.items() if text and kind not in self.lasting}
        self.lasting = {kind for kind, text in found.items() if text}
        return {kind: f"step {row['step']}: {kind}, {text}" for kind, text in begun.items()}

    def _spike(self, loss: float) -> str:
        before, self.losses = self.losses, [*self.losses, loss][-WINDOW:]
        if not before or loss <= (usual := median(before)) + LOSS_JUMP:
            return ""
        return f"{loss:.3f} nats per token after {usual:.3f}, the median of the {len(before)} rows before"

    def _collapse(self, row: Mapping[str, float]) -> str:
        if "expert_usage" not in row or self.per_token >= self.n_experts:
            return ""
        # With few tokens not every expert can be used; if all tokens agree, only the choices of one token are used.
        reachable = min(1.0, row["usage_tokens"] * self.per_token / self.n_experts)
        threshold = max(COLLAPSED * reachable, self.per_token / self.n_experts)
        usage = row["expert_usage"]
        return "" if usage > threshold else f"{usage:.2%} of {self.n_experts} experts used; threshold {threshold:.2%}"

    def _slow(self, speed: float) -> str:
        self.speeds.append(speed)
        if len(self.speeds) > SLOW_ROWS:
            insort(self.earlier_speeds, self.speeds.pop(0))
        if len(self.earlier_speeds) < WINDOW or median(self.speeds) >= SLOW * (usual := median(self.earlier_speeds)):
            return ""
        return f"{median(self.speeds):.0f} tokens/s after {usual:.0f}"
