"""Run by test_distributed.py in two processes: prints one line of JSON per case, from the first process."""

import json
import os
import types
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
import zoo
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from captured_once import captured_once
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from turbos import enliven

import depthpass as dp

warnings.simplefilter("ignore")
torch.set_num_threads(1)
SHARING = captured_once()
SHARING.__enter__()  # sharded modules have classes of their own, and so captures of their own
dist.init_process_group("gloo")
RANK, MESH = dist.get_rank(), init_device_mesh("cpu", (2,))
IDS = zoo.batch([9] * 4, seed=5)["input_ids"]
MINE = IDS[2 * RANK : 2 * RANK + 2]
LOOP = dp.Loop(1, 2, 3, lora_rank=2)
SPECS = {
    "turboconn": dp.TurboConn(bridges=[(2, 0), (2, 1)], group=3, rank=6), "loop": LOOP, "feedback": dp.FeedbackTransformer(),
    "t2mlr and latents": [dp.T2MLR(start=1, end=2), dp.Coconut(2, after=3)], "relaxed": dp.RelaxedRecursion(times=3, rank=2),
    "diffusion": [LOOP, dp.MaskedDiffusion(steps=2, mask_token=4, block=3)],
}
SAVED = ("root", "accelerate, wrapped")
CASES = {
    "turboconn": ("root", "parts", "accelerate, wrapped"), "loop": ("ddp, enabled", "accelerate, wrapped"),
    "feedback": ("decoder",), "t2mlr and latents": ("enabled",), "relaxed": ("blocks",), "diffusion": ("ddp, enabled",),
}


def transformed(spec, dtype=torch.float64, live=True):
    model = dp.transform(enliven(zoo.model("llama", 3, dtype=dtype)), spec)
    if live:
        enliven(model.depth, seed=1, least=1)
    return model.train()


def say(case, **actual):
    if RANK == 0:
        print(json.dumps({"case": case, **actual}), flush=True)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def loss(model, ids):
    """Of the labels, or of the logits where tokens see later ones."""
    if getattr(model, "module", model).depth_program.ahead is not None:
        return model(input_ids=ids).logits.square().mean()
    return model(input_ids=ids, labels=ids).loss


def gradients(model, wanted):
    """Largest difference, largest gradient, and largest gradient of a new parameter."""
    named = zip(model.named_parameters(), wanted.parameters(), strict=True)
    pairs = [(n, whole(p.grad), q.grad) for (n, p), q in named if q.grad is not None]
    return {
        "gradients": max((a - b).abs().max().item() for _, a, b in pairs),
        "largest": max(b.abs().max().item() for *_, b in pairs),
        "moved": max((b.abs().max().item() for n, _, b in pairs if "depth." in n), default=0.0),
    }


def accelerated(model, wrapped=False, policy=None):
    """As Accelerator.prepare shards a model: it does not offer FSDP on the CPU, so its parts are called."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False, reshard_after_forward=True,
    )
    plugin.mixed_precision_policy = policy
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    fake = types.SimpleNamespace(
        state=state, torch_device_mesh=None, mixed_precision="no", is_main_process=RANK == 0, device=torch.device("cpu")
    )
    if wrapped:
        plugin.set_auto_wrap_policy(model)
        model = fsdp2_apply_ac(fake, model)
    return fsdp2_prepare_model(fake, model)


def blocks(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=MESH)
    return fully_shard(model, mesh=MESH)


def decoder(model):
    for module in (*model.model.layers, model.model):
        fully_shard(module, mesh=MESH)
    return fully_shard(model, mesh=MESH)


def parts(model):
    """Everything that can be a unit of its own."""
    for module in model.depth.modules():
        if any(True for _ in module.parameters(recurse=False)):
            fully_shard(module, mesh=MESH)
    fully_shard(model.depth, mesh=MESH)
    for layer in model.model.layers:
        fully_shard(layer.mlp, mesh=MESH)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        fully_shard(module, mesh=MESH)
    return blocks(model)


def enabled(model):
    model.gradient_checkpointing_enable()
    return model


UNITS = {
    "root": lambda m: fully_shard(m, mesh=MESH), "blocks": blocks, "decoder": decoder, "parts": parts,
    "accelerate, wrapped": lambda m: accelerated(m, True),
    "enabled": lambda m: blocks(enabled(m)),
    "ddp, enabled": lambda m: torch.nn.parallel.DistributedDataParallel(enabled(m), static_graph=True),
}


def emitted(spec):
    """The written model, without depthpass: later visits are calls of the units of the first ones."""
    import transformers

    transformers.dynamic_module_utils.HF_MODULES_CACHE = f"modules {RANK}"
    path = f"emitted_{len(os.listdir())}_{RANK}"
    dp.emit(transformed(spec), path)
    return transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float64).train()


def wrapped(model):
    kinds = {type(layer) for layer in model.model.layers}
    apply_activation_checkpointing(model, check_fn=lambda m: type(m) in kinds)
    return blocks(model)


for name, spec in {"loop": dp.Loop(1, 2, 3, lora_rank=2, timestep=True), "plt": dp.ParallelLoop(loops=2, window=3)}.items():
    wanted = emitted(spec)
    wanted(input_ids=IDS, labels=IDS).loss.backward()
    model = (wrapped if name == "plt" else blocks)(emitted(spec))
    for _ in range(2):
        model.zero_grad()
        model(input_ids=MINE, labels=MINE, use_cache=False).loss.backward()
    more = gradients(model, wanted)
    options = {"max_new_tokens": 3, "do_sample": False}
    more["tokens"] = torch.equal(model.eval().generate(MINE, **options), wanted.eval().generate(MINE, **options))
    say(f"emitted {name}", **more)

for program, spec in SPECS.items():
    wanted = transformed(spec)
    loss(wanted, IDS).backward()
    for number, name in enumerate(CASES[program]):
        model, shard = transformed(spec), UNITS[name]
        if number % 2:
            loss(model, MINE)
        model = shard(model)
        for _ in range(2):
            model.zero_grad()
            loss(model, MINE).backward()
        more = {}
        if name in SAVED:
            more = gradients(model, wanted)
            model.eval(), wanted.eval()
            options = {"max_new_tokens": 3, "do_sample": False}
            more["tokens"] = torch.equal(model.generate(MINE, **options), wanted.generate(MINE, **options))
            with torch.no_grad():
                hidden = wanted.model(input_ids=MINE).last_hidden_state
                more["decoder"] = (model.model(input_ids=MINE).last_hidden_state - hidden).abs().max().item()
            model.save_pretrained(f"{program} {name}")
            dist.barrier()
            loaded = dp.from_pretrained(f"{program} {name}")
            more["saved"] = (loaded(input_ids=MINE).logits - wanted(input_ids=MINE).logits).abs().max().item()
            wanted.train()
        say(f"{program} {name}", **(more or gradients(model, wanted)))

spec = SPECS["turboconn"]
wanted, model = transformed(spec), blocks(transformed(spec))
for one, ids in ((wanted, IDS), (model, MINE)):
    one.model(input_ids=ids).last_hidden_state.square().mean().backward()
say("decoder alone", **gradients(model, wanted))

wanted, model = transformed(spec), blocks(transformed(spec))
wanted(input_ids=IDS, labels=IDS).loss.backward()
for last in (False, True):
    model.set_requires_gradient_sync(last)
    ids = MINE[int(last) : int(last) + 1]
    model(input_ids=ids, labels=ids).loss.div(2).backward()
say("accumulated", **gradients(model, wanted))

checkpoints.save({"model": get_model_state_dict(model)}, checkpoint_id="dcp")
other = transformed(spec)
with torch.no_grad():
    for p in other.parameters():
        p.zero_()
blocks(other)
state = {"model": get_model_state_dict(other)}
checkpoints.load(state, checkpoint_id="dcp")
set_model_state_dict(other, state["model"])
difference = (other(input_ids=MINE).logits - wanted(input_ids=MINE).logits).abs().max().item()
say("checkpoint", difference=difference, sharded=len([f for f in os.listdir("dcp") if f.endswith(".distcp")]) == 2)

policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
stock = accelerated(enliven(zoo.model("llama", 3)), policy=policy)
expected = stock(input_ids=MINE, labels=MINE)
expected.loss.backward()
for warm in (False, True):
    model = transformed(dp.Loop(1, 2, 1), torch.float32)
    if warm:
        model(input_ids=MINE, labels=MINE)
    out = accelerated(model, policy=policy)(input_ids=MINE, labels=MINE)
    out.loss.backward()
    equal = all(torch.equal(p.grad.full_tensor(), q.grad.full_tensor()) for p, q in zip(model.parameters(), stock.parameters()))
    say(f"bfloat16 {warm}", dtype=str(out.logits.dtype), logits=torch.equal(out.logits, expected.logits), gradients=equal)

for flat in ("one", "parameters", "blocks"):
    model, policy = transformed(spec), ModuleWrapPolicy({LlamaDecoderLayer}) if flat == "blocks" else None
    loss(model, MINE)
    wrapped = FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=flat != "one", auto_wrap_policy=policy)
    try:
        wrapped(input_ids=MINE, labels=MINE)
    except dp.UnsupportedModelError as error:
        say(f"flat {flat}", error=str(error))

dist.destroy_process_group()
