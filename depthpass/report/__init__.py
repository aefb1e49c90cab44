"""Reports: what a program computes, how deep it is, what it costs, in every form.

``depthpass.report(...)`` is both this package and the function that makes reports.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

from depthpass.report.numbers import Number, Section
from depthpass.report.report import Report, Segment, build_report
from depthpass.report.subject import Subject, proven

if TYPE_CHECKING:
    from depthpass.analysis.roofline import Ceilings
    from depthpass.ir import Program
    from depthpass.ir.shares import Ratios
    from depthpass.spec import SpecLike
    from depthpass.tasks.dags import TaskDAG

__all__ = ["Number", "Report", "Section", "Segment", "Subject", "build_report", "proven", "report"]


def report(
    model_or_config: Any,
    spec: SpecLike | None = None,
    *,
    program: Program | str | None = None,
    seq_len: int = 1024,
    batch: int = 1,
    chunk: int | None = None,
    cost: bool = True,
    ceilings: Ceilings | None = None,
    task: TaskDAG | None = None,
    ratios: Ratios | None = None,
) -> Report:
    """Analyse a transformed model, or what a spec would make of a stock model or config.

    Args:
        model_or_config: a transformed model; or a stock model, a transformers config, a mapping of a config's fields,
            or the path of a ``config.json``. A config alone is built on the meta device, without weights. None
            together with ``program``: the program alone.
        spec: a pass, a list of passes, a mapping, or a path or text of YAML or JSON; not for a transformed model,
            which has its own. None = the stock model as it is.
        program: a program or its text, to report on instead of a spec's.
        seq_len: n, real tokens of each row.
        batch: rows.
        chunk: smaller chunks of the serial regions than the largest legal ones.
        cost: capture the model on the meta device and count FLOPs, bytes and steps.
        ceilings: of a machine, for lower bounds of times; see :mod:`depthpass.analysis.roofline`.
        task: a computation to hold against the depth at n; see :mod:`depthpass.tasks`.
        ratios: shares of tokens by route label, or one for each label in program order: those that top-k routes are set
            to, or that are expected of thresholds and choices. None = those set by :func:`depthpass.set_ratios`, else the
            program's own; a threshold or choice without one counts as taken by every token.

    Raises:
        SpecError, PassError: the spec does not fit the model; a length, batch or chunk is out of range.
        InputError: the source is neither a model nor a config.
        UnsupportedModelError: the model cannot be treated; with ``cost=False`` only its list of blocks is looked at.

    Example:
        >>> config = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128,
        ...           "num_attention_heads": 4, "vocab_size": 100}
        >>> result = report(config, "{pass: turboconn, group: 4, bridges: [[6, 0]]}", seq_len=155, cost=False)
        >>> result.depth_at(155), result.serial_blocks
        (236, 6)
    """
    return Subject.of(model_or_config).report(
        spec, program=program, seq_len=seq_len, batch=batch, chunk=chunk, cost=cost, ceilings=ceilings, task=task,
        ratios=ratios,
    )


class _CallablePackage(types.ModuleType):
    """Lets ``depthpass.report(...)`` work although importing this package puts it under that very name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return report(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _CallablePackage
__signature__ = inspect.signature(report)
__doc__ = f"{__doc__}\nreport{__signature__}\n\n{inspect.getdoc(report)}"  # help(dp.report) says what it takes
