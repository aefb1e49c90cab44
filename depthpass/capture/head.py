"""The head of a captured model as a part of its own: from normed streams to logits, whatever else the model returns."""

from __future__ import annotations

import weakref
from dataclasses import replace

from torch import fx
from torch.utils import _pytree as pytree

from depthpass.capture.model import Capture, Part
from depthpass.errors import UnsupportedModelError

_MADE: weakref.WeakKeyDictionary[Capture, Part] = weakref.WeakKeyDictionary()


def logits_part(captured: Capture) -> Part:
    """The part ``(visit, normed stream [batch, k, width]) -> logits [batch, k, vocabulary]``, made once per capture.

    Raises:
        UnsupportedModelError: the model returns no logits, or they depend on more than their own tokens' streams.
    """
    if captured not in _MADE:
        _MADE[captured] = _make(captured)
    return _MADE[captured]


def made_of(captured: Capture) -> tuple[Part, ...]:
    """The parts that were made of a capture so far."""
    return (_MADE[captured],) if captured in _MADE else ()


def _make(captured: Capture) -> Part:
    head = captured.head
    places = pytree.tree_unflatten(list(range(captured.out_spec.num_leaves)), captured.out_spec)
    place = getattr(places, "logits", None)
    if place is None:
        raise UnsupportedModelError(
            f"the op 'logits' needs a model with a head; this one returns {', '.join(places.keys())}. Use an exit criterion "
            "of the state, or a model with a head."
        )
    if any(captured.side_axes[e] is not None for e in head.extras):
        raise UnsupportedModelError("the op 'logits': this model's head reads a per-token table, so it cannot be applied to "
                                    "some tokens only. Use an exit criterion of the state.")
    graph = fx.Graph()
    results = graph.graph_copy(head.graph.graph, {})
    graph.output(pytree.tree_leaves(results)[place])
    graph.eliminate_dead_code()
    # The call's own arguments (labels for the loss) come after the stream and the extras, and are of no use here.
    given = [n for n in graph.nodes if n.op == "placeholder"][2 + len(head.extras) :][: len(head.inputs)]
    for node in given:
        if node.users:
            raise UnsupportedModelError(f"the op 'logits': this model's logits read its argument {node.name!r}. Use an exit "
                                        "criterion of the state.")
        graph.erase_node(node)
    return replace(head, graph=fx.GraphModule(head.graph, graph), inputs=())
