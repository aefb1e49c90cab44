"""Packed rows: every sequence in them is a row of its own, whatever the program and whatever says where it starts."""

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from turbos import enliven, pair, spec, stock_of

import depthpass as dp
from depthpass.errors import InputError
from depthpass.hf.calls.packing import _powers, _similar, find_packing

pytestmark = pytest.mark.usefixtures("one_capture")

LENGTHS = [[6, 1, 9, 3, 4], [11, 2, 8, 2]]
"""Segments of two packed rows of 23 columns; windows and chunks of the models are of 4."""
ALL = [n for row in LENGTHS for n in row]
MIXING = ("gpt_oss", "opt", "llama4_text")
"""Stock models that mix packed sequences in some version of transformers: masks made without positions, positions numbered
from the mask alone, chunks counted over the whole row."""
LOG = "ceil(log2(n))"
PROGRAMS = {
    "loop": dp.Loop(start=1, end=2, times=2, inject="add", kv="first"),
    "noise": dp.Loop(start=1, end=2, times=2, inject="concat", state="noise"),
    "exit": dp.Loop(start=1, end=3, times=3, exit=0.6, skip=False, taps=True),
    "growing": dp.Loop(start=1, end=2, times=LOG),
    "plt": dp.ParallelLoop(loops=3, window=3),
    "plt_query": dp.ParallelLoop(loops=2, window=2, gate="query"),
    "mor": dp.MixtureOfRecursions(start=1, recursions=2, aux=0.5, z=0.25, taps=True),
    "mor_token": dp.MixtureOfRecursions(start=1, recursions=2, router="token", taps=True),
    "mod": dp.MixtureOfDepths(),
    "itt": dp.InnerThinking(steps=2, taps=True),
    "pads": [dp.Pad(2, token=5), spec()],
    "feedback_after_growing": [dp.Loop(0, 1, times=LOG), spec()],
    "taps": [spec(group=2), dp.Taps(at=(0, 2))],
    "program": dp.LayerProgram([0, 1, 2, 1]),
}


def packed(lengths=LENGTHS, seed=0):
    """Ids and restarting positions of packed rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, zoo.VOCABULARY, (len(lengths), sum(lengths[0])), generator=generator)
    return {"input_ids": ids, "position_ids": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])}


def pieces(x, lengths=LENGTHS):
    """The segments of a packed tensor, one after another, each as a row."""
    return [piece[None] for row, part in zip(lengths, x) for piece in part.split(row)]


def alone(model, ids, read=lambda out: out.logits, **more):
    """What a model makes of each segment in a call of its own."""
    return [read(model(input_ids=x, use_cache=False, **more)) for x in pieces(ids)]


def gradients(model, outputs):
    """Gradients of a fixed random sum over segments."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(7)
    sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, wanted, limit=1e-9):
    for x, y in zip(actual, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=limit, atol=limit)


def assert_same_gradients(actual, wanted, limit=1e-8):
    assert actual.keys() == wanted.keys()
    for name, g in wanted.items():
        assert (actual[name] - g).abs().max() <= limit * g.abs().max() + 1e-11, name


def transformed(passes, name="llama", level="auto", layers=3, **overrides):
    stock = enliven(zoo.model(name, layers, dtype=torch.float64, **overrides), std=0.2)
    model = dp.transform(stock, passes, lowering=level)
    enliven(model.depth, seed=1, std=0.3, least=1)
    return model


@pytest.mark.parametrize("name", zoo.SUPPORTED)
def test_identity_is_the_stock_model_on_packed_rows(name):
    """Full attention, windows and chunks; the stock model's packed masks are the oracle."""
    stock = stock_of(name, dtype=torch.float32 if name == "gemma2" else torch.float64)
    batch = packed()
    actual = dp.transform(stock, dp.Identity())(**batch).logits
    # Softmax and rotary tables in float32, whatever the model.
    limit = 1e-4 if name in ("gemma2", "gpt_oss", "llama4_text") else 1e-9
    if name in MIXING:
        wanted = torch.cat([stock(input_ids=x, use_cache=False).logits[0] for x in pieces(batch["input_ids"])]).view_as(actual)
    else:
        wanted = stock(**batch, use_cache=False).logits
    torch.testing.assert_close(actual, wanted, rtol=limit, atol=limit)
    mixed = stock(input_ids=batch["input_ids"], use_cache=False).logits
    assert (mixed - wanted)[:, LENGTHS[0][0] :].abs().max() > 1e-3


@pytest.mark.parametrize("level", ["eager", "scheduled"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "llama4_text", "gpt_oss"])
def test_feedback_starts_anew_with_every_segment(name, level):
    model = transformed(spec(group=2), name, level)
    batch = packed()
    parts = pieces(model(**batch).logits)
    assert model.depth_ran == ((model.depth_program, len(ALL)),)
    ran = {(r.level, r.tokens) for r in model.depth_lowered}
    mine, wanted = gradients(model, parts), alone(model, batch["input_ids"])
    # Norms, softmax and rotary tables that compute in float32 whatever they are given.
    limit = 1e-9 if name in ("llama", "gpt2") else 1e-5
    assert_close(parts, wanted, limit)
    assert_same_gradients(mine, gradients(model, wanted), 10 * limit)
    # Segments of more than half the padded width of a group run in it; the level is that of any other call.
    assert {r for r, _ in ran} <= {level, "eager"} and max(n for _, n in ran) == max(ALL)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program(program):
    model = transformed(PROGRAMS[program])
    batch = packed()
    out = model(**batch)
    ran, parts = model.depth_ran, pieces(out.logits)
    assert sum(rows for _, rows in ran) == len(ALL)
    assert len(ran) == (len({max(1, (n - 1).bit_length()) for n in ALL}) if "growing" in program else 1)
    mine, wanted = gradients(model, parts), alone(model, batch["input_ids"])
    assert_close(parts, wanted)
    assert_same_gradients(mine, gradients(model, wanted))
    for name, tap in getattr(out, "taps", {}).items():
        assert_close(pieces(tap), alone(model, batch["input_ids"], lambda o, name=name: o.taps[name]))
    joined = model.model(**batch).last_hidden_state
    torch.testing.assert_close(model.lm_head(joined), out.logits, rtol=1e-9, atol=1e-9)


def test_segments_in_packed_rows_differ_from_one_long_row():
    """What the other tests compare with is worth comparing with: nothing here is blind to what came before."""
    batch = packed()
    for passes in (spec(group=2), PROGRAMS["plt"], PROGRAMS["growing"], PROGRAMS["mor"]):
        model = transformed(passes)
        whole, cut = model(input_ids=batch["input_ids"]).logits, model(**batch).logits
        assert (whole - cut)[:, LENGTHS[0][0] :].abs().max() > 1e-3


def test_losses_of_routers_are_means_over_all_tokens():
    """And a loss is none of the label that a segment starts with."""
    model = transformed(PROGRAMS["mor"]).train()
    batch = packed()
    ids = batch["input_ids"]
    out = model(**batch, labels=ids)
    tokens, rows = torch.tensor(ALL, dtype=torch.float64), []
    for x in pieces(ids):
        rows.append(model(input_ids=x, labels=x).losses)
    for name, value in out.losses.items():
        wanted = torch.stack([r[name] for r in rows]).detach() @ tokens / tokens.sum()
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-9, atol=1e-12)
    logits = torch.cat([model(input_ids=x).logits[0, :-1] for x in pieces(ids)])
    plain = torch.nn.functional.cross_entropy(logits.float(), torch.cat([x[0, 1:] for x in pieces(ids)]))
    assert float(out.loss.detach()) == pytest.approx(float((plain + out.losses_total).detach()), rel=1e-6)
    separated = ids.masked_fill(batch["position_ids"] == 0, -100)
    assert torch.equal(model(**batch, labels=separated).loss, out.loss)
    # As a Trainer asks for it: a share of all labels of the step.
    count = int((separated != -100).sum())
    shared = model(**batch, labels=ids, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(shared, out.loss / 2, rtol=1e-6, atol=0.0)
    # By position in the argument list, too.
    assert torch.equal(model(ids, None, batch["position_ids"], None, None, ids).loss, out.loss)


def boundaries():
    ends = torch.tensor([0, *ALL]).cumsum(0).int()
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in LENGTHS]).int()
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(ALL), "max_length_k": max(ALL)}
    return {"lengths": lengths, "numbers": {"seq_idx": numbers}, "both": {**lengths, "seq_idx": numbers}}


@pytest.mark.parametrize("told", ["lengths", "numbers", "both"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_keywords_of_variable_length_attention(name, told):
    _, turbo = pair(name)
    batch, words = packed(), boundaries()[told]
    wanted = turbo(**batch).logits
    assert torch.equal(turbo(**batch, **words).logits, wanted)
    assert torch.equal(turbo(input_ids=batch["input_ids"], **words).logits, wanted)
    labels = batch["input_ids"]
    assert torch.equal(turbo(input_ids=labels, labels=labels, **words).loss, turbo(**batch, labels=labels).loss)
    # Numbers that go on through the row are positions, and no news about where sequences start.
    on = torch.arange(23)[None]
    moved = turbo(input_ids=batch["input_ids"], position_ids=on, **words).logits
    starts = [turbo(input_ids=x, position_ids=p).logits for x, p in zip(pieces(labels), pieces(on.expand(2, -1)))]
    assert_close(pieces(moved), starts, 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("program", ["turbo", "mor", "pads", "growing"])
def test_padding_around_and_inside_segments(side, program):
    """A 2-D mask with positions that restart: rows of other lengths, and one that is not packed at all."""
    model = transformed({"turbo": spec(group=2), **PROGRAMS}[program])
    lengths = [[4, 7, 2], [9], [1, 3]]
    width = max(map(sum, lengths)) + 1
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    positions, rows = torch.ones(3, width, dtype=torch.long), []
    for r, row in enumerate(lengths):
        at = 0 if side == "right" else width - sum(row)
        for n in row:
            rows.append((r, slice(at, at + n)))
            ids[r, at : at + n] = torch.randint(3, zoo.VOCABULARY, (n,), generator=torch.Generator().manual_seed(at + r))
            mask[r, at : at + n], positions[r, at : at + n] = 1, torch.arange(n)
            at += n
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    actual = [out.logits[r, s][None] for r, s in rows]
    mine = gradients(model, actual)
    wanted = [model(input_ids=ids[r, s][None], use_cache=False).logits for r, s in rows]
    assert_close(actual, wanted)
    assert_same_gradients(mine, gradients(model, wanted))
    assert bool(out.logits.isfinite().all())
    # A hole in a segment is padding of its row, as it is in the segment alone.
    r, s = rows[1]
    mask[r, s.start + 2] = 0
    actual = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[r, s]
    hole = {"attention_mask": mask[r, s][None], "position_ids": positions[r, s][None]}
    keep = mask[r, s].bool()
    torch.testing.assert_close(actual[keep], model(input_ids=ids[r, s][None], **hole).logits[0, keep], rtol=1e-9, atol=1e-9)


def test_the_masks_ones_change_nothing_and_gaps_are_no_starts():
    _, turbo = pair("llama")
    batch = packed()
    assert torch.equal(turbo(**batch, attention_mask=torch.ones(2, 23)).logits, turbo(**batch).logits)
    ids, far = zoo.batch([8])["input_ids"], torch.arange(0, 16, 2)[None]
    # Without a mask transformers takes every jump for another sequence, with one it does not.
    stock, same = pair("llama")[0], dp.transform(pair("llama")[0], dp.Identity())
    call = {"input_ids": ids, "position_ids": far, "use_cache": False}
    torch.testing.assert_close(same(input_ids=ids, position_ids=far).logits, stock(**call).logits, rtol=1e-4, atol=1e-4)
    masked = {**call, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(same(**masked).logits, stock(**masked).logits, rtol=1e-4, atol=1e-4)
    assert (stock(**masked).logits - stock(**call).logits).abs().max() > 1e-2


def test_embeddings_hidden_states_and_checkpoints():
    model = transformed(spec(group=2))
    batch = packed()
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    out = model(inputs_embeds=embeds, position_ids=batch["position_ids"], output_hidden_states=True)
    assert_close(pieces(out.logits), alone(model, batch["input_ids"]))
    for i, state in enumerate(out.hidden_states):
        wanted = alone(model, batch["input_ids"], lambda o, i=i: o.hidden_states[i], output_hidden_states=True)
        assert_close(pieces(state), wanted)
    out.logits.square().sum().backward()
    rows = [x.detach().requires_grad_() for x in pieces(embeds)]
    sum(model(inputs_embeds=x).logits.square().sum() for x in rows).backward()
    assert_close(pieces(embeds.grad), [x.grad for x in rows], 1e-8)
    mine = gradients(model, pieces(model(**batch).logits))
    model.train().gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, pieces(model(**batch).logits)), mine)


def test_hooks_see_every_visit_once_per_chunk_whatever_the_lengths():
    model = transformed(dp.LayerProgram([0, 1, 2, 1]))
    batch, seen = packed(), []
    wanted = model(**batch).logits
    with (
        model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(a[0].shape)),
        pytest.warns(UserWarning, match="hooks on or in block 1 were called 2 times"),
    ):
        actual = model(**batch).logits
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    assert [tuple(s[:2]) for s in seen] == [(len(ALL), max(ALL))] * 2
    with model.model.layers[1].mlp.register_forward_hook(lambda m, a, o: 2 * o):
        actual = model(**batch).logits
        assert_close(pieces(actual), alone(model, batch["input_ids"]))
    assert (actual - wanted).abs().max() > 1e-3


def test_padding_between_segments_is_bounded():
    for widths in ([4000, *[40] * 100], list(range(1, 200)), [7] * 9, [1], [512, 1], [3, 1000, 2, 999, 5]):
        groups = _similar(list(range(len(widths))), widths)
        assert sorted(i for g in groups for i in g) == list(range(len(widths)))
        assert sum(len(g) * max(widths[i] for i in g) for g in groups) <= 2 * sum(widths)
        assert len(groups) <= 1 + max(widths).bit_length()
    assert len(_similar([0, 1, 2], [9, 8, 5])) == 1
    assert [len(g) for g in _powers(list(range(11)))] == [8, 2, 1] and _powers([3, 4, 5]) == [[3, 4], [5]]


@settings(max_examples=150)
@given(st.data())
def test_segments_are_where_a_plain_loop_finds_them(data):
    """Any rows of real tokens, padding and boundaries: starts, positions, sizes, and the way there and back."""
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    real = [data.draw(flags.filter(any)) for _ in range(batch)] if data.draw(st.booleans()) else [[True] * tokens] * batch
    breaks, gaps = [data.draw(flags) for _ in range(batch)], data.draw(st.booleans())
    wanted, positions = [], torch.full((batch, tokens), 5)
    for r in range(batch):
        row: list[list[int]] = []
        for c in range(tokens):
            if real[r][c]:
                if breaks[r][c] or not row:
                    row.append([])
                row[-1].append(c)
                positions[r, c] = len(row[-1]) - 1
        wanted += [(r, columns) for columns in row]
    mask = None if all(map(all, real)) else torch.tensor(real)
    actual = find_packing({}, positions, mask, gaps, (batch, tokens), positions.device)
    if len(wanted) == batch:
        assert actual is None
        return
    assert actual.first.tolist() == [r * tokens + columns[0] for r, columns in wanted]
    assert actual.widths.tolist() == [columns[-1] - columns[0] + 1 for _, columns in wanted]
    assert actual.tokens == [len(columns) for _, columns in wanted]
    x, parts = torch.randn(batch, tokens, 2), []
    for rows in actual.rows(None, powers=data.draw(st.booleans())) if data.draw(st.booleans()) else actual.fixed_rows(2):
        taken = rows.take(x, 7.0)
        for i, number in enumerate(rows.segments.tolist()):
            r, columns = wanted[number]
            row = torch.full_like(taken[i], 7.0)
            row[[c - columns[0] for c in columns]] = x[r, columns]
            assert torch.equal(taken[i], row)
        parts.append((rows, taken))
    back, inside = actual.join(parts), torch.zeros(batch, tokens)
    for r, columns in wanted:
        assert torch.equal(back[r, columns], x[r, columns])
        inside[r, columns[0] : columns[-1] + 1] = 1
    assert torch.equal(back[inside == 0], torch.zeros_like(back[inside == 0]))
    assert torch.equal(actual.inside.view(batch, tokens), inside.bool())


def test_the_ledger_counts_what_ran():
    """Attention is paid within segments: less than for one long row of as many tokens, more than for none."""
    from depthpass.hf.training.ledger import Counter

    model, batch = transformed(dp.LayerProgram([0, 1, 2, 1])).train(), packed([[16, 16, 16]])
    counter = Counter(model)
    model(**batch)
    cut = counter.close(1)
    model(input_ids=batch["input_ids"].view(3, 16))
    rows = counter.close(2)
    model(input_ids=batch["input_ids"])
    whole = counter.close(3)
    counter.remove()
    assert (cut.flops, cut.tokens, cut.visits) == (rows.flops, rows.tokens, rows.visits) and cut.flops < whole.flops


def test_what_contradicts_itself_is_refused_by_name():
    _, turbo = pair("llama")
    batch, words = packed(), boundaries()
    lengths, ids = words["lengths"], batch["input_ids"]
    ends = lengths["cu_seq_lens_q"]
    cache = dp.DepthCache(turbo)
    for arguments, message in [
        ({**batch, "use_cache": True}, "use_cache: the rows of this call are packed"),
        ({**batch, "past_key_values": cache}, "past_key_values: the rows of this call are packed"),
        ({**batch, "cu_seq_lens_q": torch.tensor([0, 23, 46])}, "position_ids: restart at column 6 of row 0"),
        ({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 20, 46])}, "goes over the end of a row"),
        ({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 23])}, "cumulative lengths from 0 to 46"),
        ({"input_ids": ids, "cu_seq_lens_q": ends, "cu_seq_lens_k": torch.tensor([0, 23, 46])}, "cu_seq_lens_k: differs"),
        ({"input_ids": ids, **lengths, "max_length_k": 3}, "max_length_k: expected at least 11"),
        ({"input_ids": ids, "max_length_q": 3}, "max_length_q: expected cu_seq_lens_q"),
        ({"input_ids": ids, "seq_idx": torch.zeros(2, 4, dtype=torch.int)}, "seq_idx: expected shape"),
        ({"input_ids": ids, "seq_idx": torch.zeros(2, 23)}, "seq_idx: expected integers"),
        ({"input_ids": ids, **lengths, "seq_idx": torch.zeros(2, 23, dtype=torch.int)}, "seq_idx: numbers other sequences"),
    ]:
        with pytest.raises(InputError, match=message):
            turbo(**arguments)
        with pytest.raises(InputError, match=message):
            turbo.model(**arguments)
    with pytest.raises(InputError, match="the rows of this call are packed"):
        turbo.generate(**batch, max_new_tokens=2, do_sample=False)
    pads = transformed(PROGRAMS["pads"])
    with pytest.raises(InputError, match="one for each of the 9 sequences"):
        pads(**batch, prompt_length=torch.tensor([1, 2]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap_rows_that_restart_are_refused_and_others_run():
    _, turbo = pair("llama")
    ids = zoo.batch([8, 8, 8])["input_ids"][:, None]
    on = torch.arange(8).expand(3, 1, 8)
    run = torch.func.vmap(lambda i, p: turbo(input_ids=i, position_ids=p, use_cache=False).logits)
    wanted = turbo(input_ids=ids[:, 0], use_cache=False).logits
    torch.testing.assert_close(run(ids, on)[:, 0], wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"restart inside a row .*vmap"):
        run(ids, on % 5)


def test_later_tokens_of_a_cache_may_not_start_a_sequence():
    _, turbo = pair("llama")
    ids, cache = zoo.batch([8])["input_ids"], dp.DepthCache(pair("llama")[1])
    turbo(input_ids=ids[:, :4], past_key_values=cache)
    with pytest.raises(InputError, match="past_key_values: the rows of this call are packed"):
        turbo(input_ids=ids[:, 4:], position_ids=torch.tensor([[4, 5, 0, 1]]), past_key_values=cache)
    assert cache.get_seq_length() == 4


def test_prompts_of_segments_end_where_each_one_says():
    model = transformed(PROGRAMS["pads"])
    batch = packed()
    prompts = torch.tensor([max(1, n // 2) for n in ALL])
    parts = pieces(model(**batch, prompt_length=prompts).logits)
    wanted = [model(input_ids=x, prompt_length=int(p), use_cache=False).logits
              for x, p in zip(pieces(batch["input_ids"]), prompts)]
    assert_close(parts, wanted)
    labels = torch.cat([torch.cat((torch.full((int(p),), -100), x[0, int(p) :]))
                        for x, p in zip(pieces(batch["input_ids"]), prompts)]).view(2, 23)
    assert torch.equal(model(**batch, labels=labels).logits, model(**batch, prompt_length=prompts).logits)


def examples(count=8):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, zoo.VOCABULARY, (3 + 5 * i % 9,), generator=generator).tolist()} for i in range(count)]


@pytest.mark.parametrize("more", [
    {}, {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    {"return_position_ids": False, "return_flash_attn_kwargs": True}, {"return_position_ids": False, "return_seq_idx": True},
], ids=["positions", "all", "lengths", "numbers"])
def test_the_flattening_collator(more):
    """The loss over a flattened batch is the mean over the labels of all its examples, and so are its gradients."""
    from transformers import DataCollatorWithFlattening

    model = transformed(spec(group=2)).train()
    batch = DataCollatorWithFlattening(return_tensors="pt", **more)(examples())
    assert batch["input_ids"].shape[0] == 1
    out = model(**batch)
    out.loss.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = [torch.tensor(e["input_ids"])[None] for e in examples()]
    count = sum(x.shape[1] - 1 for x in rows)
    loss = sum(model(input_ids=x, labels=x).loss * (x.shape[1] - 1) for x in rows) / count
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0.0)
    assert_same_gradients(mine, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, 1e-5)


def test_training_on_flattened_batches_is_training_on_padded_ones(tmp_path):
    """transformers' Trainer with accumulation and evaluation: the same weights, step by step."""
    pytest.importorskip("accelerate")
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    def pad(rows):
        width = max(len(r["input_ids"]) for r in rows)
        ids = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows])
        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 0] = -100  # no token predicts it; Trainer counts labels
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    seen = []
    for collate in (DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True), pad):
        model = transformed(spec(group=2))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], use_cpu=True, seed=0, disable_tqdm=True, lr_scheduler_type="constant",
            save_strategy="no", optim="sgd", per_device_eval_batch_size=4,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=examples(12), eval_dataset=examples(4),
                          data_collator=collate)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = trainer.train().training_loss
        seen.append((loss, trainer.evaluate()["eval_loss"], {n: p.detach() - before[n] for n, p in model.named_parameters()}))
    (one, mean, moved), (other, wanted, steps) = seen
    assert one == pytest.approx(other, rel=1e-5) and mean == pytest.approx(wanted, rel=1e-4)
    assert all(moved[n].abs().max() > 0 for n in moved if n.startswith("depth"))
    assert_same_gradients(moved, steps, 1e-4)


def test_trl_without_padding_is_trl_with_padding(tmp_path, monkeypatch):
    """SFTTrainer hands over positions, lengths and numbers at once, and may call the decoder alone."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(zoo.VOCABULARY)}, unk_token="3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", bos_token="1", eos_token="2", unk_token="3")
    seen = []
    for options in ({"padding_free": True, "max_length": None}, {}, {"packing": True, "max_length": 64}):
        model = transformed(spec(group=2))
        before, ran = {n: p.detach().clone() for n, p in model.named_parameters()}, []
        model.register_forward_hook(lambda m, a, o, ran=ran: ran.append(sum(rows for _, rows in m.depth_ran)))
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", optim="sgd", lr_scheduler_type="constant",
            shuffle_dataset=False, gradient_checkpointing=False, **options,
        )
        rows = datasets.Dataset.from_list(examples(12))
        trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
        seen.append(({n: p.detach() - before[n] for n, p in model.named_parameters()}, ran))
    (free, counts), (padded, _), (_, packed_counts) = seen
    assert counts == [3, 3] and max(packed_counts) > 3
    assert all(g.abs().max() > 0 for n, g in padded.items() if n.startswith("depth"))
    assert_same_gradients(free, padded, 1e-4)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_inductor_level():
    """Chunks are compiled once per number of rows, so sequences run in groups of 1, 2, 4, ... rows."""
    slow, fast = transformed(spec(group=2), level="eager"), transformed(spec(group=2), level="inductor")
    batch = packed()
    assert_close(pieces(fast(**batch).logits), pieces(slow(**batch).logits), 1e-5)  # norms compute in float32
    assert {rows for _, rows, _ in fast._depth.ran} <= {1, 2, 4, 8} and sum(r for _, r, _ in fast._depth.ran) == len(ALL)
    labels = batch["input_ids"]
    runs = []
    for model in (slow, fast):
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        runs.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same_gradients(runs[1], runs[0], 1e-4)


def test_fixed_point_sweeps():
    model = transformed(spec(group=2))
    batch = packed()
    wanted = model(**batch).logits
    swept = dp.transform(dp.restore(model), spec(group=2), schedule=dp.FixedPoint())
    swept.depth.load_state_dict(model.depth.state_dict())
    out = swept(**batch)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-6, atol=1e-6)
    assert out.sweeps


def _blocks(numbers, window=None, ahead=0):
    """Which columns see which: causal inside each number, a window, or so many later ones."""
    at = torch.arange(len(numbers))
    seen = (numbers[:, None] == numbers) & (at <= at[:, None] + ahead) & (numbers > 0)
    return seen if window is None else seen & (at[:, None] - at < window)


@pytest.mark.parametrize("kind", ["bool", "added", "by layer"])
def test_segments_by_a_dense_mask(kind):
    """A block-diagonal mask over positions that go on: what the stock model makes of it, also with padding in front."""
    model = transformed(PROGRAMS["loop"])
    stock = dp.restore(model)
    same = dp.transform(stock, dp.Identity())
    ids = packed([[4, 1, 6]])["input_ids"].repeat(2, 1)
    numbers = torch.tensor([[1] * 4 + [2] + [3] * 6, [0] * 2 + [5] * 3 + [6] * 6])
    seen = torch.stack([_blocks(row) for row in numbers])[:, None]
    mask = seen if kind != "added" else torch.zeros(seen.shape).double().masked_fill(~seen, torch.finfo(torch.float64).min)
    real = numbers > 0
    given = {"attention_mask": {"full_attention": mask} if kind == "by layer" else mask, "use_cache": False}
    if kind != "by layer":
        stock_seen = seen | torch.eye(11, dtype=torch.bool) if kind == "bool" else mask
        want = stock(ids, attention_mask=stock_seen, position_ids=torch.arange(11)[None].expand(2, -1)).logits
        torch.testing.assert_close(same(ids, **given).logits[real], want[real], rtol=1e-6, atol=1e-6)
    out = model(ids, **given).logits
    for actual, row, part in zip(out, ids, numbers, strict=True):
        for n in sorted(set(part.tolist()) - {0}):
            assert_close([actual[part == n]], [model(row[part == n][None], use_cache=False).logits[0]])


def test_dense_masks_that_say_more_are_refused():
    model = transformed(PROGRAMS["loop"], "mistral")
    ids, numbers = torch.arange(5, 13)[None], torch.tensor([1] * 5 + [2] * 3)
    windowed = _blocks(numbers, window=4)
    torch.testing.assert_close(model(ids, attention_mask=windowed[None, None], use_cache=False).logits,
                               model(ids, seq_idx=numbers[None], use_cache=False).logits)
    for mask in (_blocks(numbers), _blocks(numbers, 4, ahead=1), windowed.double(), -windowed.double()):
        with pytest.raises(InputError, match="expected a 2-D mask"):
            model(ids, attention_mask=mask[None, None], use_cache=False)


def test_dense_masks_about_cached_tokens():
    """What an outer class hands on while it decodes: the same tokens as a 2-D mask says, or refused."""
    model = transformed(PROGRAMS["loop"], "mistral")
    valid = torch.tensor([[1] * 9, [0] * 2 + [1] * 7]).bool()
    ids = torch.arange(5, 23).view(2, 9) * valid
    dense = (valid[:, None] & torch.stack([_blocks(torch.ones(9), window=4)] * 2))[:, None]
    want = model(ids, attention_mask=valid.long(), use_cache=False).logits[:, 6:]
    for form in (dense, torch.zeros(dense.shape).double().masked_fill(~dense, torch.finfo(torch.float64).min)):
        cache = dp.DepthCache(model)
        model(ids[:, :6], attention_mask=valid[:, :6].long(), past_key_values=cache)
        more = [model(ids[:, a:b], attention_mask=form[:, :, a:b, :b], past_key_values=cache).logits for a, b in ((6, 8), (8, 9))]
        assert_close([torch.cat(more, 1)], [want])
    cache = dp.DepthCache(model)
    model(ids[:, :8], attention_mask=valid[:, :8].long(), past_key_values=cache)
    for hidden in (dense & (torch.arange(9) != 6), dense | (torch.arange(9) == 2)):
        with pytest.raises(InputError, match="not causal"):
            model(ids[:, 8:], attention_mask=hidden[:, :, 8:], past_key_values=cache)
