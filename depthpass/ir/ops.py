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
             ``lora`` names a low-rank update; ``modulate`` names factors [g_a, g_m, s_a, s_m] of the width: what the
             attention (a) and MLP (m) branch read is scaled by 1 + s, what they add by ``base`` + g. With ``clock``
             the factors are a linear map of that time encoder at ``step``, else parameters of their own;
             with a route as second argument only its tokens ask (queries, MLP), while keys and values come from every
             token of the stream; the result holds the routed ones
delay        the stream n tokens earlier in the same row; *absent* before the row's first real token
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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Attr = int | float | bool | str | tuple["Attr", ...]

ACTIVATIONS = ("sigmoid", "silu", "tanh", "gelu", "relu", "softmax")
ROUTE_RULES = ("topk", "threshold", "above", "choice")
DISTANCES = ("state", "cosine", "kl", "entropy", "argmax")
LOSS_RULES = ("bce", "balance", "z")
SCATTER_MODES = ("add", "replace")


@dataclass(frozen=True)
class AttrDef:
    """One attribute of an op: its type and, when optional, its default (which the printer leaves out)."""

    type: type
    default: Attr | None = None
    required: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpDef:
    """Shape of one op kind.

    Attributes:
        lead: attribute printed right after the kind (``block 3``, ``delay 4``), or None.
        args: smallest and largest number of stream arguments (None = any).
        forward_refs: whether arguments may be defined later (only ``delay``).
        token_local: whether token i of the result depends on token i of the arguments only.
        defines: whether the op has a result.
    """

    kind: str
    lead: str | None = None
    args: tuple[int, int | None] = (1, 1)
    attrs: Mapping[str, AttrDef] = field(default_factory=dict)
    forward_refs: bool = False
    token_local: bool = True
    defines: bool = True


def _def(
    kind: str,
    lead: str | None = None,
    arity: tuple[int, int | None] = (1, 1),
    /,
    *,
    forward_refs: bool = False,
    token_local: bool = True,
    defines: bool = True,
    **attrs: AttrDef,
) -> OpDef:
    return OpDef(kind, lead, arity, attrs, forward_refs, token_local, defines)


_REQ_INT = AttrDef(int, required=True)
_REQ_NAME = AttrDef(str, required=True)

OPS: dict[str, OpDef] = {
    d.kind: d
    for d in (
        _def("embed", None, (0, 0)),
        _def("zeros", None, (0, 0), width=AttrDef(int), pads=AttrDef(int, 0)),
        _def("noise", "std", (0, 0), std=AttrDef(float, required=True), width=AttrDef(int), cut=AttrDef(float),
             pads=AttrDef(int, 0)),
        _def(
            "block", "index", (1, 2), token_local=False,
            index=_REQ_INT, slot=_REQ_INT, keys=AttrDef(int), past=AttrDef(int), gate=AttrDef(str), window=AttrDef(int),
            gate_input=AttrDef(str, "query", choices=("query", "hidden")), gate_init=AttrDef(float, 0.0),
            lora=AttrDef(str), lora_rank=AttrDef(int), modulate=AttrDef(str), clock=AttrDef(str),
            step=AttrDef(int, 0), base=AttrDef(float, 1.0),
        ),
        _def("delay", "tokens", tokens=_REQ_INT, forward_refs=True, token_local=False),
        _def(
            "linear", "name", (1, None),
            name=_REQ_NAME, out=_REQ_INT, bias=AttrDef(bool, True), init=AttrDef(float, 0.02),
            identity=AttrDef(bool, False),
        ),
        _def("weigh", "name", name=_REQ_NAME, init=AttrDef(float, 1.0)),
        _def("scale", "by", by=AttrDef(float, required=True)),
        _def("add", None, (2, None), lands=AttrDef(str, "output", choices=("output", "input"))),
        _def("mul", None, (2, 2)),
        _def("act", "fn", fn=AttrDef(str, required=True, choices=ACTIVATIONS)),
        _def("rms", name=AttrDef(str), eps=AttrDef(float, 1e-6)),
        _def("norm"),
        _def("logits", "width", width=_REQ_INT),
        _def("distance", "rule", (2, 2), rule=AttrDef(str, required=True, choices=DISTANCES)),
        _def(
            "route", "rule", (1, 2), token_local=False,
            rule=AttrDef(str, required=True, choices=ROUTE_RULES),
            capacity=AttrDef(float), rounding=AttrDef(str, "floor", choices=("floor", "ceil")),
            threshold=AttrDef(float, 0.5), depth=AttrDef(int), label=AttrDef(str), bias=AttrDef(str),
            rate=AttrDef(float),
        ),
        _def("pick", "index", index=_REQ_INT),
        _def("gather", None, (2, 2)),
        _def("scatter", None, (3, 3), mode=AttrDef(str, "add", choices=SCATTER_MODES)),
        _def("pad", "tokens", tokens=_REQ_INT, token=AttrDef(int), feed=AttrDef(bool, False), at=AttrDef(int),
             behind=AttrDef(int), token_local=False),
        _def("trim", "tokens", tokens=_REQ_INT, token_local=False),
        _def("select", "rule", (2, None), rule=AttrDef(str, required=True, choices=("cdf",)),
             cdf=AttrDef(float, required=True)),
        _def("detach"),
        _def("tap", "name", name=_REQ_NAME, head=AttrDef(bool, False), defines=False),
        _def(
            "loss", "rule", (1, 2), token_local=False, defines=False,
            rule=AttrDef(str, required=True, choices=LOSS_RULES), name=_REQ_NAME, coefficient=AttrDef(float, 1.0),
        ),
        _def("average", "index", (0, 0), defines=False, index=_REQ_INT, blocks=AttrDef(tuple, required=True)),
        _def("retire", "index", (0, 0), defines=False, index=_REQ_INT),
        _def("ahead", "tokens", (0, 0), defines=False, tokens=_REQ_INT),
        _def("denoise", "steps", (0, 0), defines=False, steps=_REQ_INT, order=AttrDef(str, "confidence"), token=_REQ_INT,
             carry=AttrDef(int, 0)),
        _def("output", defines=False),
    )
}
