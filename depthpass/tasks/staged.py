"""RELAY's staged procedure (arXiv 2502.08482): a looped model learns round by round, then writes chains for a plain model.

    Stage 1   iteration t of the looped model is supervised with round t of the chain, the last one also with the answer:
              :func:`relay_batch`, :func:`relay_total_loss`
    Stage 2   the looped model writes chains for longer problems (:func:`write_chains`), and a plain model is trained on
              old and new ones as on any chain of thought (:func:`chain_texts`)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthpass.annotations import checked
from depthpass.errors import InputError
from depthpass.prompt import at_prompt
from depthpass.tasks.data import check_tokenizer
from depthpass.tasks.task import Instance


@at_prompt
@dataclass(frozen=True)
class RelayBatch:
    """Prompts with one target per loop.

    Attributes:
        input_ids, attention_mask: ``[rows, columns]``, padded on the left.
        targets, mask: ``[T, rows, columns]``: round t right-aligned to the row (see :func:`depthpass.aligned_targets`).
        answers, answer_mask: ``[rows, columns]``: the answer, right-aligned likewise.
        last: ``[rows]``: index of each row's last round, whose iteration answers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    mask: Tensor
    answers: Tensor
    answer_mask: Tensor
    last: Tensor

    @property
    def loops(self) -> int:
        """T."""
        return len(self.targets)

    @property
    def clashes(self) -> int:
        """Tokens for which the last round and the answer want something else: one head cannot give both."""
        at = torch.arange(len(self.last), device=self.last.device)
        both = self.mask[self.last, at] & self.answer_mask
        return int((both & (self.targets[self.last, at] != self.answers)).sum())

    def to(self, device: Any) -> RelayBatch:
        return RelayBatch(*(getattr(self, k).to(device) for k in self.__dataclass_fields__))


@checked("relay_batch")
def relay_batch(instances: Sequence[Instance], tokenizer: Any, *, iterations: int | None = None) -> RelayBatch:
    """Prompts and rounds as tensors.

    Args:
        instances: with rounds that are no longer than their prompts, in tokens; shorter prompts are an error that names the
            row. Tasks of :data:`depthpass.tasks.RELAY` satisfy it with a symbol tokenizer.
        tokenizer: has a pad token, which fills rounds up.
        iterations: T of the model; None = as many as the row with most rounds.

    Raises:
        InputError: no instances, more rounds than iterations, a round longer than its prompt.
    """
    from depthpass.losses import aligned_targets

    check_tokenizer("relay_batch", tokenizer)
    if not instances:
        raise InputError("relay_batch: expected at least one instance, got none.")
    prompts = [_ids(tokenizer, x.prompt) for x in instances]
    columns, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (columns - len(p)) + p for p in prompts])
    attention = torch.tensor([[0] * (columns - len(p)) + [1] * len(p) for p in prompts])
    rounds = [[_ids(tokenizer, r) for r in x.rounds] for x in instances]
    targets, mask = aligned_targets(rounds, columns, pad=pad, attention_mask=attention, iterations=iterations)
    answers, answer_mask = aligned_targets([[_ids(tokenizer, x.answer)] for x in instances], columns, pad=pad,
                                           attention_mask=attention)
    last = torch.tensor([len(r) - 1 for r in rounds])
    return RelayBatch(ids, attention, targets, mask, answers[0], answer_mask[0], last)


@checked("relay_total_loss")
def relay_total_loss(output: Any, batch: RelayBatch, *, weight: float = 0.1, head: Callable[[Tensor], Tensor] | None = None,
                     answer_head: Callable[[Tensor], Tensor] | None = None, scope: str = "loop") -> Tensor:
    """L_answer + weight / T * sum over t of CE(tap t, round t), the published loss of stage 1.

    The answer is read at the iteration of a row's last round: rows of one batch may have different numbers of rounds.

    Args:
        output: of a looped model with ``taps=True``.
        batch: from :func:`relay_batch`, with as many iterations as the model runs.
        weight: lambda; unpublished, this is our default.
        head, answer_head: heads for rounds and answers on what the taps hand out; None = the taps are logits already.
        scope: of the loop.

    Raises:
        InputError: taps are missing or their number is not that of the targets; rounds and answers that one head cannot both
            give.
    """
    from depthpass.losses import relay_loss

    if weight and head is answer_head and (clash := batch.clashes):
        raise InputError(f"relay_total_loss: at the iteration that answers, {clash} tokens are to be those of a round and others "
                         "for the answer. Give answers a head of their own, answer_head=, as the paper does.")

    rounds = relay_loss(output, batch.targets, batch.mask, weight=weight, head=head, scope=scope)
    taps = torch.stack([output.taps[f"{scope}.t{t}"] for t in range(1, batch.loops + 1)])
    final = taps[batch.last, torch.arange(len(batch.last), device=taps.device)]
    logits = final if answer_head is None else answer_head(final)
    keep = batch.answer_mask
    precise = logits[keep].to(torch.promote_types(logits.dtype, torch.float32))
    return rounds + torch.nn.functional.cross_entropy(precise, batch.answers[keep])


@at_prompt
@dataclass(frozen=True)
class Chain:
    """What a looped model wrote for one problem.

    Attributes:
        instance: the problem.
        rounds: one text per iteration.
        answer: read at the last iteration.
    """

    instance: Instance
    rounds: tuple[str, ...]
    answer: str

    @property
    def right(self) -> bool:
        """Whether every round and the answer are those of the task's program."""
        return self.rounds == self.instance.rounds and self.answer == self.instance.answer

    @property
    def text(self) -> str:
        """As training text for a plain model: the prompt, a line per round, the answer."""
        return "\n".join([self.instance.prompt, *self.rounds, f"answer {self.answer}"])


@checked("write_chains")
def write_chains(model: Any, instances: Iterable[Instance], tokenizer: Any, *, batch: int = 32, scope: str = "loop",
                 head: Callable[[Tensor], Tensor] | None = None, answer_head: Callable[[Tensor], Tensor] | None = None,
                 ) -> list[Chain]:
    """Let a looped model write a chain for each problem: what its taps say, iteration by iteration.

    Problems are grouped by their number of rounds, which the paper takes from the problem's size; the loop count is set for
    each group and set back afterwards. A round is read from the right, up to the first pad that the model predicts.

    Args:
        model: a model transformed with ``Loop(..., taps=True)``, trained with :func:`relay_total_loss`.
        instances: problems, longer ones than those of the training as a rule.
        tokenizer: as in training.
        batch: rows per call.
        scope: of the loop.
        head, answer_head: as in training.

    Returns:
        chains in the order of the problems. ``chain.right`` tells which are right; the paper keeps all of them.
    """
    from depthpass.hf.switching.switch import loops_of, set_loops

    check_tokenizer("write_chains", tokenizer)
    if batch < 1:
        raise InputError(f"write_chains: batch: expected at least 1 row, got {batch}.")
    items = list(instances)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, x in enumerate(items):
        groups[len(x.rounds)].append(i)
    device, before, training = next(model.parameters()).device, loops_of(model, scope=scope), model.training
    chains: dict[int, Chain] = {}
    model.eval()
    try:
        for loops, rows in sorted(groups.items()):
            set_loops(model, loops, scope=scope)
            for at in range(0, len(rows), batch):
                part = rows[at : at + batch]
                inputs = relay_batch([items[i] for i in part], tokenizer, iterations=loops).to(device)
                with torch.no_grad():
                    output = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False)
                taps = [output.taps[f"{scope}.t{t}"] for t in range(1, loops + 1)]
                said = [(t if head is None else head(t)).argmax(-1) for t in taps]
                final = (taps[-1] if answer_head is None else answer_head(taps[-1])).argmax(-1)
                for row, i in enumerate(part):
                    real = inputs.attention_mask[row].bool()
                    texts = [_read(x[row][real].tolist(), tokenizer) for x in (*said, final)]
                    chains[i] = Chain(items[i], tuple(texts[:-1]), texts[-1])
    finally:
        set_loops(model, before, scope=scope)
        model.train(training)
    return [chains[i] for i in range(len(items))]


@checked("chain_texts")
def chain_texts(chains: Iterable[Chain | Instance]) -> list[str]:
    """Training texts of stage 2, for written chains and for given problems alike: prompt, rounds, answer, a line each."""
    return [x.text if isinstance(x, Chain) else Chain(x, x.rounds, x.answer).text for x in chains]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _read(ids: list[int], tokenizer: Any) -> str:
    """Right-aligned ids behind the last pad, as text."""
    start = next((i + 1 for i in reversed(range(len(ids))) if ids[i] == tokenizer.pad_token_id), 0)
    return tokenizer.decode(ids[start:])
