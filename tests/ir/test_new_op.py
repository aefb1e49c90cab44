"""An op that a user defines: one definition, and every analysis and executor knows it.

The op is checked against the same program spelled out in ops that come with depthpass.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp
from depthpass.analysis.depth import depth
from depthpass.errors import SpecError, VerifyError
from depthpass.ir import OPS, AttrDef, OpDef, Param, Program, infer, parameters, parse_program, register, verify
from depthpass.ir.definitions import EVERYWHERE
from depthpass.ir.ops import unfit
from depthpass.passes import Pass, registry


def blend(x, y, share, near, far):
    """``x * near + share * y * far``, both learned per channel."""
    return x * near + share * y * far


BLEND = OpDef(
    "blend", "name", (2, 2),
    {"name": AttrDef(str, required=True, scope=True), "share": AttrDef(float, 0.5, low=0.0)},
    parameters=lambda o, widths, hidden: [
        Param(f"{o['name']}.near", (widths[0],), fill=1.0), Param(f"{o['name']}.far", (widths[1],)),
    ],
    meaning=blend, constants=("share",),
)

HEAD = "%0 = embed\n%8 = delay 2 (%7)\n%a = scale 0.5 (%8)\n"
TAIL = """
%1 = add (%0, %b)
%2 = block 0 (%1) slot 0
%3 = block 1 (%2) slot 1
%c = {second}
%4 = block 2 (%c) slot 2
%7 = scale 0.5 (%4)
%9 = norm (%4)
output %9"""
NEW = HEAD + "%b = blend b (%a, %8) share 0.25" + TAIL.format(second="blend c (%3, %2)")
SPELLED = (
    HEAD + "%p = weigh bn (%a)\n%q = weigh bf (%8)\n%r = scale 0.25 (%q)\n%b = add (%p, %r)"
    + TAIL.format(second="add (%m, %n)").replace(
        "%c =", "%m = weigh cn (%3)\n%k = weigh cf (%2)\n%n = scale 0.5 (%k)\n%c ="
    )
)


@dataclass(frozen=True)
class Text(Pass):
    """The program of a text, whatever was there."""

    name: ClassVar[str] = "text"

    text: str

    def apply(self, program: Program, ctx) -> Program:
        return parse_program(f"program {program.model} blocks={program.blocks} width={program.width}\n{self.text}")


@pytest.fixture(scope="module", autouse=True)
def defined():
    register(BLEND)
    known, registry._registered = registry._registered, {"text": Text}
    yield
    registry._registered = known
    del OPS["blend"]


@pytest.fixture(scope="module")
def spelled():
    return dp.transform(enliven(zoo.model("llama", 3, dtype=torch.float64), std=0.2), Text(SPELLED), lowering="eager")


def same(model, spelled):
    """The model with the spelled-out one's weights."""
    generator = torch.Generator().manual_seed(5)
    for op, near, far in (("b", "bn", "bf"), ("c", "cn", "cf")):
        for leaf, name in (("near", near), ("far", far)):
            value = torch.randn(32, generator=generator, dtype=torch.float64) * 0.5
            for m, full in ((model, f"{op}.{leaf}"), (spelled, f"{name}.weight")):
                m.depth.get_parameter(full).data.copy_(value)
    model.load_state_dict({k: v for k, v in spelled.state_dict().items() if not k.startswith("depth.")}, strict=False)
    return model


def run(model, batch):
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    logits.square().sum().backward()
    actual = {n.replace("depth.", ""): p.grad for n, p in model.named_parameters()}
    spelt = {"bn.weight": "b.near", "bf.weight": "b.far", "cn.weight": "c.near", "cf.weight": "c.far"}
    return logits.detach(), {spelt.get(n, n): g for n, g in actual.items()}


def batch():
    ids = torch.randint(zoo.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", [
    {"lowering": "eager"}, {"lowering": "scheduled"}, {"lowering": "scheduled", "chunk": 1}, {"schedule": "fixed_point"},
], ids=["eager", "scheduled", "one by one", "sweeps"])
def test_outputs_and_every_gradient(options, spelled):
    model = same(dp.transform(spelled, Text(NEW), **options), spelled) if False else None
    stock = zoo.model("llama", 3, dtype=torch.float64)
    model = same(dp.transform(stock, Text(NEW), **options), spelled)
    (logits, grads), (want, wanted) = run(model, batch()), run(spelled, batch())
    torch.testing.assert_close(logits, want, rtol=1e-10, atol=1e-10)
    assert grads.keys() == wanted.keys()
    for name, g in wanted.items():
        torch.testing.assert_close(grads[name], g, rtol=1e-8, atol=1e-8 * float(g.abs().max()), msg=name)
    if options.get("lowering") == "scheduled":
        assert [r.level for r in model.depth_lowered] == ["scheduled"]


def test_cached_decoding_is_the_whole_row(spelled):
    model = same(dp.transform(zoo.model("llama", 3, dtype=torch.float64), Text(NEW)), spelled).eval()
    given = batch()
    with torch.no_grad():
        want = spelled.eval()(**given, use_cache=False).logits
        out = model(input_ids=given["input_ids"][:, :5], attention_mask=given["attention_mask"][:, :5])
        for i in range(5, 9):
            name = "cache" if hasattr(out, "cache") else "past_key_values"
            out = model(input_ids=given["input_ids"][:, i : i + 1], attention_mask=given["attention_mask"][:, : i + 1],
                        past_key_values=getattr(out, name))
            torch.testing.assert_close(out.logits[:, 0], want[:, i], rtol=1e-9, atol=1e-9)


def test_text_types_parameters_and_places():
    program = verify(parse_program(f"program M blocks=3 width=32\n{NEW}"))
    assert parse_program(str(program)) == program and "blend b (%a, %8) share 0.25" in str(program)
    assert infer(program)["b"].absent == 2 and infer(program)["c"].width == 32
    assert {n: p.shape for n, p in parameters(program).items()} == dict.fromkeys(("b.near", "b.far", "c.near", "c.far"), (32,))
    assert all(unfit(program.ops[1:], where) is None for where in EVERYWHERE - {"a sweep", "a hand-scheduled chunk"})
    with pytest.raises(VerifyError, match="share of at least 0"):
        verify(parse_program(str(program).replace("0.25", "-0.25")))


def test_depth_cost_and_report_are_those_of_the_same_program_spelled_out(spelled):
    model = dp.transform(zoo.model("llama", 3), Text(NEW))
    report, want = dp.report(model, seq_len=20), dp.report(spelled, seq_len=20)
    assert report.depth == want.depth and depth(model.depth_program).at(20) == 3 * 10
    assert report.new_parameters == want.new_parameters == 4 * 32
    assert "blend" in report.to_dot() and report.to_html() and report.to_dict()


def test_what_cannot_be_an_op_is_refused():
    with pytest.raises(SpecError, match="'blend': expected a name that no op has"):
        register(BLEND)
    with pytest.raises(SpecError, match="meaning"):
        register(OpDef("empty"))
    with pytest.raises(SpecError, match="one attribute with scope=True"):
        register(OpDef("nameless", parameters=BLEND.parameters, meaning=blend))
    assert not {"empty", "nameless"} & OPS.keys()
