"""Progress of a run: all that resuming needs besides weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TrainState:
    """The state of a run after ``step`` updates."""

    step: int = 0
    consumed_rows: int = 0
    """Rows of the training mix that have been read. This is the data position, at any data-parallel size."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    """Tokens that are not padding."""
    data: str = ""
    """Fingerprint of the rows and of their order. A run does not continue with another one."""
    skipped_steps: int = 0
    """Updates that were skipped on all ranks because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, those since the last step that changed the weights."""

    def advanced(self, *, rows: int, samples: int, tokens: int, skipped: bool) -> TrainState:
        """Return the state after one more step."""
        return replace(
            self,
            step=self.step + 1,
            consumed_rows=self.consumed_rows + rows,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_steps=self.skipped_steps + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
        )
