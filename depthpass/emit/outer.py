"""The emitted classes around a decoder: the head, and what generation asks of the whole model."""

from __future__ import annotations

from torch import nn

from depthpass.emit.statements import Body
from depthpass.emit.stock import logits_of, makes_by_config, renamed_init
from depthpass.emit.subject import Subject, indented
from depthpass.emit.templates import MASKS, NO_PAGES


def outer_class(s: Subject, i: int) -> str:
    """The class of module ``i``, which holds module ``i - 1``.

    Raises:
        UnsupportedModelError: its code does not say where it makes that, or a tap's logits cannot be made as it makes its own.
    """
    module, inner, path = s.modules[i], s.modules[i - 1], s.inner_path(i)
    lines = [f"class {s.name(module)}({type(module).__name__}):", f"    config_class = {s.config}", *s.flags()]
    first: list[str] = []
    if makes_by_config(type(module)):
        # Its decoder is whatever AutoModel makes of its config.
        first = [f"AutoModel.register({s.config}, {s.name(inner)}, exist_ok=True)", "", ""]
    else:
        lines += ["", *indented(renamed_init(type(module), type(inner), s.name(inner), path), 4)]
    body = s.body
    if body is not None and i == len(s.modules) - 1:
        if s.stateful and hasattr(module, "init_continuous_batching"):
            lines += NO_PAGES.rstrip().splitlines()
        if body.ages:
            lines += MASKS.rstrip().splitlines()
        if body.taps or body.predicts:
            lines += _forward(s, module, path, body)
    return "\n".join(first + lines)


def _forward(s: Subject, module: nn.Module, path: str, body: Body) -> list[str]:
    """A forward that hands its decoder the head, where tokens leave by predictions, and collects its taps."""
    stock, heads = type(module).__name__, sorted(n for n, head in body.taps.items() if head)
    given = (["taps=taps"] if body.taps else []) + (["predict=self.logits_of"] if body.predicts else [])
    call = f"super().forward(*args, {', '.join(given)}, **kwargs)"
    lines = ["", f"    @wraps({stock}.forward)", "    def forward(self, *args, **kwargs):"]
    lines += _collected(s, call, heads) if body.taps else [f"        return {call}"]
    if heads or body.predicts:
        lines += ["", "    def logits_of(self, hidden_states, logits_to_keep=0):",
                  '        """Logits of a stream that the final norm has passed."""',
                  "        outputs = BaseModelOutputWithPast(last_hidden_state=hidden_states)",
                  *indented("\n".join(logits_of(type(module), path)), 8), "        return logits"]
    return lines


def _collected(s: Subject, call: str, heads: list[str]) -> list[str]:
    """Statements that run the model and put its taps beside its output."""
    lines = ["        taps = {}", f"        output = {call}", '        keep = kwargs.get("logits_to_keep", 0)',
             "        streams = {name: torch.cat(parts, 1) for name, parts in taps.items()}"]
    if heads:
        lines += [f"        output.taps = {{name: self.logits_of(x, keep) if name in {heads} else kept_tokens(x, keep)",
                  "                       for name, x in streams.items()}"]
    else:
        lines += ["        output.taps = {name: kept_tokens(x, keep) for name, x in streams.items()}"]
    s.used.add("kept_tokens")
    return [*lines, "        return output"]
