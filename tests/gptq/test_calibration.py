"""From text to samples."""

import json
import sys
import types

import pytest
import torch
from models import tokenizer as make_tokenizer

from gptq import calibration


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def paragraphs(documents):
    return {p.strip() for text in documents for p in text.split("\n\n") if p.strip()}


def test_held_out_topics_share_no_paragraph_with_calibration():
    held = calibration.pydoc_topics(held_out=True)
    rest = calibration.read_documents("pydoc")
    assert len(held) > 10 and len(rest) > 30
    assert not paragraphs(held) & paragraphs(rest)
    # Nothing else was thrown away: every topic's paragraphs are in one part or the other.
    from pydoc_data.topics import topics

    assert paragraphs(topics.values()) == paragraphs(held) | paragraphs(rest)


def test_windows_cover_a_text_once_with_special_tokens_around_each(tokenizer):
    text = "for x in range(10): print(x)\n" * 12
    pieces = calibration.windows(text, tokenizer, 20)
    assert all(piece.shape[0] == 1 and piece.shape[1] <= 20 for piece in pieces)
    assert all(piece[0, 0] == tokenizer.bos_token_id for piece in pieces)
    inner = torch.cat([piece[0, 1:] for piece in pieces]).tolist()
    assert inner == tokenizer(text, add_special_tokens=False).input_ids
    assert all(piece.shape[1] == 20 for piece in pieces[:-1])


def test_special_tokens_on_either_side_are_found(tokenizer):
    assert calibration.special_tokens(tokenizer) == ([1], [])

    def wrapping(text, add_special_tokens=True):
        ids = [ord(c) for c in text]
        return types.SimpleNamespace(input_ids=[7, *ids, 8, 9] if add_special_tokens else ids)

    assert calibration.special_tokens(wrapping) == ([7], [8, 9])


def test_samples_keep_their_natural_lengths(tokenizer):
    documents = ["a loop " * 20, "class A:\n    pass\n" * 40, "short"]
    drawn = calibration.samples(documents, tokenizer, 100, 64)
    lengths = sorted(sample.shape[1] for sample in drawn)
    expected = sorted(
        piece.shape[1]
        for text in documents
        for piece in calibration.windows(text, tokenizer, 64)
        if piece.shape[1] >= calibration.SHORTEST_SAMPLE
    )
    assert lengths == expected
    assert len(set(lengths)) > 1 and max(lengths) == 64


def test_the_seed_decides_which_samples(tokenizer):
    documents = calibration.read_documents("pydoc")[:10]
    draw = lambda seed: [  # noqa: E731
        tuple(s[0].tolist()) for s in calibration.samples(documents, tokenizer, 8, 48, seed)
    ]
    assert draw(0) == draw(0) != draw(1)
    assert len(draw(0)) == 8


def test_as_many_tokens_as_asked_for_and_no_sample_more(tokenizer):
    documents = calibration.read_documents("pydoc")[:10]
    everything = calibration.samples(documents, tokenizer, None, 48)
    drawn = calibration.samples(documents, tokenizer, None, 48, tokens=500)
    assert sum(sample.numel() for sample in drawn) == 500
    for sample, piece in zip(drawn[:-1], everything, strict=False):
        assert torch.equal(sample, piece)
    whole = everything[len(drawn) - 1]
    assert 0 < drawn[-1].numel() < whole.numel()  # cut
    assert torch.equal(drawn[-1], whole[:, : drawn[-1].numel()])
    (one,) = calibration.samples(documents, tokenizer, None, 48, tokens=everything[0].numel())
    assert torch.equal(one, everything[0])
    assert len(calibration.samples(documents, tokenizer, 3, 48, tokens=500)) == 3
    assert len(calibration.samples(documents, tokenizer, None, 48, tokens=10**9)) == len(everything)


def test_default_tokens_follow_the_widest_layer_up_to_a_point():
    assert calibration.default_tokens(1536) == 76_800
    assert calibration.default_tokens(14336) == 262_144


def test_digests_tell_texts_apart():
    a, b = torch.tensor([[1, 2, 3]]), torch.tensor([[4]])
    digests = {calibration.digest(s) for s in ([a, b], [b, a], [a], [torch.tensor([[1], [2]])])}
    assert len(digests) == 4
    assert calibration.digest([a.clone(), b]) == calibration.digest([a, b])


def test_files(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("one\n\ntwo\n")
    assert calibration.read_documents(str(text)) == ["one\n\ntwo\n"]
    lines = tmp_path / "docs.jsonl"
    lines.write_text('{"text": "a"}\n\n{"text": "b", "id": 3}\n{"text": "  "}\n')
    assert calibration.read_documents(str(lines)) == ["a", "b"]


@pytest.mark.parametrize("line", ["not json", '{"body": "x"}', "[1]"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"docs\.jsonl:2: expected a JSON object"):
        calibration.read_documents(str(path))


def fake_datasets(monkeypatch, columns):
    """Stands for the `datasets` package: this machine has no hub to load from."""

    class Rows(dict):
        @property
        def column_names(self):
            return list(self)

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "missing":
            raise FileNotFoundError("no such dataset")
        return Rows(columns)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_datasets_by_name_configuration_and_split(monkeypatch):
    calls = fake_datasets(monkeypatch, {"text": ["x", "", "y"]})
    assert calibration.read_documents("wiki") == ["x", "y"]
    calibration.read_documents("wiki:test")
    calibration.read_documents("wiki:raw-v1:validation")
    assert calls == [
        (("wiki",), {"split": "train"}),
        (("wiki",), {"split": "test"}),
        (("wiki", "raw-v1"), {"split": "validation"}),
    ]


def test_bad_sources_are_refused(monkeypatch, tmp_path, tokenizer):
    fake_datasets(monkeypatch, {"body": ["x"]})
    with pytest.raises(ValueError, match=r"a column \"text\" in 'wiki', got \['body'\]"):
        calibration.read_documents("wiki")
    with pytest.raises(ValueError, match="no file and no dataset: no such dataset"):
        calibration.read_documents("missing")
    with pytest.raises(ValueError, match="NAME"):
        calibration.read_documents("a:b:c:d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        calibration.read_documents("wiki")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"expected text in .*empty\.txt"):
        calibration.read_documents(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="at least 16 tokens in one document, got at most"):
        calibration.samples(["tiny"], tokenizer, 4, 64)
    with pytest.raises(ValueError, match="more than the 1 special tokens"):
        calibration.windows("text", tokenizer, 1)
