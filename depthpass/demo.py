"""``depthpass demo``: the main job end to end on a small embedded model, with no download."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def build_model(seed: int = 0):
    """A random Llama-shaped model of eight blocks and width 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def small(kind: str = "llama", blocks: int = 8, folder: str | None = None) -> str:
    """A folder with a random model of width 32 and a tokenizer over bytes, to try a script on before a real checkpoint.

    Args:
        kind: a model type of transformers whose config takes Llama's fields: ``llama``, ``qwen3``, ``mistral``, ...
        blocks: number of decoder blocks.
        folder: where to; None = a new temporary folder.
    """
    import tempfile

    import torch
    from safetensors.torch import save_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = folder or tempfile.mkdtemp(prefix="depthpass-small-")
    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *letters])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=3 + len(letters), hidden_size=32, intermediate_size=64, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    # Not the model's own save_pretrained: of several processes, each with its folder, it writes in the first one alone.
    save_model(model, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
    return folder


def parity_batch(rows: int, length: int, generator):
    """Running parity: token i is a bit (3 or 4), its label the parity (3 or 4) of the bits up to i."""
    import torch

    bits = torch.randint(0, 2, (rows, length), generator=generator)
    return bits + 3, bits.cumsum(-1) % 2 + 3


def run_demo(steps: int = 60, group: int = 4, write=print, on_step=None) -> int:
    """Transform, check against the stock model, report, train a few steps, generate.

    Args:
        write: takes each line.
        on_step: called after every training step with how many are done and how many there are.

    Returns:
        0 when every check passed, else 1.

    Raises:
        SpecError: ``steps`` or ``group`` is below 1.
    """
    from depthpass.errors import SpecError

    if steps < 1:
        raise SpecError(f"steps: expected at least 1, got {steps}.")

    import depthpass as dp

    checks: list[bool] = []

    def check(what: str, ok: bool) -> None:
        write(f"  [{'ok' if ok else 'FAILED'}] {what}")
        checks.append(ok)

    model = build_model().eval()
    spec = dp.TurboConn(bridges=[(6, 1), (4, 0)], group=group, rank=16)
    began = time.perf_counter()
    turbo = dp.transform(model, spec)
    write(f"transform: {type(model).__name__} with 8 blocks, bridges 6 -> 1 and 4 -> 0, group {group} "
          f"({time.perf_counter() - began:.2f} s)\n")
    _compare(model, turbo, check)
    write("")
    write(str(dp.report(turbo, seq_len=22, batch=2)))
    write("")
    turbo = dp.transform(model, spec).train()
    first, last = _train(turbo, steps, on_step)
    write(f"training: running parity, {steps} steps of 16 rows, loss {first:.3f} -> {last:.3f}")
    check("the loss went down", last < first)
    write(f"generate: {_generate(turbo.eval(), check)}")
    write("\nEverything agrees." if all(checks) else "\nSomething does not agree: see FAILED above.")
    return 0 if all(checks) else 1


def _compare(model: Any, turbo: Any, check: Callable[[str, bool], None]) -> None:
    """The transformed model against the stock one, token by token against at once, and back."""
    import torch

    import depthpass as dp

    ids = torch.randint(3, 64, (2, 22), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        check("zero-initialised bridges: same logits as the stock model",
              torch.allclose(turbo(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5))
        for parameter in turbo.depth.parameters():
            parameter.normal_(0.0, 0.1)
        whole = turbo(input_ids=ids).logits
        cache, parts = dp.DepthCache(turbo), []
        for i in range(ids.shape[1]):
            parts.append(turbo(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
        check("one token at a time with a cache: same logits as the whole sequence",
              torch.allclose(torch.cat(parts, 1), whole, atol=1e-4))
        check("the bridges change the function", not torch.allclose(whole, model(input_ids=ids).logits))
        check("the stock model is untouched, and restore() gives it back",
              torch.equal(dp.restore(turbo)(input_ids=ids).logits, model(input_ids=ids).logits))


def _train(turbo: Any, steps: int, on_step: Callable[[int, int], None] | None) -> tuple[float, float]:
    """A few steps of running parity; the first and the last loss."""
    import torch

    optimizer = torch.optim.AdamW(turbo.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(2), []
    for step in range(steps):
        bits, parity = parity_batch(16, 16, generator)
        logits = turbo(input_ids=bits, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), parity.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, steps)
    return losses[0], losses[-1]


def _generate(turbo: Any, check: Callable[[str, bool], None]) -> list[list[int]]:
    """Tokens after a left-padded batch of prompts, the same with and without the cache."""
    import torch

    prompt = torch.tensor([[0, 0, 3, 4, 4], [3, 4, 3, 3, 4]])
    mask = (prompt != 0).long()
    out = turbo.generate(prompt, attention_mask=mask, max_new_tokens=10, do_sample=False)
    plain = turbo.generate(prompt, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=False)
    check("generate with the cache equals generate without it (left-padded batch)", torch.equal(out, plain))
    return out.tolist()
