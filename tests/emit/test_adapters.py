"""What puts other modules in the place of an emitted model's: adapters, copies, offloaded weights."""

import copy
import io

import pytest
import torch
import zoo
from turbos import transformed

import depthpass as dp

peft = pytest.importorskip("peft")
BATCH = zoo.batch([9, 6])
REAL = BATCH["attention_mask"].bool()
POSITIONS = (BATCH["attention_mask"].cumsum(-1) - 1).clamp(min=0)
LOOP = dp.Loop(start=1, end=3, times=3)
pytestmark = pytest.mark.usefixtures("one_capture")


def emitted(model, path, **more):
    from transformers import AutoModelForCausalLM

    dp.emit(model, path)
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=model.dtype, **more).eval()


def logits(model):
    return model(**BATCH, position_ids=POSITIONS).logits[REAL]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "spec", "targets"), [
    ("llama", [LOOP, dp.TurboConn(bridges=((5, 0),), group=3, rank=4)], ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    ("gpt2", dp.ParallelLoop(loops=2, window=3), ["c_attn", "c_proj"]),
])
def test_an_adapter_acts_on_every_visit_and_merges_once(name, spec, targets, tmp_path):
    model = transformed(name, spec)
    written, layers = emitted(model, tmp_path / "out"), model._depth.layers
    blocks = [o["index"] for o in model.depth_program.visits]
    for key, buffer in written.named_buffers():  # rotary tables in the precision that the model was cast to
        buffer.data = model.get_buffer(key).clone()
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
    mine, theirs = (peft.get_peft_model(m, copy.deepcopy(config)).double().eval() for m in (model, written))
    named, generator, pairs = dict(mine.named_parameters()), torch.Generator().manual_seed(0), []
    for key, p in theirs.named_parameters():
        if "lora_" in key:
            head, _, tail = key.partition(f"{layers}.")
            place, _, rest = tail.partition(".")
            pairs.append((p, named[f"{head}{layers}.{blocks[int(place)]}.{rest}"]))
    assert len(pairs) == sum("lora_" in key for key in named)
    with torch.no_grad():
        for p, other in pairs:
            other.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.2)
            p.copy_(other)
    got, want = logits(theirs), logits(mine)
    close(got, want)
    assert (got - logits(emitted(transformed(name, spec), tmp_path / "bare"))).abs().max() > 0.1, "an adapter that acts"
    weight = torch.randn(got.shape, generator=generator, dtype=got.dtype)
    for output in (got, want):
        (output * weight).sum().backward()
    for p, other in pairs:
        close(p.grad, other.grad)
    close(logits(theirs.merge_and_unload()), got.detach())


def test_copies_and_modules_of_ones_own(tmp_path):
    written = emitted(transformed("llama", LOOP), tmp_path / "out")
    layers, want = written.model.layers, logits(written)
    assert len(written.state_dict()) == len(dict(written.named_parameters())), "every weight under one name"
    file = io.BytesIO()
    torch.save(written, file)
    file.seek(0)
    for again in (copy.deepcopy(written), torch.load(file, weights_only=False)):
        assert again.model.layers[3].mlp is again.model.layers[1].mlp is not layers[1].mlp
        torch.testing.assert_close(logits(again), want, rtol=1e-9, atol=1e-9)
        again.model.layers[1].mlp.up_proj.weight.data.zero_()
        assert (logits(again) - want).abs().max() > 0.1
    assert torch.equal(logits(written), want)
    with pytest.raises(NotImplementedError, match="DataParallel copies modules one by one"):
        layers[3]._replicate_for_data_parallel()
    assert copy.deepcopy(layers[3]).mlp is layers[1].mlp, "a layer's copy stays with the weights of its model"
    own = peft.get_peft_model(written, peft.LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"])).double().eval()
    close(logits(own), want)
    for key, p in own.named_parameters():
        if "modules_to_save" in key:
            p.data.mul_(1.5)
    got = logits(own)
    assert (got - want).abs().max() > 0.1
    close(logits(own.merge_and_unload()), got)
    assert layers[3].self_attn.layer_idx == 3


def test_activation_checkpoints(tmp_path):
    """Of visits that read each other's keys: the gradients, or an error that says what to do."""
    built = emitted(transformed("llama", dp.ParallelLoop(loops=2, window=3)), tmp_path / "out").train()
    ids = zoo.batch([9, 9])["input_ids"]

    def gradients():
        built.zero_grad()
        built(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in built.named_parameters()}

    want = gradients()
    built.gradient_checkpointing_enable({"use_reentrant": False})
    for name, grad in gradients().items():
        assert grad.any()
        close(grad, want[name])
    built.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        gradients()
    chunks = emitted(transformed("llama", dp.TurboConn(bridges=((3, 0),), group=3, rank=4)), tmp_path / "chunks")
    with pytest.raises(ValueError, match="does not support"):
        chunks.gradient_checkpointing_enable()
    apply = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper").apply_activation_checkpointing
    apply(chunks, check_fn=lambda m: m in set(chunks.model.layers))
    with pytest.raises(NotImplementedError, match="checkpoint_wrapper"):
        chunks(input_ids=ids)
    with torch.no_grad():
        assert chunks(input_ids=ids).logits.isfinite().all()


def test_offloaded_weights(tmp_path):
    """Sinks are parameters of the attention itself, which accelerate loads when that is called."""
    pytest.importorskip("accelerate")
    model = transformed("gpt_oss", dp.LayerProgram([0, 1, 1, 2, 3, 1]), torch.float32)
    written = emitted(model, tmp_path / "out")
    places = {n: "cpu" for n in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{i}": "disk" if i in (1, 2, 4) else "cpu" for i in range(6)}
    spread = emitted(model, tmp_path / "more", device_map=places, offload_folder=str(tmp_path / "disk"))
    with torch.no_grad():
        assert torch.equal(logits(spread), logits(written))
