"""Which bridges a TurboConn spec stands for on a program of so many visits, and what its options have to fulfil together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from depthpass.errors import PassError
from depthpass.limits import check_program
from depthpass.passes.base import require

if TYPE_CHECKING:
    from depthpass.passes.turboconn import TurboConn

PRESETS: dict[str, dict[str, Any]] = {
    "llama-1b": {"sources": (0, 15), "destinations": (0, 15), "min_span": 6},
    "llama-8b": {"sources": (6, 31), "destinations": (7, 26), "min_span": 7},
    "sparse": {"bridges": ((-1, 0),)},
}
ABOUT = {
    "llama-1b": "Llama-3.2-1B (16 blocks): 15 bridges from blocks 0, 2, .., 14 to 0, 2, .., 14, each over more than 5 blocks",
    "llama-8b": "Llama-3.1-8B (32 blocks): 45 bridges from blocks 6, 8, .., 30 to 7, 9, .., 25, each over more than 6 blocks",
    "sparse": "the paper's control, any model: one bridge from the last block to the first",
}
MIN_SPAN = 6


def check_turboconn(spec: TurboConn) -> None:
    """Check the options against each other.

    Raises:
        SpecError: naming the field.
    """
    n = spec.name
    require(spec.group >= 1, f"{n}.group", "at least 1 token", spec.group)
    require(spec.rank is None or spec.rank >= 1, f"{n}.rank", "at least 1", spec.rank,
            "Use null (None) for one full linear map.")
    require(spec.gain is None or spec.alpha == 100.0, f"{n}.gain", "either gain or alpha", (spec.gain, spec.alpha),
            "gain is 0.01 * alpha; leave one of them out.")
    require(spec.init_std > 0, f"{n}.init_std", "a positive number", spec.init_std,
            "With Down and Up both zero no gradient ever flows.")
    require(spec.wiring == "paper" or (spec.rank is not None and spec.write == "output"), f"{n}.wiring",
            "'paper' without a rank or with write='input'", spec.wiring, "The public code has neither.")
    require(spec.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", spec.scope)
    rule = {"stride": spec.stride != 2, "min_span": spec.min_span is not None,
            "sources": spec.sources is not None, "destinations": spec.destinations is not None}
    chosen = "bridges" if spec.bridges is not None else "preset"
    if spec.bridges is not None or spec.preset is not None:
        require(not any(rule.values()), f"{n}.{next((k for k, on in rule.items() if on), '')}",
                f"no rule beside {chosen}", [k for k, on in rule.items() if on], "Leave one of them out.")
        require(spec.bridges is None or spec.preset is None, f"{n}.preset", "either bridges or preset", spec.preset)
    require(spec.bridges != (), f"{n}.bridges", "at least one (source, destination) pair", [],
            "Leave the field out for the rule.")
    require(spec.stride >= 1, f"{n}.stride", "at least 1", spec.stride)
    require(spec.min_span is None or spec.min_span >= 1, f"{n}.min_span", "at least 1", spec.min_span,
            "A bridge leads from a higher to a lower block.")
    for field in ("sources", "destinations"):
        span = getattr(spec, field)
        require(span is None or 0 <= span[0] < span[1], f"{n}.{field}", "a half-open range 0 <= start < stop", span)


def resolve(spec: TurboConn, visits: int) -> tuple[tuple[int, int], ...]:
    """The bridges for a program of so many visits, all positions non-negative.

    Raises:
        PassError: a position out of range, a source that is not above its destination, a duplicate, or a rule
            that gives no bridge at all.
    """
    if spec.preset is not None:
        layout = PRESETS[spec.preset]
        if visits < (least := max(layout.get("sources", (0, 2)))):
            raise PassError(f"turboconn.preset: expected a program of at least {least} visits for {spec.preset!r}, "
                            f"got {visits}. Leave preset out for the rule, or give bridges.")
        return resolve(replace(spec, preset=None, **layout), visits)
    if spec.bridges is None:
        return _rule(spec, visits)
    bridges: list[tuple[int, int]] = []
    for given in spec.bridges:
        for position in given:
            if not -visits <= position < visits:
                raise PassError(f"turboconn.bridges: expected positions in 0..{visits - 1} (or negative ones from "
                                f"the end), got {position} in {given}: the program has {visits} visits.")
        source, destination = (p % visits for p in given)
        if source <= destination:
            raise PassError(f"turboconn.bridges: expected a source above its destination, got {given}"
                            f"{f', that is {(source, destination)}' if min(given) < 0 else ''}. "
                            "A bridge leads from a higher to a lower block.")
        if (source, destination) in bridges:
            raise PassError(f"turboconn.bridges: {(source, destination)} is given twice. Remove one of them.")
        bridges.append((source, destination))
    return tuple(bridges)


def _rule(spec: TurboConn, visits: int) -> tuple[tuple[int, int], ...]:
    for field in ("sources", "destinations"):
        if (span := getattr(spec, field)) is not None and span[1] > visits:
            raise PassError(f"turboconn.{field}: expected a range within 0..{visits}, got {span}: the program has "
                            f"{visits} visits. Give bridges or ranges that fit this model.")
    sources = range(*(spec.sources or (0, visits)), spec.stride)
    destinations = range(*(spec.destinations or (0, visits)), spec.stride)
    spans = [s - d for s in sources for d in destinations if s > d]
    least = spec.min_span if spec.min_span is not None else min(MIN_SPAN, max(spans, default=MIN_SPAN))
    check_program(visits, 5 * sum(span >= least for span in spans), "turboconn")
    bridges = tuple((s, d) for s in sources for d in destinations if s - d >= least)
    if not bridges:
        raise PassError(
            f"turboconn: the rule (stride {spec.stride}, min_span {least}, sources {list(sources)}, destinations "
            f"{list(destinations)}) gives no bridge on {visits} visits. Lower min_span"
            + (f" to at most {max(spans)}," if spans else " or stride,")
            + (" or give bridges such as [(-1, 0)]." if visits > 1 else " but a bridge needs at least two visits.")
        )
    return bridges


def feeds(spec: TurboConn, bridges: tuple[tuple[int, int], ...]) -> dict[tuple[int, int], tuple[int, int]]:
    """The bridge whose Down each bridge reads: its own, or as the public code has it.

    Raises:
        PassError: the public code could not run these bridges, or would feed them within a token.
    """
    if spec.wiring == "paper":
        return {b: b for b in bridges}
    last = bridges[-1][0]
    downs = [b for b in bridges if b[0] == last]
    fed_by = {}
    for i, b in enumerate(bridges):
        order = sum(other[0] == b[0] for other in bridges[:i])
        if order >= len(downs) or b[1] > last:
            why = (f"{b} lands above the source {last} of the last bridge" if b[1] > last else
                   f"{b} is bridge {order + 1} of its source, the last one's source {last} has {len(downs)}")
            raise PassError(f"turboconn.wiring: expected bridges that the public code can run, got {why}. Put a source with "
                            "as many bridges as any other, above every destination, last; or use wiring='paper'.")
        fed_by[b] = downs[order]
    return fed_by
