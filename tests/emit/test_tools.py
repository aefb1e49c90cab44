"""Tools that people serve with: pipeline, transformers serve's own loader, continuous batching."""

import subprocess
import sys

import pytest
import torch
import zoo
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerFast, pipeline
from turbos import transformed

import depthpass as dp

LOOP = dp.Loop(start=1, end=3, times=2)
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model with bridges, its saved folder and its emitted one, both with a tokenizer of words w3 .. w96."""
    folder = tmp_path_factory.mktemp("served")
    model = transformed("llama", [LOOP, dp.TurboConn(bridges=((5, 0),), group=3, rank=5)], torch.float32)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, zoo.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    model.save_pretrained(folder / "saved")
    wrapped.save_pretrained(folder / "saved")
    dp.emit(model, folder / "emitted", source=folder / "saved")
    return model, folder


@pytest.mark.parametrize("kind", ["saved", "emitted"])
def test_a_pipeline_runs_a_folder(kind, served):
    model, folder = served
    pipe = pipeline("text-generation", model=str(folder / kind), trust_remote_code=kind == "emitted", device="cpu")
    assert isinstance(pipe.model, dp.DepthModel) is (kind == "saved")
    (out,) = pipe("w5 w9 w23", return_tensors=True, max_new_tokens=4, do_sample=False, eos_token_id=None)
    want = model.generate(torch.tensor([[5, 9, 23]]), **SETTINGS)
    assert out["generated_token_ids"] == want[0].tolist()


_SERVER = """
import sys
# As in the command line: the loader is imported before a folder is read, and before the processors are.
from transformers.cli.serving import model_manager
import torch, transformers.processing_utils
for kind in ("emitted", "saved"):
    if kind == "saved":
        import depthpass
    manager = model_manager.ModelManager(device="cpu", trust_remote_code=kind == "emitted")
    loaded = manager._load_model(f"{sys.argv[1]}/{kind}@main")
    print(loaded(input_ids=torch.tensor([[5, 9, 23, 40]])).logits.argmax(-1).tolist())
"""


def test_the_loader_of_transformers_serve_takes_both_folders(served, tmp_path):
    """In a process of its own: here the classes are known already."""
    pytest.importorskip("transformers.cli.serving.model_manager")
    model, folder = served
    environment = {"PYTHONPATH": ":".join(sys.path), "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", _SERVER, str(folder)], capture_output=True, text=True, cwd=tmp_path,
                         env=environment)
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        want = model(input_ids=torch.tensor([[5, 9, 23, 40]])).logits.argmax(-1)
    assert ran.stdout.splitlines()[-2:] == [str(want.tolist())] * 2


def test_continuous_batching_of_a_loop():
    model = transformed("llama", LOOP, torch.float32)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    rows = [[5, 9, 23, 4], [7, 8, 9, 10, 11, 12]]
    # Few pages: otherwise they take most of the machine's memory.
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    batch = model.generate_batch(rows, generation_config=settings, continuous_batching_config=pages, warmup=False)
    assert len(batch) == 2
    for number, row in enumerate(rows):
        want = model.generate(torch.tensor([row]), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert batch[f"req_{number}"].generated_tokens == want[0, len(row) :].tolist()


def test_what_has_no_pages_is_refused_by_name(served):
    model, folder = served
    with pytest.raises(dp.InputError, match="has no pages"):
        model.generate_batch([[4, 5]])
    routed = transformed("llama", dp.MixtureOfRecursions(recursions=2), torch.float32)
    with pytest.raises(dp.InputError, match=r"cannot be written as such layers.*route"):
        routed.generate_batch([[4, 5]])
    emitted = pipeline("text-generation", model=str(folder / "emitted"), trust_remote_code=True, device="cpu").model
    with pytest.raises(NotImplementedError, match="Use generate"):
        emitted.generate_batch([[4, 5]])
