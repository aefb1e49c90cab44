"""Tokenizers, torch data sets, streams, `datasets` objects, batches."""

import pytest
import torch
from torch.utils.data import DataLoader

from depthpass.errors import InputError
from depthpass.tasks import RELAY, TASKS, Collator, TaskDataset, TaskStream, draw, encode, get, tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {"char": tokenizer("char"), "byte": tokenizer("byte"), "symbol": tokenizer("symbol", [*TASKS], numbers=200)}


@pytest.mark.parametrize("kind", ["char", "byte", "symbol"])
def test_every_task_survives_encoding_and_decoding(tokenizers, kind):
    for name in sorted(TASKS):
        text = get(name).instance(get(name).span("S")[0], 2).text
        ids = tokenizers[kind](text)["input_ids"]
        assert tokenizers[kind].decode(ids) == text, name
        assert tokenizers[kind].unk_token_id not in ids
    for text in (" 1  22 x", "x 1\n\n 3 ", "\n"):
        assert tokenizers[kind].decode(tokenizers[kind](text)["input_ids"]) == text
    text = get("dijkstra").instance(5).text
    assert len(tokenizers["symbol"](text)["input_ids"]) < len(tokenizers["char"](text)["input_ids"])


def test_the_byte_tokenizer_takes_any_text(tokenizers):
    assert tokenizers["byte"].decode(tokenizers["byte"]("Grüße 你好\n\t ok")["input_ids"]) == "Grüße 你好\n\t ok"
    assert tokenizers["char"].unk_token_id in tokenizers["char"]("ü")["input_ids"]


@pytest.mark.parametrize("kind", ["char", "byte", "symbol"])
def test_tokenizers_are_hugging_face_tokenizers(tokenizers, kind, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    tokenizers[kind].save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = get("lcs").instance(4).text
    assert isinstance(tokenizers[kind], PreTrainedTokenizerBase)
    assert again(text)["input_ids"] == tokenizers[kind](text)["input_ids"] and again.decode(again(text)["input_ids"]) == text
    assert [getattr(again, f"{x}_token_id") for x in ("pad", "bos", "eos", "unk", "mask")] == [0, 1, 2, 3, 4]
    batch = again(["a", "a b c"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].tolist()[0][-1] == 0 and batch["input_ids"].shape == batch["attention_mask"].shape


def test_symbols_are_one_token_each(tokenizers):
    for name in RELAY:
        item = get(name).instance(12, 1)
        assert len(tokenizers["symbol"](item.prompt)["input_ids"]) == len(item.prompt.split())
        assert all(len(tokenizers["symbol"](r)["input_ids"]) == len(r.split()) for r in item.rounds)


def test_rows_take_loss_on_the_response_only(tokenizers):
    item = get("addition").instance(4, 1)
    for trace in (True, False):
        row = encode(item, tokenizers["char"], trace=trace)
        taken = [i for i, label in zip(row["input_ids"], row["labels"]) if label != -100]
        said = tokenizers["char"].decode(taken)
        assert said == (item.response if trace else item.answer) + "<eos>"
        assert tokenizers["char"].decode(row["input_ids"]) == f"{item.prompt}\n{said}" and set(row["attention_mask"]) == {1}


def test_a_data_set_by_index(tokenizers):
    rows = TaskDataset("dijkstra", 20, "S", seed=1, tokenizer=tokenizers["char"])
    backwards = [rows[i] for i in reversed(range(20))][::-1]
    assert backwards == [rows[i] for i in range(20)] and len(rows) == 20 and rows[-1] == rows[19]
    with pytest.raises(IndexError):
        rows[20]
    batch = next(iter(DataLoader(rows, batch_size=4, collate_fn=Collator(tokenizers["char"]))))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape and len(batch["labels"]) == 4
    assert torch.equal(batch["input_ids"] == 0, batch["attention_mask"] == 0)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    left = Collator(tokenizers["char"], "left")([rows[0], rows[1]])
    assert left["attention_mask"][:, -1].all()


def test_a_stream_is_shared_out_between_workers():
    plain = [r["prompt"] for r in TaskStream("parity", (5, 9), count=9, start=2)]
    loader = DataLoader(TaskStream("parity", (5, 9), count=9, start=2), batch_size=None, num_workers=2,
                        multiprocessing_context="fork")
    assert sorted(r["prompt"] for r in loader) == sorted(plain) and len(plain) == 9
    assert plain[0] == draw(get("parity"), (5, 9), 2).prompt


def test_datasets_objects(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = TaskDataset("lcs", 5, seed=2)
    dataset = rows.to_datasets()
    assert isinstance(dataset, datasets.Dataset) and dataset[3] == rows[3]
    assert set(dataset.column_names) >= {"prompt", "trace", "answer", "size", "depth", "width"}
    flowing = TaskStream("lcs", seed=2, count=5).to_datasets()
    assert isinstance(flowing, datasets.IterableDataset) and list(flowing) == [rows[i] for i in range(5)]


def test_datasets_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'depthpass\[tasks\]'"):
        TaskDataset("lcs", 2).to_datasets()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: tokenizer("chars"), "Did you mean 'char'"),
    (lambda: tokenizer("char", numbers=5), "options of kind='symbol'"),
    (lambda: tokenizer("symbol", numbers=-1), "numbers: expected an integer from 0 to 65536, got -1"),
    (lambda: tokenizer("char", padding_side="top"), "padding_side"),
    (lambda: TaskDataset("lcs", 0), "count: expected"),
    (lambda: TaskDataset("lcs", 3, "XL"), "lengths"),
    (lambda: TaskDataset("lcs", 3, 0), "got 0"),
    (lambda: TaskDataset("lsc", 3), "Did you mean"),
    (lambda: TaskDataset("lcs", 3, None), "lengths: expected S, M, L"),
    (lambda: get(None), "unknown task None"),
    (lambda: TaskStream("lcs", start=-1), "start"),
    (lambda: draw(get("lcs"), "S", 0, split="dev"), "split"),
    (lambda: encode(get("copy").of("ü", 1), tokenizer("char")), "does not know every symbol"),
])
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
