"""TAIL, iteration: population growth (arXiv 2507.13332). How a problem reads is ours."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.simulation import TAIL
from depthpass.tasks.tape import Tape
from depthpass.tasks.task import Task


def births(population: int, percent: int) -> int:
    return population * percent // 100


def grow(population: int, born: int, died: int, arrived: int) -> int:
    return max(0, population + born - died + arrived)


@dataclass(frozen=True)
class PopulationGrowth(Task):
    """A population after n years: every year a percentage is born (rounded down), so many die and so many arrive."""

    name: ClassVar[str] = "population_growth"
    family: ClassVar[str] = "iteration"
    unit: ClassVar[str] = "years"
    ranges: ClassVar[dict] = {"S": (1, 10), "M": (11, 25), "L": (26, 50)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[int, int, int, int, int]:
        return length, rng.randint(50, 500), rng.randint(1, 9), rng.randint(0, 20), rng.randint(0, 20)

    def show(self, problem: tuple[int, int, int, int, int]) -> str:
        return "population {1} born {2} % died {3} arrived {4} years {0}".format(*problem)

    def parse(self, prompt: str) -> tuple[int, int, int, int, int]:
        words = prompt.split()
        if words[::2][:2] != ["population", "born"] or words[4] != "%" or words[5::2] != ["died", "arrived", "years"]:
            raise ValueError(prompt)
        return int(words[10]), int(words[1]), int(words[3]), int(words[6]), int(words[8])

    def run(self, problem: tuple[int, int, int, int, int], tape: Tape) -> str:
        years, *numbers = problem
        population, percent, died, arrived = (tape.read(k, v) for k, v in zip(("p", "b", "d", "a"), numbers))
        for year in range(1, years + 1):
            born = tape.step(f"b{year}", births, population, percent)
            population = tape.step(f"p{year}", grow, population, born, died, arrived)
        return str(population.value)
