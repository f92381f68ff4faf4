"""How well a language model predicts a text: mean negative log-likelihood and perplexity."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calibration import special_tokens, windows


@dataclass(frozen=True)
class Evaluation:
    nll: float  # nats per predicted token
    perplexity: float
    tokens: int  # tokens predicted
    windows: int
    seconds: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokenizer,
    documents: list[str],
    *,
    seqlen: int = 512,
    max_tokens: int | None = None,
    progress=lambda items: items,
) -> Evaluation:
    """Predict every document in consecutive windows of ``seqlen`` tokens.

    The first token of a window is context only, as are the tokens the tokenizer puts before a
    text. max_tokens stops after so many tokens (at a window's end). progress wraps the list of
    windows (tqdm does). Raises ValueError when the model gives no logits or there is no text.
    """
    pieces = _limit([w for text in documents for w in windows(text, tokenizer, seqlen)], max_tokens)
    context = max(1, len(special_tokens(tokenizer)[0]))
    device = next(model.parameters()).device
    total, count = 0.0, 0
    started = time.perf_counter()
    for piece in progress(pieces):
        losses = token_losses(model, piece.to(device))[context - 1 :]
        total += losses.double().sum().item()
        count += losses.numel()
    if count == 0:
        raise ValueError("text: expected at least two tokens to predict, got fewer")
    nll = total / count
    # Beyond exp(709) a float has no perplexity; a broken model should still get its report.
    perplexity = math.exp(nll) if nll < 709 else math.inf
    return Evaluation(nll, perplexity, count, len(pieces), time.perf_counter() - started)


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """-log p of tokens 1.. of one (1, length) sample, FP32 (length - 1,)."""
    logits = getattr(model(input_ids=tokens), "logits", None)
    if logits is None or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"model: expected a language model with logits per token, got {type(model).__name__}"
        )
    return nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="none")


def _limit(pieces: list[Tensor], max_tokens: int | None) -> list[Tensor]:
    """The leading windows that together hold at least max_tokens."""
    if max_tokens is None:
        return pieces
    kept, seen = [], 0
    for piece in pieces:
        if seen >= max_tokens:
            break
        kept.append(piece)
        seen += piece.shape[1]
    return kept
