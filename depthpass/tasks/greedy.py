"""TAIL, greedy: Dijkstra's shortest paths, jobs on several machines (arXiv 2507.13332). How a problem reads is ours."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.simulation import TAIL
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task

FAR = "inf"


def nearer(a: tuple, b: tuple) -> tuple:
    """Of two (node, distance) the nearer one, the first on a tie."""
    return b if b[1] != FAR and (a[1] == FAR or b[1] < a[1]) else a


def entry(node: int, distance, chosen: tuple | None = None) -> tuple:
    """A node that is still open after the last choice, with its distance."""
    return node, distance


def relax(chosen: tuple, weight: int, old):
    if chosen[1] == FAR:
        return old
    new = chosen[1] + weight
    return new if old == FAR or new < old else old


def start() -> int:
    return 0


def far() -> str:
    return FAR


@dataclass(frozen=True)
class Dijkstra(Task):
    """Length of a shortest path from node 0 to node n - 1 of a weighted undirected connected graph.

    In each round the nearest open node is found pair by pair, then its open neighbours are relaxed. Everything that follows
    a choice fetches it.
    """

    name: ClassVar[str] = "dijkstra"
    family: ClassVar[str] = "greedy"
    unit: ClassVar[str] = "nodes"
    ranges: ClassVar[dict] = {"S": (3, 5), "M": (6, 10), "L": (11, 20)}
    least: ClassVar[int] = 2
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        names = list(range(length))
        rng.shuffle(names)
        pairs = {(names[rng.randrange(i)], names[i]) for i in range(1, length)}  # a random tree keeps it connected
        for _ in range(length):
            first, second = rng.sample(range(length), 2)
            pairs.add((first, second))
        edges = {(min(p), max(p)) for p in pairs}
        return length, tuple((a, b, rng.randint(1, 9)) for a, b in sorted(edges))

    def show(self, problem: tuple[int, tuple[tuple[int, int, int], ...]]) -> str:
        return f"shortest {problem[0]} nodes : " + " ".join(f"{a}-{b}={w}" for a, b, w in problem[1])

    def parse(self, prompt: str) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        head, _, edges = prompt.partition(" : ")
        word, n, nodes = head.split()
        arcs = tuple((*map(int, e.split("=")[0].split("-")), int(e.split("=")[1])) for e in edges.split())
        if (word, nodes) != ("shortest", "nodes") or any(not 0 <= v < int(n) for a, b, _ in arcs for v in (a, b)):
            raise ValueError(prompt)
        return int(n), arcs  # type: ignore[return-value]

    def run(self, problem: tuple[int, tuple[tuple[int, int, int], ...]], tape: Tape) -> str:
        n, edges = problem
        weights = {(a, b): tape.read(f"w{a}_{b}", w) for a, b, w in edges}
        nodes = tape.row("n", range(n))
        distance: list[Cell] = [tape.step(f"d0_{v}", far if v else start) for v in range(n)]
        todo, last = list(range(n)), []
        for turn in range(n):
            entries = [tape.step(f"e{turn}_{v}", entry, nodes[v], distance[v], *last) for v in todo]
            best = entries[0]
            for v, other in zip(todo[1:], entries[1:]):
                best = tape.step(f"m{turn}_{v}", nearer, best, other)
            chosen, last = best.value[0], [best]
            if chosen == n - 1:
                return str(best.value[1])
            todo.remove(chosen)
            for v in todo:
                weight = weights.get((min(v, chosen), max(v, chosen)))
                if weight is not None:
                    distance[v] = tape.step(f"d{turn + 1}_{v}", relax, best, weight, distance[v])
        raise ValueError("the graph does not reach its last node")


def less_loaded(a: tuple, b: tuple) -> tuple:
    return b if b[1] < a[1] else a


def load(chosen: tuple, machine: int, job: int, before: int) -> int:
    return before + job if chosen[0] == machine else before


def longest(a: int, b: int) -> int:
    return max(a, b)


@dataclass(frozen=True)
class MultiMachine(Task):
    """n jobs, each given in turn to the machine with the least load (the first on a tie): the load of the fullest one."""

    name: ClassVar[str] = "multi_machine"
    family: ClassVar[str] = "greedy"
    unit: ClassVar[str] = "jobs"
    ranges: ClassVar[dict] = {"S": (5, 10), "M": (11, 20), "L": (21, 50)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[int, tuple[int, ...]]:
        return rng.randint(2, 4), tuple(rng.randint(1, 20) for _ in range(length))

    def show(self, problem: tuple[int, tuple[int, ...]]) -> str:
        return f"machines {problem[0]} jobs " + " ".join(map(str, problem[1]))

    def parse(self, prompt: str) -> tuple[int, tuple[int, ...]]:
        word, machines, jobs_word, *jobs = prompt.split()
        if (word, jobs_word) != ("machines", "jobs") or int(machines) < 1 or not jobs:
            raise ValueError(prompt)
        return int(machines), tuple(map(int, jobs))

    def run(self, problem: tuple[int, tuple[int, ...]], tape: Tape) -> str:
        machines, jobs = tape.row("m", range(problem[0])), tape.row("j", problem[1])
        loads = [tape.step(f"l0_{m}", start) for m in range(len(machines))]
        for turn, job in enumerate(jobs, 1):
            best = tape.step(f"c{turn}_0", entry, machines[0], loads[0])
            for m in range(1, len(machines)):
                other = tape.step(f"e{turn}_{m}", entry, machines[m], loads[m])
                best = tape.step(f"c{turn}_{m}", less_loaded, best, other)
            loads = [tape.step(f"l{turn}_{m}", load, best, machines[m], job, loads[m]) for m in range(len(machines))]
        top = loads[0]
        for m in range(1, len(machines)):
            top = tape.step(f"top{m}", longest, top, loads[m])
        return str(top.value)
