"""What the kernels of slot attention are made of: which keys a query sees, rows of tiles, logits."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (a kernel's constexpr arguments are plain values to its caller, which triton's types do not say)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _program(tiles):
    """Split the first grid axis, the only one without a small limit; neighbours in it share keys."""
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def _origin(ROW_START, row, CHUNK: tl.constexpr):
    """First column of a chunk, reduced to [0, CHUNK): all divisions below are of non-negative numbers."""
    if CHUNK > 0 and ROW_START is not None:
        start = tl.load(ROW_START + row).to(tl.int32) % CHUNK
        return (start + CHUNK) % CHUNK
    else:
        return 0


@triton.jit
def _first_key(i, origin, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First key column that query column i sees (may be negative)."""
    first = i * 0
    if WINDOW > 0:
        first = tl.maximum(first, i - (WINDOW - 1))
    if CHUNK > 0:
        first = tl.maximum(first, (i + CHUNK - origin) // CHUNK * CHUNK - CHUNK + origin)
    return first


@triton.jit
def _last_query(j, last, origin, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Last query column that sees key column j, at most `last`."""
    if WINDOW > 0:
        last = tl.minimum(last, j + (WINDOW - 1))
    if CHUNK > 0:
        last = tl.minimum(last, (j + CHUNK - origin) // CHUNK * CHUNK + origin - 1)
    return last


@triton.jit
def _query_start(Q_OFFSET, q_start):
    if Q_OFFSET is not None:
        q_start += tl.load(Q_OFFSET).to(tl.int32)
    return q_start


@triton.jit
def _load(base, index, stride, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UP: tl.constexpr):
    """Load rows `index` of a matrix with `WIDTH` contiguous columns as [.., BLOCK]; masked rows read 0."""
    d = tl.arange(0, BLOCK)
    mask = mask[:, None]
    if BLOCK != WIDTH:
        mask = mask & (d < WIDTH)[None, :]
    x = tl.load(base + index.to(tl.int64)[:, None] * stride + d[None, :], mask, 0.0)
    if UP:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(base, index, stride, x, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    mask = mask[:, None]
    if BLOCK != WIDTH:
        mask = mask & (d < WIDTH)[None, :]
    tl.store(base + index.to(tl.int64)[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask)


@triton.jit
def _live_keys(VALID, keys, low, high):
    """Keys of a block that some query of the tile may see; the others are not even loaded."""
    live = (keys >= low) & (keys < high)
    if VALID is not None:
        live = live & (tl.load(VALID + keys, live, 0) != 0)
    return live


@triton.jit
def _logits(dots, scale, SOFTCAP: tl.constexpr):
    """Base-2 logits of raw dot products."""
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (e^2x + 1), with saturation instead of overflow
        return SOFTCAP * LOG2E * (1 - 2 / (tl.exp2(dots * (2 * LOG2E * scale / SOFTCAP)) + 1))
    else:
        return dots * (scale * LOG2E)


@triton.jit
def _slope(logits, SOFTCAP: tl.constexpr):
    """Derivative of the capped logit by the uncapped one, from the base-2 logit."""
    squashed = logits * (1 / (SOFTCAP * LOG2E))
    return 1 - squashed * squashed


@triton.jit
def _share(low, high, split, SPLITS: tl.constexpr, BN: tl.constexpr):
    """First key, and the one behind the last, of one of SPLITS shares of the key blocks."""
    begin, end = low // BN * BN, high
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(high - begin, BN), SPLITS) * BN
        begin += split * share
        end = tl.minimum(high, begin + share)
    return begin, end
