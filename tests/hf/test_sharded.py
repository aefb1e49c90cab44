"""FSDP2 before the first call: captures are made of the structure, not of shards."""

import pytest
import torch
import torch.distributed as dist
import zoo
from turbos import enliven, turbo_of

fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard

IDS = zoo.batch([9, 9], seed=5)["input_ids"]


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_sharding_and_calling_in_either_order(mesh, warm):
    stock = enliven(zoo.model("llama", 3, dtype=torch.float64))
    wanted = turbo_of(stock)
    wanted(input_ids=IDS, labels=IDS).loss.backward()
    tokens = wanted.generate(IDS, max_new_tokens=3, do_sample=False)
    transformed = turbo_of(enliven(zoo.model("llama", 3, dtype=torch.float64)))
    if warm:
        transformed(input_ids=IDS, labels=IDS)
    shard(transformed, mesh)
    assert any(type(p) is not torch.nn.Parameter for p in transformed.parameters())
    transformed(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), q in zip(transformed.named_parameters(), wanted.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(transformed.generate(IDS, max_new_tokens=3, do_sample=False), tokens)
