"""lm-eval scores the program, given as an object or as the folder of a saved model."""

import pytest
import torch

from tests.tools.conftest import words

pytest.importorskip("lm_eval", reason="needs the tools extra")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

pytestmark = pytest.mark.filterwarnings("ignore")
QUESTIONS = [(words(1, 2, 3), " " + words(4, 5)), (words(6), " " + words(7, 8, 9)), (words(10, 11), " " + words(12))]


def scored(lm):
    requests = [Instance("loglikelihood", {}, q, i) for i, q in enumerate(QUESTIONS)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.parametrize("given", ["object", "folder"])
def test_scores_are_those_of_the_program(given, turbo, tokenizer, tmp_path):
    turbo.eval()
    if given == "folder":
        turbo.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        lm = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=2, dtype="float32")
    else:
        lm = HFLM(pretrained=turbo, tokenizer=tokenizer, device="cpu", batch_size=2)
    got = scored(lm)
    for (context, answer), actual in zip(QUESTIONS, got, strict=True):
        ids = torch.tensor([tokenizer(context + answer, add_special_tokens=False)["input_ids"]])
        count = len(answer.split())
        with torch.no_grad():
            logits = torch.log_softmax(turbo(input_ids=ids).logits[0, :-1], -1)
        want = logits.gather(-1, ids[0, 1:, None])[-count:].sum()
        assert actual == pytest.approx(float(want), rel=1e-4)


def test_generates_with_the_program(turbo, tokenizer):
    turbo.eval()
    lm = HFLM(pretrained=turbo, tokenizer=tokenizer, device="cpu", batch_size=2)
    options = {"max_gen_toks": 4, "do_sample": False, "until": ["</s>"]}
    (text,) = lm.generate_until([Instance("generate_until", {}, (words(1, 2, 3), options), 0)], disable_tqdm=True)
    ids = torch.tensor([tokenizer(words(1, 2, 3), add_special_tokens=False)["input_ids"]])
    want = turbo.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)[0, 3:]
    assert text.split() == tokenizer.decode(want, skip_special_tokens=True).split()
