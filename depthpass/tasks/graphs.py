"""Graphs: reachability in a directed graph, the way through a maze."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.dags import TaskDAG
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task


def start(source: int) -> tuple[int, int]:
    return source, 0


def follow(at: tuple[int, int], edge: tuple[int, int]) -> tuple[int, int]:
    """(node, edges from the source) behind an edge that leaves a reached node."""
    return edge[1], at[1] + 1


def reached(target: int, *nodes: tuple[int, int]) -> str:
    return "yes" if any(n[0] == target for n in nodes) else "no"


@dataclass(frozen=True)
class Reachability(Task):
    """Whether node t of a directed graph of n nodes can be reached from node s, by breadth-first search; about half are.

    A state per node reached, which fetches the node it was reached from and the edge; the DAG of the trace is the search
    tree. All pairs by repeated squaring (the closed form) has depth ceil(log2 of the longest shortest path).
    """

    name: ClassVar[str] = "reachability"
    family: ClassVar[str] = "graphs"
    unit: ClassVar[str] = "nodes"
    ranges: ClassVar[dict] = {"S": (4, 10), "M": (11, 20), "L": (21, 50)}
    least: ClassVar[int] = 3

    def draw(self, length: int, rng: random.Random) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        names = rng.sample(range(length), length)
        cut = rng.randint(1, length - 1)
        edges = set()
        # Two parts, a random tree away from the first node of each; no edge leads from the first part to the second.
        for part in (names[:cut], names[cut:]):
            edges |= {(part[rng.randint(max(0, i - 3), i - 1)], part[i]) for i in range(1, len(part))}
        for _ in range(length // 2):
            a, b = sorted(rng.sample(range(length), 2), reverse=rng.random() < 0.5)
            if not (a < cut <= b):
                edges.add((names[a], names[b]))
        wanted = rng.random() < 0.5 and cut > 1
        target = rng.choice(names[1:cut] if wanted else names[cut:])
        listed = sorted(edges)
        rng.shuffle(listed)
        return names[0], target, tuple(listed)

    def show(self, problem: tuple[int, int, tuple[tuple[int, int], ...]]) -> str:
        s, t, edges = problem
        return f"from {s} to {t} : " + " ".join(f"{a}>{b}" for a, b in edges)

    def parse(self, prompt: str) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        head, _, edges = prompt.partition(" : ")
        start_word, s, to, t = head.split()
        if (start_word, to) != ("from", "to"):
            raise ValueError(prompt)
        pairs = [tuple(map(int, e.split(">"))) for e in edges.split()]
        if any(len(p) != 2 for p in pairs):
            raise ValueError(prompt)
        return int(s), int(t), tuple(pairs)  # type: ignore[return-value]

    def run(self, problem: tuple[int, int, tuple[tuple[int, int], ...]], tape: Tape) -> str:
        source, target, edges = problem
        cells = [tape.read(f"e{i}", e) for i, e in enumerate(edges)]
        goal = tape.read("t", target)
        queue: list[Cell] = [tape.step(f"n{source}", start, tape.read("s", source))]
        seen = {source}
        for at in queue:
            for (a, b), cell in zip(edges, cells):
                if a == at.value[0] and b not in seen:  # type: ignore[index]
                    seen.add(b)
                    queue.append(tape.step(f"n{b}", follow, at, cell))
        answer = tape.step("r0", reached, goal, queue[0])
        for i, at in enumerate(queue[1:], 1):
            answer = tape.step(f"r{i}", either, answer, goal, at)
        return str(answer.value)

    def shape(self, nodes: int, diameter: int | None = None) -> TaskDAG:
        """All pairs by repeated squaring."""
        from depthpass.tasks.shapes import reachability

        return reachability(nodes, diameter)


def either(before: str, target: int, at: tuple[int, int]) -> str:
    return before if before == "yes" else reached(target, at)


MOVES = {"U": (-1, 0), "R": (0, 1), "D": (1, 0), "L": (0, -1)}


def step_on(at: tuple[int, int, int], row: int, column: int) -> tuple[int, int, int]:
    return row, column, at[2] + 1


def enter(row: int, column: int) -> tuple[int, int, int]:
    return row, column, 0


def letter(at: tuple[int, int, int], back: tuple[int, int, int]) -> str:
    """The move that led from ``back`` to ``at``."""
    return next(k for k, (r, c) in MOVES.items() if (back[0] + r, back[1] + c) == at[:2])


def before(move: str, moves: str) -> str:
    return move + moves


def last(move: str) -> str:
    return move


@dataclass(frozen=True)
class Maze(Task):
    """The way from S to G through a maze without cycles, as moves U, R, D, L (the only one that enters no room twice).

    ``n`` by ``n`` rooms, printed as a grid of (2 n + 1) by (2 n + 1) characters, # for walls. Breadth-first search from S
    until G is found, then the way back.
    """

    name: ClassVar[str] = "maze"
    family: ClassVar[str] = "graphs"
    unit: ClassVar[str] = "rooms on a side"
    ranges: ClassVar[dict] = {"S": (2, 4), "M": (5, 7), "L": (8, 12)}
    least: ClassVar[int] = 2

    def draw(self, length: int, rng: random.Random) -> tuple[str, ...]:
        size = 2 * length + 1
        grid = [["#"] * size for _ in range(size)]
        rooms = [(2 * r + 1, 2 * c + 1) for r in range(length) for c in range(length)]
        stack = [rng.choice(rooms)]
        grid[stack[0][0]][stack[0][1]] = "."
        while stack:  # depth-first carving
            r, c = stack[-1]
            near = [(r + 2 * dr, c + 2 * dc) for dr, dc in MOVES.values()]
            shut = [(y, x) for y, x in near if 0 < y < size and 0 < x < size and grid[y][x] == "#"]
            if not shut:
                stack.pop()
                continue
            y, x = rng.choice(shut)
            grid[(r + y) // 2][(c + x) // 2] = grid[y][x] = "."
            stack.append((y, x))
        for mark, (r, c) in zip("SG", rng.sample(rooms, 2)):
            grid[r][c] = mark
        return tuple(map("".join, grid))

    def show(self, problem: tuple[str, ...]) -> str:
        return "maze\n" + "\n".join(problem)

    def parse(self, prompt: str) -> tuple[str, ...]:
        word, *rows = prompt.split()
        if word != "maze" or len({len(r) for r in rows}) != 1 or any("".join(rows).count(x) != 1 for x in "SG"):
            raise ValueError("expected 'maze' and rows of one length with one S and one G")
        return tuple(rows)

    def run(self, problem: tuple[str, ...], tape: Tape) -> str:
        where = {x: divmod("".join(problem).index(x), len(problem[0])) for x in "SG"}
        rows, columns = tape.row("r", range(len(problem))), tape.row("c", range(len(problem[0])))
        (r, c), goal = where["S"], where["G"]
        at = {where["S"]: tape.step(f"a{r}_{c}", enter, rows[r], columns[c])}
        origin: dict[tuple[int, int], tuple[int, int]] = {}
        queue = [where["S"]]
        for r, c in queue:
            for dr, dc in MOVES.values():
                y, x = place = r + dr, c + dc
                if 0 <= y < len(problem) and 0 <= x < len(problem[0]) and problem[y][x] != "#" and place not in at:
                    at[place] = tape.step(f"a{y}_{x}", step_on, at[r, c], rows[y], columns[x])
                    origin[place] = (r, c)
                    queue.append(place)
            if goal in at:
                break
        else:
            raise ValueError("G cannot be reached from S")
        moves: Cell | None = None
        while goal != where["S"]:
            move = tape.step(f"m{goal[0]}_{goal[1]}", letter, at[goal], at[origin[goal]])
            name, goal = f"p{goal[0]}_{goal[1]}", origin[goal]
            moves = tape.step(name, last, move) if moves is None else tape.step(name, before, move, moves)
        return str(moves.value) if moves else ""
