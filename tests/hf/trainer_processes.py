"""Run by test_distributed.py in two processes: Trainer under FSDP2, stopped and resumed; prints JSON from the first process."""

import json
import sys
import warnings

import torch
import torch.distributed as dist
import zoo
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments
from turbos import enliven

import depthpass as dp

SPEC = [dp.Loop(1, 2, 2, lora_rank=2), dp.TurboConn(bridges=[(3, 0), (2, 1)], group=3, rank=6)]
STEPS = 4


def trainer(folder, rows, **more):
    """A fresh model and a Trainer that reads so many rows a step."""
    model = dp.transform(enliven(zoo.model("llama", 4, dtype=torch.float64)), SPEC)
    enliven(model.depth, seed=1, least=1)
    data = [{"input_ids": row, "labels": row} for row in zoo.batch([9] * 32, seed=5)["input_ids"]]
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=rows, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, seed=3, disable_tqdm=True, logging_steps=1, **more,
    )
    return Trainer(model=model, args=settings, train_dataset=data)


def weights(model):
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()}


def gap(one, other):
    return max((one[n] - other[n]).abs().max().item() for n in one)


def _offer_sharding_on_a_cpu():
    """Accelerate reads settings of FSDP for accelerators only."""
    start = PartialState.__init__

    def begin(self, *args, **more):
        start(self, *args, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _offer_sharding_on_a_cpu()
    sharding = {"fsdp": True, "fsdp_config": {
        "version": 2, "fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }}
    first = trainer("first", 2, **sharding)
    first.train()
    there = weights(first.model)
    again = trainer("again", 2, **sharding)
    again.train(resume_from_checkpoint=f"first/checkpoint-{STEPS // 2}")
    resumed = weights(again.model)
    again.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    again.save_model("whole")
    dist.barrier()
    if dist.get_rank() == 0:
        loaded = weights(dp.from_pretrained("whole", dtype=torch.float64))
        torch.save(there, "there.pt")
        print(json.dumps({"sharded": all(hasattr(p, "full_tensor") for p in first.model.parameters()),
                          "resumed": gap(there, resumed), "loaded": gap(resumed, loaded)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
