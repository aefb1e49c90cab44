"""Layer programs baked into stock checkpoints, and the readers of other tools' depth formats, end to end."""

import warnings

import pytest
import torch
import zoo
from transformers import AutoConfig, AutoModelForCausalLM
from turbos import enliven

import depthpass as dp

# Every repeated block is copied, which it says; one test looks at that.
pytestmark = pytest.mark.filterwarnings("ignore:materialize")

PROGRAM = [0, 2, 1, 2, 1, 3, 3]


def stock_of(name, layers=4, **more):
    return enliven(zoo.model(name, layers, **more), std=0.2)


def logits(model):
    with torch.no_grad():
        return model(**zoo.batch([9, 6])).logits


# Every kind of per-layer structure: windows by list, rotary by list, experts, learned positions, tied heads, sinks.
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "smollm3", "mixtral", "gpt2", "opt", "gpt_oss", "llama4_text"])
def test_a_materialised_program_is_a_stock_checkpoint(name, tmp_path):
    stock = stock_of(name)
    model = dp.transform(stock, dp.LayerProgram(PROGRAM))
    before = {k: v.clone() for k, v in stock.state_dict().items()}
    physical = dp.materialize(model)
    assert type(physical) is type(stock) and physical.config.num_hidden_layers == len(PROGRAM)
    assert not hasattr(physical.config, "depthpass") and stock.config.num_hidden_layers == 4
    assert not {id(p) for p in physical.parameters()} & {id(p) for p in stock.parameters()}
    physical.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=stock.config._attn_implementation).eval()
    want = logits(model)
    assert torch.equal(logits(physical), logits(loaded))
    torch.testing.assert_close(logits(loaded)[:, 3:], want[:, 3:], rtol=1e-4, atol=1e-4)
    assert (want - logits(stock))[:, 3:].abs().max() > 1e-3
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    batch = zoo.batch([9, 9])
    assert torch.equal(loaded.generate(**batch, **settings), model.generate(**batch, **settings))
    with torch.no_grad():
        for p in physical.parameters():
            p.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in stock.state_dict().items())


def test_a_decoder_whose_config_counts_an_encoder_too():
    """BART's ``num_hidden_layers`` are the encoder's; caches of transformers go by it, the decoder by ``decoder_layers``."""
    sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = AutoConfig.for_model("bart", vocab_size=97, is_decoder=True, is_encoder_decoder=False, pad_token_id=0, **sizes)
    stock = enliven(AutoModelForCausalLM.from_config(config).eval(), std=0.2)
    model = dp.transform(stock, dp.LayerProgram([0, 1, 1, 2, 2]))
    physical = dp.materialize(model)
    assert physical.config.decoder_layers == 5 and stock.config.decoder_layers == 3
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(physical(ids).logits, model(ids).logits)
        assert (model(ids).logits - stock(ids).logits).abs().max() > 1e-3
    reports = [dp.report(x, dp.LayerProgram([0, 1, 1, 2, 2]), seq_len=8) for x in (config, stock)]
    assert [r.depth for r in reports] == [5, 5]


def test_loops_and_lists_follow(tmp_path):
    stock = stock_of("gemma3_text")
    assert stock.config.layer_types == ["sliding_attention", "full_attention"] * 2
    model = dp.transform(stock, dp.Loop(start=1, end=3, times=3))
    physical = dp.materialize(model)
    assert physical.config.layer_types == [stock.config.layer_types[i] for i in (0, 1, 2, 1, 2, 1, 2, 3)]
    torch.testing.assert_close(logits(physical), logits(model))
    assert dp.materialize(dp.set_loops(model, 1)).config.num_hidden_layers == 4
    torch.testing.assert_close(logits(dp.materialize(model)), logits(stock), rtol=0, atol=0)
    tied = dp.materialize(dp.transform(stock_of("gpt2"), dp.IntraLayerRecurrence([2, 1, 1, 1])))
    assert tied.lm_head.weight is tied.transformer.wte.weight and tied.config.n_layer == 5


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (dp.Loop(1, 2, times=2, lora_rank=2), "with lora, lora_rank of loop"),
        (dp.Loop(1, 2, times=2, kv="first"), "with keys of loop"),
        (dp.Loop(1, 2, times=2, inject="add"), "= add of loop"), (dp.TurboConn(bridges=[(3, 0)], group=2), "turboconn"),
        (dp.Taps(at=[1]), "got tap of taps"), (dp.Loop(1, 2, times=(1, 3)), "dp.set_loops"),
        (dp.ParallelLoop(loops=2), "parallel_loop"), (dp.Loop(1, 2, times=2, out_norm=True), "norm of loop"),
    ],
)
def test_programs_that_no_stack_can_express(spec, word):
    model = dp.transform(stock_of("llama"), spec)
    with pytest.raises(dp.SpecError, match=word):
        dp.materialize(model)
    with pytest.raises(dp.SpecError, match="expected a transformed model"):
        dp.materialize(dp.restore(model))


def test_the_size_is_said():
    stock = stock_of("llama")
    with pytest.warns(UserWarning, match="8 visits of 4 blocks become as many blocks, so the model takes"):
        dp.materialize(dp.transform(stock, dp.Loop(times=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dp.materialize(dp.transform(stock, dp.LayerProgram([3, 0, 1])))


def test_blocks_that_are_fixed_by_depth_are_refused():
    stock = stock_of("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(dp.UnsupportedModelError, match="depend on its place"):
        dp.materialize(dp.transform(stock, dp.LayerProgram([0, 0, 1])))
    peft = pytest.importorskip("peft")
    tuned = dp.transform(peft.get_peft_model(stock_of("llama"), peft.LoraConfig(target_modules=["q_proj"])), dp.Skip(1))
    with pytest.raises(dp.UnsupportedModelError, match="merge_and_unload"):
        dp.materialize(tuned)


@pytest.mark.parametrize(
    ("read", "text", "layers"),
    [
        (dp.LayerProgram.from_mergekit,
         "merge_method: passthrough\ndtype: float32\nslices:\n- sources:\n  - model: m\n    layer_range: [0, 3]\n"
         "- sources:\n  - model: m\n    layer_range: [1, 4]\n", [0, 1, 2, 1, 2, 3]),
        (dp.LayerProgram.from_layer_replication, [[0, 3], [1, 4]], [0, 1, 2, 1, 2, 3]),
        (dp.LayerProgram.from_flat_map, "0:3, 1 2, 3", [0, 1, 2, 1, 2, 3]),
    ],
    ids=["mergekit", "peft", "flat"],
)
def test_readers_end_to_end(read, text, layers):
    """What the file's own tool would build: a stock model whose layer p holds the weights of layer layers[p]."""
    stock = stock_of("qwen2")
    spec = read(text)
    assert list(spec.layers) == layers
    physical = dp.materialize(dp.transform(stock, spec))
    by_hand = zoo.model("qwen2", len(layers))
    state = stock.state_dict()
    by_hand.load_state_dict({
        k: state[k] if ".layers." not in k else
        state[k.replace(f".layers.{k.split('.')[2]}.", f".layers.{layers[int(k.split('.')[2])]}.")]
        for k in by_hand.state_dict()
    })
    assert torch.equal(logits(physical), logits(by_hand))


def test_peft_replicates_the_layers_that_the_reader_says():
    peft = pytest.importorskip("peft")
    ranges = [[0, 3], [1, 4]]
    model = dp.transform(stock_of("llama"), dp.LayerProgram.from_layer_replication(ranges))
    theirs = peft.get_peft_model(
        stock_of("llama"), peft.LoraConfig(target_modules=["q_proj"], layer_replication=ranges, task_type="CAUSAL_LM")
    ).eval()
    assert len(theirs.base_model.model.model.layers) == 6
    with torch.no_grad():
        want = theirs(**zoo.batch([9, 6]), use_cache=False).logits
    torch.testing.assert_close(logits(model)[:, 3:], want[:, 3:], rtol=1e-5, atol=1e-5)


def test_a_config_that_was_saved_names_its_dtype(tmp_path):
    """Apertus makes tensors of its config's dtype, which a save leaves as a word."""
    turbo = dp.transform(zoo.model("apertus", 3), dp.Loop(start=1, end=2, times=2))
    turbo.save_pretrained(tmp_path / "saved")
    assert isinstance(turbo.config.dtype, str)
    dp.emit(turbo, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
