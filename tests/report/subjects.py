"""Reports that the tests of this folder look at."""

from __future__ import annotations

from functools import cache

from depthpass.ir import parse_program, verify
from depthpass.report import Report, Subject, build_report
from depthpass.schedule import schedule

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True, "dtype": "bfloat16",
}
BAND = "{pass: turboconn, preset: llama-1b, group: 4}"

SMALL = """
program M blocks=4 width=8
  %0 = embed
  %1 = block 0 (%0) slot 0
  %2 = block 1 (%1) slot 1
  %3 = delay 2 (%6)
  %4 = add (%2, %3)
  %5 = block 2 (%4) slot 2
  tap middle (%5)
  %6 = linear down (%5) out 8
  %7 = block 3 (%5) slot 3
  %8 = norm (%7)
  output %8
"""


@cache
def subject() -> Subject:
    """Llama-3.2-1B's shape."""
    return Subject.of(LLAMA_1B)


@cache
def band(cost: bool = False) -> Report:
    """The published 1B layout at the length of the parity task."""
    return subject().report(BAND, seq_len=155, batch=8, cost=cost)


@cache
def small() -> Report:
    program = verify(parse_program(SMALL))
    return build_report(program, schedule(program), None, 7, 2)
