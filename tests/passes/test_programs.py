"""Golden program texts of the published systems, and what their rewrites promise about schedules and slots."""

from __future__ import annotations

import pytest

from depthpass.analysis.dependence import cycles
from depthpass.ir import Program, parse_program, plain, verify
from depthpass.passes import Context, Pass, apply_spec
from depthpass.passes.inner_thinking import InnerThinking
from depthpass.passes.layer_program import LayerProgram, Skip
from depthpass.passes.loop import Loop
from depthpass.passes.mixture_of_recursions import MixtureOfRecursions
from depthpass.passes.pad import Pad
from depthpass.passes.parallel_loop import ParallelLoop
from depthpass.passes.recurrence import IntraLayerRecurrence, Repeat
from depthpass.passes.recurrent_loop import RecurrentLoop
from depthpass.passes.same_layer_state import SameLayerState
from depthpass.passes.sum_norms import SumNorms
from depthpass.passes.taps import Taps
from depthpass.passes.turboconn import TurboConn
from depthpass.schedule import schedule

SYSTEMS: dict[str, tuple[int, list[Pass]]] = {
    "layer program": (4, [LayerProgram([0, 1, 2, 1, 2, 3])]),
    "repeats and skips": (6, [Repeat(1, 3, 3), Skip(7)]),
    "ilr": (4, [IntraLayerRecurrence([4, 2, 1, 1])]),
    "loop": (4, [Loop(1, 3, times=3, kv="first", taps=True, lora_rank=4)]),
    "damped": (4, [Loop(1, 3, times=2, damped=True)]),
    "tmlt": (2, [Loop(times=2, timestep=True)]),
    "huginn": (8, [Loop(2, 6, times=2, inject="concat", state="noise", out_norm=True)]),
    "fully looped": (2, [Loop(times=2, inject="attention", normalize="loop")]),
    "ouro": (2, [Loop(times=3, normalize="loop", exit=0.5)]),
    "plt": (3, [ParallelLoop(loops=2)]),
    "loopcoder": (2, [ParallelLoop.loopcoder_v2()]),
    "iquest": (2, [ParallelLoop.iquest()]),
    "mor": (4, [MixtureOfRecursions(start=1, recursions=3)]),
    "mor threshold, shared keys": (3, [MixtureOfRecursions(start=1, recursions=2, mode="threshold", kv="shared", taps=True)]),
    "mor updated keys": (3, [MixtureOfRecursions(start=1, recursions=3, router="token", kv="updated")]),
    "mor delta": (3, [MixtureOfRecursions(start=1, recursions=2, combine="delta")]),
    "itt": (3, [InnerThinking(blocks=(1,), steps=3)]),
    "itt literal": (2, [InnerThinking(steps=2, mode="threshold", bypass="literal", alpha=0.5)]),
    "same-layer states": (2, [SameLayerState(start=1, state="ffn")]),
    "groups": (2, [RecurrentLoop(encoder=1, interval=4)]),
    "norms of sums": (2, [Loop(1, 2, times=2), SumNorms()]),
    "pad and loop": (2, [Pad(3), Loop(times=2)]),
    "loop with bridges and taps": (2, [Loop(times=2), TurboConn(bridges=[(-1, 0)], rank=8), Taps([0, 3], head=True)]),
}


def built(blocks: int, passes: list[Pass]) -> Program:
    stock = plain("LlamaForCausalLM", blocks, 64)
    return apply_spec(stock, passes, Context.of(stock))


@pytest.mark.parametrize("system", SYSTEMS)
def test_golden(system: str, golden) -> None:
    program = built(*SYSTEMS[system])
    golden(str(program))
    assert verify(parse_program(str(program))) == program


@pytest.mark.parametrize("system", SYSTEMS)
def test_slots_are_the_writing_visits_in_order(system: str) -> None:
    """Slot = index of the attention call that writes it; a visit without keys of its own carries what it reads."""
    program = built(*SYSTEMS[system])
    writers = [v for v in program.visits if v["keys"] is None or v["gate"] is not None or v["update"]]
    assert [v["slot"] for v in writers] == list(range(len(writers))) == list(program.slots)
    assert all(v["slot"] == v["keys"] for v in program.visits if v not in writers)


@pytest.mark.parametrize("system", [s for s in SYSTEMS if not {"bridges", "states", "groups"} & set(s.split(" "))])
def test_only_bridges_make_a_token_loop(system: str) -> None:
    """A parallel loop delays forward only: all its loops run over all tokens, one after another."""
    program = built(*SYSTEMS[system])
    assert cycles(program) == ()
    assert schedule(program).serial_visits == 0


def test_bridge_over_a_loop_puts_both_iterations_on_the_cycle() -> None:
    program = built(*SYSTEMS["loop with bridges and taps"])
    assert (schedule(program).serial_visits, len(program.visits)) == (3, 4)


def test_repeated_blocks_keep_what_was_known_of_them() -> None:
    """Physical block, LoRA and other operands of a visit survive later rewrites."""
    program = built(3, [Loop(0, 2, times=2, lora_rank=4, kv="own"), LayerProgram([0, 2, 2, 3, 4])])
    assert [(v["index"], v["lora"]) for v in program.visits] == [
        (0, "loop.t0.v0.lora"), (0, "loop.t1.v0.lora"), (0, "loop.t1.v0.lora"), (1, "loop.t1.v1.lora"), (2, None),
    ]


FIRST = [LayerProgram([0]), Repeat(0, 1), IntraLayerRecurrence([1, 1, 1, 1]), Loop(), ParallelLoop(),
         MixtureOfRecursions(), InnerThinking(), Skip(0)]


@pytest.mark.parametrize("spec", FIRST, ids=lambda p: p.name)
def test_passes_over_straight_stacks_say_where_they_belong(spec: Pass) -> None:
    edge = rf"{spec.name}: expected a straight .* got %\d+ = add of turboconn\(group=4\) between them. Put {spec.name}"
    with pytest.raises(ValueError, match=edge):
        built(4, [TurboConn(bridges=[(2, 0)]), spec])
    keys = f"{spec.name}: expected visits with their own keys, got %4, which reads slot 0"
    with pytest.raises(ValueError, match=keys):
        built(4, [Loop(0, 3, kv="first"), spec])
    with pytest.raises(ValueError, match="got tap of taps"):
        built(4, [Taps([1]), spec])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LayerProgram([0, 4]), "layer_program.layers: expected blocks in 0..3, got 4"),
        (IntraLayerRecurrence([1, 2]), "expected one count for each of the 4 visits, got 2"),
        (Repeat(1, 5), "repeat.end: expected a position in 2..4, got 5"),
        (Skip(0, 4), "skip: expected a range that leaves a visit, got all 4"),
        (Skip(4), "skip.start: expected a position below 4, got 4: the program has 4 visits"),
        (Loop(2, 6), "loop.end: expected a position in 3..4, got 6"),
        (MixtureOfRecursions(start=3), "mixture_of_recursions.start: expected a position below end=3, got 3"),
        (InnerThinking(blocks=(4,)), "inner_thinking.blocks: expected positions in 0..3, got [4]"),
        (Taps([4]), "taps.at: expected positions in 0..3, got 4"),
    ],
    ids=lambda p: p.label if isinstance(p, Pass) else "",
)
def test_what_the_model_does_not_allow(spec: Pass, message: str) -> None:
    with pytest.raises(ValueError) as error:
        built(4, [spec])
    assert message in str(error.value)


def test_pads_stand_in_every_stream() -> None:
    looped = Loop(0, 4, inject="concat", state="noise")
    before, after = built(4, [looped, Pad(2)]), built(4, [Pad(2), looped])
    assert {o["pads"] for p in (before, after) for o in p if o.kind == "noise"} == {2}
    with pytest.raises(ValueError, match="got %1 = pad"):
        built(4, [Pad(2), Pad(2)])
    assert built(4, [Pad(0)]) == plain("LlamaForCausalLM", 4, 64)


def test_two_loops_need_two_scopes() -> None:
    again = Loop(0, 1, times=2, lora_rank=2)
    with pytest.raises(ValueError, match=r"parameters or taps under 'loop'\. Set scope='another_name'"):
        built(2, [again, again])
    nested = built(2, [again, Loop(0, 2, times=2, lora_rank=2, scope="outer")])
    assert [v["lora"] for v in nested.visits][:2] == ["outer.t0.v0.lora", "outer.t0.v1.lora"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LayerProgram([]), "layer_program.layers: expected at least one visit, got []"),
        (lambda: LayerProgram([0, -1]), "layer_program.layers: expected block numbers of at least 0, got -1"),
        (lambda: LayerProgram("0,1"), "layer_program.layers: expected a list of integers, got '0,1' (str)"),
        (lambda: IntraLayerRecurrence([1, 0]), "expected counts of at least 1, got [1, 0]. Use the pass 'skip'"),
        (lambda: Repeat(0, 1, 0), "repeat.times: expected at least 1, got 0"),
        (lambda: Repeat(2, 2), "repeat.end: expected a position above start=2, got 2. Ranges are half-open"),
        (lambda: Repeat(-1, 2), "repeat.start: expected a position of at least 0"),
        (lambda: Skip(2, 1), "skip.end: expected a position above start=2"),
        (lambda: Loop(times=0), "loop.times: expected at least 1, got 0"),
        (lambda: Loop(state="zeros"), "loop.inject: expected 'add', 'concat' or 'bounded' with state='zeros', got None"),
        (lambda: Loop(noise_std=0.5), "loop.noise_std: expected state='noise' beside it, got 'input'"),
        (lambda: Loop(kv="mod:0"), "loop.kv: expected own, first, last, latest, mod:k, anchor or anchor:k, got 'mod:0'"),
        (lambda: Loop(kv="frist"), "loop.kv: expected own, first, last, latest, mod:k, anchor or anchor:k, got 'frist'"),
        (lambda: Loop(exit=1.5), "loop.exit: expected a probability in (0, 1], got 1.5"),
        (lambda: Loop(times=1, exit=0.5), "loop.times: expected at least 2 with an exit, got 1"),
        (lambda: Loop(lora_rank=0), "loop.lora_rank: expected at least 1"),
        (lambda: Loop(inject="ad"), "'bounded' or 'attention' or null, got 'ad' (str). Did you mean 'add'?"),
        (lambda: ParallelLoop(loops=0), "parallel_loop.loops: expected at least 1"),
        (lambda: ParallelLoop(mix=(0.0, 1.0)), "parallel_loop.shift: expected 0 with mix[0] = 0, got 1"),
        (lambda: ParallelLoop(mix=(0.0, 0.0)), "parallel_loop.mix: expected two factors that are not both 0"),
        (lambda: ParallelLoop(kv="own", window=8), "parallel_loop.window: expected kv='gated' beside it, got 'own'"),
        (lambda: ParallelLoop(mix=(1, 2, 3)), "parallel_loop.mix: expected a list (number, number), got (1, 2, 3)"),
        (lambda: MixtureOfRecursions(capacity=(1.0,)), "mixture_of_recursions.capacity: expected 3 shares, got [1.0]"),
        (lambda: MixtureOfRecursions(capacity=(0.5, 0.6, 0.1)), "expected shares that do not grow"),
        (lambda: MixtureOfRecursions(capacity=(0.5, 0.4, 0.1), kv="shared"), "a first share of 1 with kv='shared'"),
        (lambda: MixtureOfRecursions(capacity=(1, 1, 1), mode="threshold"), "expected mode='topk' beside it"),
        (lambda: MixtureOfRecursions(alpha=0.2, combine="delta"), "expected combine='paper' beside it"),
        (lambda: InnerThinking(ratios=(0.5,)), "inner_thinking.ratios: expected 3 shares, got [0.5]. One for each"),
        (lambda: InnerThinking(ratios=(0.5, 0.5, 0.0)), "inner_thinking.ratios: expected shares in (0, 1]"),
        (lambda: InnerThinking(blocks=(1, 1)), "inner_thinking.blocks: expected positions that differ"),
        (lambda: Taps([]), "taps.at: expected at least one position"),
        (lambda: Taps([1, 1]), "taps.at: expected positions that differ"),
        (lambda: Pad(-1), "pad.tokens: expected at least 0"),
    ],
)
def test_bad_options(build, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)


def test_mergekit_configs() -> None:
    text = """
    slices:
      - sources:
          - {model: some/model, layer_range: [0, 24]}
      - sources:
          - {model: some/model, layer_range: [8, 32]}
    merge_method: passthrough
    dtype: bfloat16
    """
    assert LayerProgram.from_mergekit(text) == LayerProgram((*range(24), *range(8, 32)))
    assert len(LayerProgram.from_mergekit(text).layers) == 48  # SOLAR's up-scaling


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "expected a mapping with a list 'slices', got []"),
        ("{merge_method: passthrough}", "expected a mapping with a list 'slices', got merge_method"),
        ("{merge_method: slerp, slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}", "passthrough, got 'slerp'"),
        ("{merge_method: passthrough, parameters: {scale: 2}, slices: [1]}", "the field 'parameters' is not supported"),
        ("{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 1], parameters: {}}]}]}",
         "slices[0].sources[0]: the field 'parameters' is not supported"),
        ("{merge_method: passthrough, slices: [{sources: [{model: a}, {model: b}]}]}", "exactly one source"),
        ("{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 1]}]}, "
         "{sources: [{model: b, layer_range: [1, 2]}]}]}", "expected slices of one model, got a, b"),
        ("{merge_method: passthrough, slices: [{sources: [{model: a}]}]}", "layer range 0: expected [start, end)"),
    ],
)
def test_other_mergekit_configs_are_refused(config: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        LayerProgram.from_mergekit(config)
    assert message in str(error.value)


def test_layer_replication_agrees_with_peft() -> None:
    """Half-open ranges, checked against the blocks that PEFT itself builds."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ranges = [[0, 3], [1, 4]]
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=1,
                         num_key_value_heads=1)
    model = LlamaForCausalLM(config)
    for i, block in enumerate(model.model.layers):
        torch.nn.init.constant_(block.mlp.up_proj.weight, float(i))
    replicated = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["up_proj"], layer_replication=ranges))
    layers = [int(b.mlp.up_proj.base_layer.weight[0, 0]) for b in replicated.base_model.model.model.layers]
    assert list(LayerProgram.from_layer_replication(ranges).layers) == layers == [0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("bad", [[[3, 3]], [[0, 4, 1]], [[0.0, 2]], [None], [[-1, 2]]])
def test_bad_layer_replication(bad: list) -> None:
    with pytest.raises(ValueError, match=r"layer range 0: expected \[start, end\) with 0 <= start < end"):
        LayerProgram.from_layer_replication(bad)


def test_flat_maps() -> None:
    assert LayerProgram.from_flat_map("0:3 1,2, 3") == LayerProgram((0, 1, 2, 1, 2, 3))
    for bad, message in (("", "got ''"), ("0-3", "got '0-3'"), ("3:1", "start < end, got '3:1'")):
        with pytest.raises(ValueError, match=message):
            LayerProgram.from_flat_map(bad)
