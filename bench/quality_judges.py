"""What a quantized model lost against the full-precision one, for `quality`.

A judge holds the full-precision model and the held-out text. ``judge(model)`` returns scores per
piece of text, so that two models can be compared piece by piece.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.quality_texts import sentences
from gptq.calibration import leading, windows

WINDOW = 512  # tokens predicted together, and the unit of the bootstrap, where a model can
BATCH = {"cpu": 1, "cuda": 8}  # windows at once
# GPU memory that stays free while full precision's predictions are kept for the next model.
LEFT_FREE = 24 * 2**30
SENTENCES = 1000
RESAMPLES = 2000


@dataclass
class Score:
    """Sums over each of some pieces of text: FP64 (pieces,) on the CPU."""

    weight: Tensor  # tokens predicted, or 1 per sentence
    sums: dict[str, Tensor]  # by measure: "nll", "kl", "top1"; or "cosine"

    def mean(self, measure: str) -> float:
        return (self.sums[measure].sum() / self.weight.sum()).item()


def resampled(score: Score, other: Score, measure: str) -> tuple[float, float]:
    """95 % interval of mean(score) - mean(other): paired bootstrap over pieces of text."""
    generator = torch.Generator().manual_seed(0)
    pieces = len(score.weight)
    picks = torch.randint(pieces, (RESAMPLES, pieces), generator=generator)
    difference = score.sums[measure] - other.sums[measure]
    means = difference[picks].sum(dim=1) / score.weight[picks].sum(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def encode(tokenizer, texts: list[str], longest: int) -> list[Tensor]:
    """int64 (1, ≤ longest) each, special tokens and all."""
    options = {"truncation": True, "max_length": longest, "return_tensors": "pt"}
    return [tokenizer(text, **options).input_ids for text in texts]


class LanguageJudge:
    """Predicts held-out documents of each domain: NLL, KL to full precision, top-1 agreement."""

    measure, unit = "nll", "tokens"
    measures = ("nll", "kl", "top1")

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        device: str,
        documents: dict[str, list[str]],
        tokens: int,
        longest: int,
    ) -> None:
        self.model, self.device = model, device
        self.kept: dict[tuple[str, int], Tensor] = {}  # by domain and batch: log p of all tokens
        self.pieces = {}
        for name, texts in documents.items():
            cut = [w for text in texts for w in windows(text, tokenizer, longest)]
            self.pieces[name] = [w for w in leading(cut, tokens) if w.shape[1] > 1]

    def size(self) -> dict[str, int]:
        """Tokens predicted, by domain."""
        return {name: sum(w.shape[1] - 1 for w in ws) for name, ws in self.pieces.items()}

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> dict[str, Score]:
        found = {}
        batch = BATCH[torch.device(self.device).type]
        for name, pieces in self.pieces.items():
            # Alike lengths together, so that little is padded; then back in their order.
            order = sorted(range(len(pieces)), key=lambda i: pieces[i].shape[1])
            rows = torch.empty(len(pieces), 3, dtype=torch.float64)
            for start in range(0, len(pieces), batch):
                chosen = order[start : start + batch]
                rows[chosen] = self._predict(model, [pieces[i] for i in chosen], (name, start))
            weight = torch.tensor([w.shape[1] - 1 for w in pieces], dtype=torch.float64)
            found[name] = Score(weight, dict(zip(self.measures, rows.T, strict=True)))
        return found

    def _predict(self, model: nn.Module, pieces: list[Tensor], batch: tuple[str, int]) -> Tensor:
        """(pieces, 3) sums over tokens of -log p, KL divergence, and agreement of the first."""
        longest = max(piece.shape[1] for piece in pieces)
        # Padded on the right, where a causal model's earlier tokens do not look.
        tokens = torch.cat([nn.functional.pad(p, (0, longest - p.shape[1])) for p in pieces])
        lengths = torch.tensor([piece.shape[1] for piece in pieces])
        real = (torch.arange(1, longest) < lengths[:, None]).to(self.device)
        tokens = tokens.to(self.device)
        theirs = self.kept.get(batch)
        if theirs is None:
            theirs = _log_probabilities(self.model, tokens)
            if theirs.is_cuda and torch.cuda.mem_get_info(theirs.device)[0] > LEFT_FREE:
                self.kept[batch] = theirs
        ours = _log_probabilities(model, tokens)
        nll = -ours.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        kl = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        top1 = ours.argmax(-1) == theirs.argmax(-1)
        sums = [(value.double() * real).sum(dim=1) for value in (nll, kl, top1)]
        return torch.stack(sums, dim=1).cpu()


def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """FP32 (rows, length - 1, vocabulary) of the tokens that follow."""
    return model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)


class EncoderJudge:
    """Embeds held-out sentences of the first domain: cosine to full precision's embedding."""

    measure, unit = "cosine", "sentences"
    measures = ("cosine",)

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        device: str,
        documents: dict[str, list[str]],
        count: int,
        longest: int,
    ) -> None:
        self.device = device
        self.domain, texts = next(iter(documents.items()))
        self.pieces = encode(tokenizer, sentences(texts, count, seed=0), longest)
        self.reference = self._embed(model)

    def size(self) -> dict[str, int]:
        return {self.domain: len(self.pieces)}

    def __call__(self, model: nn.Module) -> dict[str, Score]:
        cosine = (self._embed(model) * self.reference).sum(dim=1).double().cpu()
        return {self.domain: Score(torch.ones_like(cosine), {"cosine": cosine})}

    @torch.inference_mode()
    def _embed(self, model: nn.Module) -> Tensor:
        """Mean over tokens, normalized: what sentence-transformers does with such models."""
        by_length: dict[int, list[int]] = {}  # run together, and without padding
        for i, piece in enumerate(self.pieces):
            by_length.setdefault(piece.shape[1], []).append(i)
        means = [None] * len(self.pieces)
        for chosen in by_length.values():
            tokens = torch.cat([self.pieces[i] for i in chosen]).to(self.device)
            found = model(input_ids=tokens).last_hidden_state.float().mean(dim=1)
            for i, mean in zip(chosen, found, strict=True):
                means[i] = mean
        return nn.functional.normalize(torch.stack(means), dim=1)
