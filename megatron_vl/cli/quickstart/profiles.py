"""Sizes of the quickstart: a smoke test, the quickstart itself, and the longer run that learns well.

Numbers of steps are chosen for two cores without GPU; the recipes (examples/tiny) hold everything else. Every stage
trains its last ``hand_over`` steps at another layout than the rest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Sizes of one way to run the pipeline."""

    name: str
    title: str
    train_scenes: int
    """Rendered training images of all families together."""
    heldout_scenes: int
    stage_steps: tuple[int, int, int, int]
    """Training steps of stages 0 to 3."""
    hand_over: int
    """Last steps of stages 1 to 3, at another layout."""
    save_interval: int
    """Steps between checkpoints: the most that an interruption loses."""
    questions: int
    """Held-out questions of each task."""


PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        name="smoke",
        title="Smoke test of the quickstart",
        train_scenes=1500,
        heldout_scenes=300,
        stage_steps=(30, 40, 40, 40),
        hand_over=10,
        save_interval=1000,
        questions=16,
    ),
    "quickstart": Profile(
        name="quickstart",
        title="Quickstart: a tiny Qwen-VL through its three stages",
        train_scenes=20000,
        heldout_scenes=1000,
        stage_steps=(400, 300, 700, 80),
        hand_over=30,
        save_interval=1000,
        questions=150,
    ),
    "learn": Profile(
        name="learn",
        title="A tiny Qwen-VL that learns to see",
        train_scenes=60000,
        heldout_scenes=3000,
        stage_steps=(800, 600, 6500, 150),
        hand_over=50,
        save_interval=100,
        questions=400,
    ),
}
