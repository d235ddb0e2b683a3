"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Plan:
    """Numbers of cgroups, requests, names and rounds, and seconds."""

    scale: str
    rounds: int
    released: int  # cgroups in a round at full speed
    paced: int  # cgroups in a round at a set rate
    burst: int
    alive: int
    idle: float
    inserted: int  # cgroups in a round
    waiting: int  # handlers
    asked: int  # requests of one kind in a round
    asking: int  # seconds for which clients ask in a round
    names: int
    delayed: int  # jobs


FULL: Final = Plan(
    "full",
    rounds=5,
    released=20_000,
    paced=6_000,
    burst=100_000,
    alive=50_000,
    idle=10,
    inserted=5_000,
    waiting=10_000,
    asked=500,
    asking=3,
    names=5_000,
    delayed=100,
)
QUICK: Final = Plan(
    "quick",
    rounds=2,
    released=4_000,
    paced=1_000,
    burst=10_000,
    alive=10_000,
    idle=2,
    inserted=2_000,
    waiting=2_000,
    asked=200,
    asking=1,
    names=500,
    delayed=20,
)
