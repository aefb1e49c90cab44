"""Layer gradients of a task's answers with and without their traces, on a model trained from scratch (arXiv 2410.23743).

A small Llama-shaped model learns a task from both kinds of rows. Then the nuclear norms of its gradients are compared: answers
alone (fast) against traces that lead to them (slow), and correct answers against answers of other items.

    python examples/layer_gradients.py [--task parity] [--steps 150] [--responses 16]

Takes about a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp
from depthpass import tasks


def responses(task, words, count: int, seed: int):
    """(prompt, answer), (prompt, trace and answer) and (prompt, another item's answer), as token ids."""
    rng = random.Random(seed)
    items = [task.instance(length=rng.randint(4, 7), seed=rng.randrange(1 << 30)) for _ in range(count)]

    def ids(text: str) -> list[int]:
        return words(text, add_special_tokens=False)["input_ids"]

    prompts = [ids(f"{item.prompt}=") for item in items]
    answers = [ids(f"{item.answer};") for item in items]
    traces = [ids(f"{item.trace}|{item.answer};") for item in items]
    return {
        "answer": list(zip(prompts, answers, strict=True)), "trace": list(zip(prompts, traces, strict=True)),
        "wrong answer": list(zip(prompts, answers[1:] + answers[:1], strict=True)),
    }


def train(model, sets, steps: int) -> float:
    """A few steps on answers and traces, one row each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows, rng, total = sets["answer"] + sets["trace"], random.Random(0), 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for prompt, answer in rng.sample(rows, min(8, len(rows))):
            ids = torch.tensor([prompt + answer])
            loss = model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)).loss / 8
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
    return total


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="parity")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--responses", type=int, default=16)
    options = parser.parse_args(arguments)
    words = tasks.tokenizer("char")
    task = tasks.get(options.task)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    ))
    print(f"loss after {options.steps} steps: {train(model, responses(task, words, 200, 1), options.steps):.3f}")
    sets = responses(task, words, options.responses, 2)
    print(dp.gradients(model, sets, projections=["q_proj", "k_proj", "v_proj", "o_proj"]))


if __name__ == "__main__":
    main()
