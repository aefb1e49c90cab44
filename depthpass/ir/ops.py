"""The op set of the depth IR: one table that the verifier, printer, parser, analyses and lowering all read.

A program is a list of ops in single-assignment form over *streams* (``[batch, tokens, width]``). Only ``delay``
may name a value defined later, so every cycle passes through a delay of at least one token, which is causality.

===========  ====================================================================================================
kind         meaning (x, y are streams, r a route)
===========  ====================================================================================================
embed        the stream that enters the first block of the stock model
zeros/noise  an initial state: zeros, or normal noise of standard deviation ``std``, cut off at ``cut`` of them (Huginn);
             ``pads``: of a row that has so many pad tokens
block        one *visit* of a physical block. ``slot`` is its own KV cache; ``keys`` names the slot it reads instead
             of its own (shared KV); ``past`` names the slot whose entries of *earlier calls* it reads instead of its
             own ones, which then do not outlive a call; ``gate`` + ``window`` mix ``keys`` and own ones,
             g*Attn(keys) + (1-g)*Attn(own last W) (PLT); ``gate_init`` is the gate's bias at the start;
             ``lora`` names a low-rank update, which starts as the best one towards the weights of block ``untied``;
             ``modulate`` names factors [g_a, g_m, s_a, s_m] of the width: what the attention (a) and MLP (m) branch
             read is scaled by 1 + s, what they add by ``base`` + g. With ``clock`` the factors are a linear map of that
             time encoder at ``step``, else parameters of their own;
             with a route as second argument only its tokens ask (queries, MLP), while keys and values come from every
             token of the stream; the result holds the routed ones. ``memory``: the second argument is a stream, which keys and
             values come from instead of the first, at the same positions (Feedback Transformer). ``part attention``: the
             stream plus what the attention branch adds, without the feed-forward network. ``update``: of routed tokens, whose
             own keys stand in place of theirs among those of ``keys``, for this visit's own eyes (MoR)
point        (x, a), a the attention part of a block and x its input: the stream that its feed-forward branch reads, which is a,
             or x where the two branches run beside each other
ffn          (a, y) of a physical block: a plus what its feed-forward branch makes of y; of y = the point the rest of a visit
delay        the stream n tokens earlier in the same row; *absent* before the row's first real token. ``group``: at the last token
             of the group of so many tokens before, groups being counted from the row's first real token
linear       a learned affine map; several arguments are concatenated along the width first. ``identity``: starts as
             its last argument
weigh        times a learned vector of the stream's width
scale        times a constant
add, mul     sum, product; a stream of width 1 broadcasts; an absent summand adds nothing. ``lands``: of a sum that a bridge
             makes between two visits, whether it lands on the ``output`` of the first, so that who reads the stream after
             that visit reads the sum, or on the ``input`` of the second
act          an elementwise function (sigmoid, silu, tanh, gelu), or ``softmax`` over the width
pick         one column of a stream, counted from 0
rms          root-mean-square norm without a gain (with a learned one when named)
rescale      brought to a root mean square of 1, by a factor of at most ``limit``, through which no gradient flows (T2MLR)
norm         the stock model's own final norm
logits       the stock model's own head, of vocabulary ``width``; of a stream that ``norm`` has passed
distance     how far a stream has moved, (now, before), as a stream of width 1: |now - before| / |now| (``state``),
             1 - cos(now, before) (``cosine``), or of logits KL(softmax before || softmax now) (``kl``), |entropy now -
             entropy before| (``entropy``), 1 where the largest one stands elsewhere, else 0 (``argmax``)
route        a choice of tokens from a score of width 1 (or R for rule ``choice``): the top max(1, floor or ceil of
             ``capacity`` times the row's real tokens), those with a score of at least ``threshold`` (rule
             ``above``: of more than that), those whose largest score stands at place ``depth`` or later (from 1); a
             route as second argument is the set to choose from. ``label`` is the name that its ratio is set by at run
             time. ``bias`` names a vector that is added to the scores of rule ``choice`` for the choice alone; with
             ``rate`` every training pass moves it by so much towards the places that are chosen less than the mean
gather       the routed tokens of a stream
scatter      put routed tokens back: ``mode add`` adds them to the base stream, ``mode replace`` overwrites
pad, trim    insert m pad tokens after every row's prompt (``at``: after its first so many real tokens; ``behind``: after the
             first token with this id), with the embedding of ``token``, else of the model's own pad token; ``feed``: each
             with the program's normed output at the token before as its embedding (Coconut's latents), so that they run
             one after another; drop them again: the token before them gets what the last pad has
select       of T candidate streams with exit gates, the first whose cumulative exit probability reaches ``cdf``
detach       the same stream, through which no gradient flows back
tap          name a stream (``head true``: as logits) or a route so that it is handed out with the outputs
loss         a training loss, ``coefficient`` times a mean over real tokens, called ``name`` (losses of one name are
             summed). ``bce (score, route)``: cross-entropy of the score of width 1 as a logit, against whether the route
             took the token, over the tokens it chose from; without a route all were taken. ``balance (p)``: R sum_j f_j
             mean(p_j), f_j the share of tokens whose largest entry is j. ``z (score, route)``: logsumexp over the width,
             squared, over the tokens that the route chose from; without a route over all
average      before anything runs, a block's weights become the mean of those of ``blocks``
retire       a block that no visit runs: its weights are kept under their stock names and do not train
ahead        attention of every visit sees later tokens: the whole row (0), or up to the end of a token's own block of so many
             tokens, counted from the row's first real token; windows then reach so far in both directions
denoise      the program runs ``steps`` times (for every block, with ``ahead``): after each, tokens are written into the
             positions that ``order`` chooses among those that hold ``token``, the mask; only their ids, log2 of the
             vocabulary in bits each, reach the next step, and ``carry`` values per token of a continuous state beside them
output       the stream that goes to the head of the stock model
===========  ====================================================================================================

Below the pass level a ``block`` is three ops, ``keys``, ``attend`` and ``finish``: see :mod:`.visit_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from depthpass.errors import SpecError
from depthpass.ir.definitions import Attr, AttrDef, OpDef
from depthpass.ir.local_ops import ACTIVATIONS, DISTANCES, LOCAL_OPS
from depthpass.ir.structural_ops import LOSS_RULES, ROUTE_RULES, SCATTER_MODES, STRUCTURAL_OPS
from depthpass.ir.visit_parts import PARTS

if TYPE_CHECKING:
    from depthpass.ir.program import Op

__all__ = [
    "ACTIVATIONS", "DISTANCES", "LOSS_RULES", "OPS", "PARTS", "ROUTE_RULES", "SCATTER_MODES", "Attr", "AttrDef", "OpDef",
    "definition", "register", "unfit",
]

OPS: dict[str, OpDef] = {d.kind: d for d in (*STRUCTURAL_OPS, *LOCAL_OPS)}


def definition(kind: str) -> OpDef:
    """The definition of an op of programs, or of a part that a visit has in lowered ones."""
    return PARTS[kind] if kind in PARTS else OPS[kind]


def unfit(ops: Iterable[Op], place: str) -> str | None:
    """Why some ops may not stand somewhere (a chunk, a compiled token, a sweep), naming the first; None = they may.

    The one rule of what a level can run; a model may have reasons of its own (hooks, dropout).
    """
    for o in ops:
        if place not in OPS[o.kind].legal:
            return f"op {o.kind} in {place}"
        if reason := OPS[o.kind].refuses(o, place):
            return reason
    return None


def register(definition: OpDef) -> OpDef:
    """Add an op that looks at one token only; programs may then use it, and every analysis and executor knows it.

    Args:
        definition: with a ``meaning``, and ``parameters`` where it has some.

    Raises:
        SpecError: the kind is taken or no name, the op has no meaning, or its parameters have no attribute that names them.
    """
    kind = definition.kind
    if kind in OPS or kind in PARTS:
        raise SpecError(f"op {kind!r}: expected a name that no op has, got that of one. Choose another.")
    if not kind.isidentifier():
        raise SpecError(f"op {kind!r}: expected a name of letters, digits and '_'.")
    if definition.meaning is None or not definition.token_local or definition.typed is not None:
        raise SpecError(f"op {kind!r}: expected an op that looks at one token only, with a meaning in plain torch. Ops that "
                        "choose or mix tokens are part of the IR itself.")
    scopes = [a for a in definition.attrs.values() if a.scope]
    if len(scopes) > 1 or (not scopes and definition.parameters is not OpDef("").parameters):
        raise SpecError(f"op {kind!r}: expected one attribute with scope=True, which names its parameters, got {len(scopes)}.")
    OPS[kind] = definition
    return definition
