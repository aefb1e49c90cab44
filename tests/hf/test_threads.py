"""Two models, two caches, two threads: none disturbs another."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import zoo
from turbos import GROUP, enliven, stock_of, turbo_of

import depthpass as dp

STEPS = 2 * GROUP + 1


def greedy(model, ids, cache, meet=lambda: None):
    """Tokens decoded one by one, with a meeting point before every step."""
    seen, step = [], ids
    with torch.no_grad():
        for _ in range(STEPS):
            meet()
            step = model(input_ids=step, past_key_values=cache).logits[:, -1:].argmax(-1)
            seen.append(step)
    return torch.cat(seen, 1)


def together(*jobs):
    """Run jobs in threads; each gets a function that waits for all of them."""
    barrier, results = threading.Barrier(len(jobs), timeout=120), [None] * len(jobs)

    def work(i, job):
        try:
            results[i] = job(barrier.wait)
        except BaseException as error:
            barrier.abort()
            results[i] = error

    threads = [threading.Thread(target=work, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.usefixtures("one_capture")
def test_interleaved_caches_of_one_model_and_of_two():
    one, two = turbo_of(stock_of("llama")), turbo_of(enliven(stock_of("llama"), seed=5), group=2)
    prompts = [zoo.batch([5, 5], seed=s)["input_ids"] for s in range(2)]
    want = [greedy(m, p, dp.DepthCache(m)) for m in (one, two) for p in prompts]
    assert len({tuple(w.flatten().tolist()) for w in want}) == 4
    # Interleaved in one thread: all caches are alive at once.
    jobs = [(m, p, dp.DepthCache(m)) for m in (one, two) for p in prompts]
    steps = [p for _, p, _ in jobs]
    with torch.no_grad():
        for i in range(STEPS):
            steps = [m(input_ids=s, past_key_values=c).logits[:, -1:].argmax(-1) for (m, _, c), s in zip(jobs, steps)]
            assert all(torch.equal(s[:, 0], w[:, i]) for s, w in zip(steps, want))
    # And in four threads that meet before every step.
    got = together(*(
        lambda meet, m=m, p=p: greedy(m, p, dp.DepthCache(m), meet) for m in (one, two) for p in prompts
    ))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.usefixtures("one_capture")
def test_training_in_two_threads():
    models = [turbo_of(enliven(stock_of("llama"), seed=s)).train() for s in range(2)]
    batch = zoo.batch([9, 5])

    def gradients(model, meet=lambda: None):
        for _ in range(2):
            meet()
            model.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = [gradients(m) for m in models]
    got = together(*(lambda meet, m=m: gradients(m, meet) for m in models))
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(*want, strict=True))


def test_first_calls_at_the_same_time(captures):
    """Nothing is captured yet: two threads share one model, a third has its own, a fourth runs a stock model."""
    one, two, stock = turbo_of(stock_of("llama")), turbo_of(stock_of("qwen3")), stock_of("gpt2")
    batch = zoo.batch([7, 4])

    def call(model, meet):
        meet()
        with torch.no_grad():
            return [model(**batch).logits for _ in range(3)]

    jobs = [one, one, two, stock]
    got = together(*(lambda meet, m=m: call(m, meet) for m in jobs))
    assert len(captures) == 2
    with torch.no_grad():
        for model, actual in zip(jobs, got, strict=True):
            want = model(**batch).logits
            assert all(torch.equal(f, want) for f in actual)


@pytest.mark.parametrize("imported", ["before", "by the thread"])
def test_a_thread_that_made_the_first_capture_may_end(imported):
    """torch 2.11 crashed in the capture that followed, in any thread: in a process of its own."""
    ready = "import torch, zoo, depthpass as dp; ids = torch.arange(3, 9)[None]"
    ready += "; models = [dp.transform(zoo.model(n, 2), dp.Loop(start=0, end=2, times=2)) for n in ('llama', 'gpt2')]"
    lines = (
        "import threading",
        *([ready] if imported == "before" else []),
        "def work():",
        f"    global ids, models; {ready if imported == 'by the thread' else 'pass'}",
        "    models[0](ids)",
        "worker = threading.Thread(target=work)",
        "worker.start(); worker.join()",
        "print(tuple(models[1](ids).logits.shape))",
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0 and done.stdout.strip().endswith("(1, 6, 97)"), done.stderr[-2000:]
