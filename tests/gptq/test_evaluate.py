"""Negative log-likelihood against a sum over single predictions."""

import math
from types import SimpleNamespace

import pytest
import torch
from models import build, tokenizer

from gptq import evaluate

TEXTS = ["for x in range(3):\n    print(x)\n" * 4, "class Point:\n    pass\n"]


def slow_nll(model, tokens, texts, seqlen):
    """Each token predicted by a pass over exactly what comes before it in its window."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokens(text, add_special_tokens=False).input_ids
        for start in range(0, len(ids), seqlen - 1):
            window = [tokens.bos_token_id, *ids[start : start + seqlen - 1]]
            for j in range(1, len(window)):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([window[:j]])).logits[0, -1].double()
                total -= logits.log_softmax(-1)[window[j]].item()
                count += 1
    return total / count, count


def test_matches_predictions_made_one_by_one():
    model, tokens = build("llama"), tokenizer()
    result = evaluate.evaluate(model, tokens, TEXTS, seqlen=24)
    nll, count = slow_nll(model, tokens, TEXTS, 24)
    assert result.tokens == count
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)


def test_a_model_that_knows_nothing_is_as_good_as_a_die():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate.evaluate(model, tokenizer(), TEXTS, seqlen=24)
    assert result.nll == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)


def test_stops_at_the_limit_at_a_windows_end():
    seen = []
    result = evaluate.evaluate(
        build("llama"),
        tokenizer(),
        TEXTS,
        seqlen=16,
        max_tokens=20,
        progress=lambda items: seen.extend(items) or items,
    )
    assert result.windows == len(seen) == 2
    assert result.tokens == 30


def test_tokens_put_before_a_text_are_not_predicted():
    """Of a window <s> <mark> a b c, only a, b and c count."""
    plain = tokenizer()

    def marking(text, add_special_tokens=True, **options):
        ids = plain(text, add_special_tokens=False).input_ids
        return SimpleNamespace(input_ids=[1, 2, *ids] if add_special_tokens else ids)

    text = TEXTS[1]
    model, ids = build("llama"), plain(text, add_special_tokens=False).input_ids
    result = evaluate.evaluate(model, marking, [text], seqlen=64)
    assert result.windows == 1 and result.tokens == len(ids)
    losses = evaluate.token_losses(model, torch.tensor([[1, 2, *ids]]))
    assert result.nll == pytest.approx(losses[1:].detach().mean().item(), rel=1e-5)


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match="expected a language model with logits"):
        evaluate.evaluate(build("bert"), tokenizer(), TEXTS, seqlen=24)


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="at least two tokens"):
        evaluate.evaluate(build("llama"), tokenizer(), [""], seqlen=24)
