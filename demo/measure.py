"""Loads one model in a process of its own and measures it: prediction, decoding speed, an answer.

``python -m demo.measure MODEL --json FILE``; MODEL is a Marlin checkpoint or a full-precision
model, and nothing is shared with the process that quantized it.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from gptq import calibration, evaluate, export
from marlin.layer import MarlinLinear

QUESTION = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 72
DECODE_TOKENS = 64
DECODE_RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seqlen", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    args = parser.parse_args()

    # CPUs compute in FP32 (Marlin layers take it too); GPUs in the 16 bits that are stored.
    on_cpu = torch.device(args.device).type == "cpu"
    dtype = torch.float32 if on_cpu else export.stored_dtype(export.load_config(args.model))
    model = export.load_any(args.model, args.device, dtype)
    tokenizer = export.load_tokenizer(args.model)
    prediction = evaluate.evaluate(
        model,
        tokenizer,
        calibration.pydoc_topics(held_out=True),
        seqlen=args.seqlen,
        max_tokens=args.max_tokens,
        progress=lambda windows: tqdm(windows, unit="window", mininterval=0.5, dynamic_ncols=True),
    )
    prompt = encode(tokenizer, QUESTION).to(args.device)
    result = {
        **asdict(prediction),
        "tokens_per_second": decoding_speed(model, prompt),
        "answer": answer(model, tokenizer, prompt),
        "marlin_layers": sum(isinstance(module, MarlinLinear) for module in model.modules()),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    args.json.write_text(json.dumps(result))


def encode(tokenizer, question: str) -> torch.Tensor:
    """(1, length) token ids of the question, as a chat where the model knows chats."""
    if not tokenizer.chat_template:
        return tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt").input_ids
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def generate(model, prompt: torch.Tensor, **options) -> torch.Tensor:
    """The new tokens of a greedy continuation."""
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options
    )
    return output[0, prompt.shape[1] :]


def decoding_speed(model, prompt: torch.Tensor) -> float:
    """Tokens per second at batch 1, the prompt's own pass taken out; median of a few runs."""

    def seconds(count: int) -> float:
        started = time.perf_counter()
        generate(model, prompt, min_new_tokens=count, max_new_tokens=count)
        return time.perf_counter() - started

    seconds(4)  # the first call sets things up
    runs = [seconds(1 + DECODE_TOKENS) - seconds(1) for _ in range(DECODE_RUNS)]
    return DECODE_TOKENS / statistics.median(runs)


def answer(model, tokenizer, prompt: torch.Tensor) -> str:
    tokens = generate(model, prompt, max_new_tokens=ANSWER_TOKENS)
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
