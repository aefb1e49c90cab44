"""RELAY's staged procedure on a looped model: targets, loss and gradients by hand, chains read from the taps."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp
from depthpass.errors import InputError
from depthpass.tasks import chain_texts, get, relay_batch, relay_total_loss, tokenizer, write_chains

TASK = get("relay_arithmetic", modulus=5)


@pytest.fixture(scope="module")
def words():
    return tokenizer("symbol", numbers=12)


@pytest.fixture(scope="module")
def model(words):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, pad_token_id=0, initializer_range=0.2)
    return dp.transform(LlamaForCausalLM(config).double(), [dp.Loop(times=3, taps=True), dp.Bidirectional()])


def items(*lengths):
    return [TASK.instance(n, 3) for n in lengths]


def test_targets_are_right_aligned(words):
    given = items(3, 1)
    batch = relay_batch(given, words)
    assert batch.loops == 3 and batch.last.tolist() == [2, 0]
    for row, item in enumerate(given):
        for t, said in enumerate(item.rounds):
            ids = words(said)["input_ids"]
            assert batch.targets[t, row, -len(ids) :].tolist() == ids
            assert words.decode(batch.targets[t, row][batch.targets[t, row] != 0]) == said
            # The last pad belongs to the mask where the row has one left.
            room = len(words(item.prompt)["input_ids"])
            assert int(batch.mask[t, row].sum()) == min(len(ids) + 1, room)
        assert not batch.mask[len(item.rounds) :, row].any()
        assert words.decode(batch.answers[row, -1:]) == item.answer


def test_loss_and_gradients_by_hand(model, words):
    """Sum over loops of what the mask keeps, from the prompts and rounds themselves; rows with different numbers of rounds."""
    given = items(3, 2, 1)
    batch = relay_batch(given, words)
    head = torch.nn.Linear(len(words), len(words)).double()
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    relay_total_loss(output, batch, weight=0.3, head=head).backward()
    got = {n: p.grad.clone() for n, p in [*model.named_parameters(), *head.named_parameters()] if p.grad is not None}
    model.zero_grad()
    head.zero_grad()
    total, answers = 0, []
    for item in given:
        ids = torch.tensor([words(item.prompt)["input_ids"]])
        # The row by itself, without padding, at the positions it has in the batch (rotary tables are float32).
        at = torch.arange(batch.input_ids.shape[1])[None, -ids.shape[1] :]
        taps = model(input_ids=ids, position_ids=at, use_cache=False).taps
        for t, said in enumerate(item.rounds):
            want = words(said)["input_ids"]
            want = [0] * (len(want) < ids.shape[1]) + want
            total = total + 0.3 / 3 * F.cross_entropy(head(taps[f"loop.t{t + 1}"][0, -len(want) :]), torch.tensor(want),
                                                      reduction="sum")
        want = [0, *words(item.answer)["input_ids"]]
        answers.append(F.cross_entropy(taps[f"loop.t{len(item.rounds)}"][0, -len(want) :], torch.tensor(want), reduction="none"))
    (total + torch.cat(answers).mean()).backward()
    for name, p in [*model.named_parameters(), *head.named_parameters()]:
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-10)
    model.zero_grad()


def test_chains_are_what_the_taps_say(model, words):
    given = items(4, 2, 4, 1)
    chains = write_chains(model, given, words, batch=1)
    assert dp.loops_of(model) == 3 and [c.instance for c in chains] == given
    for chain, item in zip(chains, given):
        ids = torch.tensor([words(item.prompt)["input_ids"]])
        with torch.no_grad(), dp.using(
                model, [dp.Loop(times=len(item.rounds), taps=True), dp.Bidirectional()]):
            taps = model(input_ids=ids, use_cache=False).taps
        for t, said in enumerate(chain.rounds):
            ids_said = taps[f"loop.t{t + 1}"][0].argmax(-1).tolist()
            behind = len(ids_said) - ids_said[::-1].index(0) if 0 in ids_said else 0
            assert said == words.decode(ids_said[behind:])
        assert len(chain.rounds) == len(item.rounds) and not chain.right
    assert write_chains(model, given, words) == chains  # batches of rows of one number of rounds


def test_a_model_that_has_learnt_writes_right_chains(model, words):
    """With heads that answer what was asked, decoding gives back the rounds; one wrong symbol, and the chain is not right."""
    given, calls = items(3, 3), []
    batch = relay_batch(given, words)

    def perfect(_):
        calls.append(0)
        return F.one_hot(batch.targets[len(calls) - 1], len(words)).double()

    chains = write_chains(model, given, words, head=perfect, answer_head=lambda _: F.one_hot(batch.answers, len(words)).double())
    assert all(c.right for c in chains)
    assert chain_texts(chains) == chain_texts(given)
    assert chain_texts(chains)[0].splitlines() == [given[0].prompt, *given[0].rounds, f"answer {given[0].answer}"]
    wrong, calls = batch.answers.clone(), []
    wrong[0, -1] += 1
    chains = write_chains(model, given, words, head=perfect, answer_head=lambda _: F.one_hot(wrong, len(words)).double())
    assert [c.right for c in chains] == [False, True]


def test_bad_input(model, words):
    with pytest.raises(InputError, match="at least one instance"):
        relay_batch([], words)
    with pytest.raises(InputError, match="expected 1 to 2 rounds"):
        relay_batch(items(3), words, iterations=2)
    with pytest.raises(InputError, match="tokens"):
        relay_batch([get("multiplication").instance(6)], words)
    clash = relay_batch([get("relay_edit_distance").instance(3)], words)
    with pytest.raises(InputError, match="head of their own"):
        relay_total_loss(None, clash)
    output = model(input_ids=torch.tensor([[5, 6]]), use_cache=False)
    with pytest.raises(InputError, match="for 3 taps"):
        relay_total_loss(output, relay_batch(items(2), words))
