"""Programs of the published systems, written as text: what no pass is needed for."""

from __future__ import annotations

from collections.abc import Sequence

from depthpass.ir import Program, parse_program, verify

Bridge = tuple[int, int, int]
"""(source, destination, delay): from the output of block ``source`` to that of block ``destination``."""


class Text:
    """Writes program text line by line."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.slots, self.lines, self.count = blocks, 0, [], 0
        self.embed = self.emit("embed")

    def emit(self, line: str) -> str:
        self.count += 1
        self.lines.append(f"  %{self.count} = {line}")
        return f"%{self.count}"

    def visit(self, block: int, x: str, attrs: str = "") -> str:
        self.slots += 1
        return self.emit(f"block {block} ({x}) slot {self.slots - 1} {attrs}")

    def run(self, blocks: Sequence[int], x: str) -> str:
        for block in blocks:
            x = self.visit(block, x)
        return x

    def line(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def end(self, x: str) -> Program:
        self.line(f"output {self.emit(f'norm ({x})')}")
        return verify(parse_program("\n".join([f"program M blocks={self.blocks} width=8", *self.lines])))


def bridged(blocks: int, bridges: Sequence[Bridge], *, on_input: bool = False, pads: int = 0) -> Program:
    """TurboConn: bridges added on the output of the destination block, or on its input."""
    t = Text(blocks)
    x = t.embed if not pads else t.emit(f"pad {pads} (%1)")
    captured: dict[Bridge, str] = {b: f"%c{i}" for i, b in enumerate(bridges)}

    def add(x: str, landing: list[Bridge]) -> str:
        ups = [t.emit(f"linear u{captured[b][1:]} ({t.emit(f'delay {b[2]} ({captured[b]})')}) out 8") for b in landing]
        return t.emit(f"add ({', '.join([x, *ups])})") if ups else x

    for block in range(blocks):
        here = [b for b in bridges if b[1] == block]
        x = t.visit(block, add(x, here)) if on_input else add(t.visit(block, x), here)
        for b in bridges:
            if b[0] == block:
                t.line(f"{captured[b]} = linear d{captured[b][1:]} ({x}) out 2")
    return t.end(x)


def parallel_loops(blocks: int, loops: int, *, shift: bool = True, window: int | None = 2) -> Program:
    t = Text(blocks)
    x, last, first = t.embed, "", 0
    for r in range(loops):
        if r:
            carried = t.emit(f"delay 1 ({last})") if shift else last
            x = t.emit(f"add ({t.embed}, {carried})") if shift else carried
        for block in range(blocks):
            gated = f"keys {block} gate g{block} window {window}" if r and window else ""
            x = t.visit(block, x, gated if r else "")
        last = x
        t.line(f"tap loop{first + r} ({x})")
    return t.end(x)


def jacobi(blocks: int, sweeps: int, s: int, d: int, g: int) -> Program:
    t = Text(blocks)
    base = t.run(range(d + 1), t.embed)
    top = t.run(range(d + 1, s + 1), base)
    for _ in range(sweeps - 1):
        x = t.emit(f"add ({base}, {t.emit(f'delay {g} ({top})')})")
        top = t.run(range(d + 1, s + 1), x)
    return t.end(t.run(range(s + 1, blocks), top))


def recursions(middle: int, count: int, rule: str) -> Program:
    """MoR, Middle-Cycle, nested routes."""
    t = Text(middle + 2)
    x, route = t.visit(0, t.embed), ""
    for r in range(count):
        seen = t.emit(f"gather ({x}, {route})") if route else x
        score = t.emit(f"linear score{r} ({seen}) out 1 bias false")
        capacity = f"capacity {(count - r) / count}" if rule == "topk" else ""
        route = t.emit(f"route {rule} ({', '.join(filter(None, [score, route]))}) {capacity}")
        weight = t.emit(f"act sigmoid ({score})") if not r else ""
        sub = t.run(range(1, middle + 1), t.emit(f"gather ({x}, {route})"))
        if weight:
            sub = t.emit(f"mul ({sub}, {t.emit(f'gather ({weight}, {route})')})")
        x = t.emit(f"scatter ({x}, {sub}, {route})")
    return t.end(t.visit(middle + 1, x))


def thinking(blocks: int, deep: Sequence[int], steps: int) -> Program:
    """ITT: extra thinking steps at some layers."""
    t = Text(blocks)
    x = t.embed
    for block in range(blocks):
        y = t.visit(block, x)
        acc = t.emit(f"weigh phi{block}.0 ({y})") if block in deep else y
        for k in range(1, steps if block in deep else 1):
            route = t.emit(f"route topk ({t.emit(f'linear r{block}.{k} ({acc}) out 1')}) capacity 0.5 rounding ceil")
            z = t.visit(block, t.emit(f"gather ({acc}, {route})"))
            acc = t.emit(f"scatter ({acc}, {t.emit(f'scale 0.5 ({z})')}, {route})")
        x = acc
    return t.end(x)


def looped(prelude: int, core: int, coda: int, loops: int, *, shared_keys: bool = False) -> Program:
    t = Text(prelude + core + coda)
    x = t.run(range(prelude), t.embed)
    for loop in range(loops):
        for block in range(prelude, prelude + core):
            x = t.visit(block, x, f"keys {block}" if loop and shared_keys else "")
    return t.end(t.run(range(prelude + core, prelude + core + coda), x))


def listed(blocks: int, visits: Sequence[int]) -> Program:
    t = Text(blocks)
    return t.end(t.run(visits, t.embed))


def encoder_decoder_feedback(encoder: int, decoder: int) -> Program:
    """RLT, interval 1: u = enc(x) + W s[t-1], s = dec(u)."""
    t = Text(encoder + decoder)
    x = t.run(range(encoder), t.embed)
    u = t.emit(f"add ({x}, {t.emit('delay 1 (%state)')})")
    s = t.run(range(encoder, encoder + decoder), u)
    t.line(f"%state = linear w ({s}) out 8")
    return t.end(s)
