"""The fuzzer: random models, programs, rows, levels and tools against an oracle (``python -m depthpass.fuzz``).

Each case is plain data (:func:`make_case`) and runs by itself (:func:`run_case`). What is compared with what:
:mod:`depthpass.fuzz.checks`; the oracle, which reads a program's text and runs the stock model's own blocks one token at a
time: :mod:`depthpass.fuzz.oracle`. Needs transformers.
"""

from depthpass.fuzz.cases import make_case
from depthpass.fuzz.run import run_case

__all__ = ["make_case", "run_case"]
