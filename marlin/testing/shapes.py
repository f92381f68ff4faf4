"""The shapes that tests and benches share. A weight is (k, n) = (in, out) features."""

# Batch sizes around every tile boundary of the kernels.
ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 256, 257,
        1000, 1024, 4096)  # fmt: skip

GROUP_SIZES = (-1, 32, 64, 128)

# Odd multiples of the smallest units: k of 16 (per column) or of the group, n of 64.
ODD_SHAPES = ((16, 64), (48, 64), (112, 192), (144, 320), (528, 448), (1040, 64))

# name -> (compute capability, multiprocessors, bytes of shared memory that a block may have)
GPUS = {
    "A100": ("8.0", 108, 163 * 1024),
    "A10": ("8.6", 72, 99 * 1024),
    "RTX 4090": ("8.9", 128, 99 * 1024),
    "H200": ("9.0a", 132, 227 * 1024),
}
# What selects as a GPU of capability 8.x would, and runs what it finds here: a name of `config=`.
LIKE = {
    name: f"like:{sm_count}:{shared_bytes}"
    for name, (capability, sm_count, shared_bytes) in GPUS.items()
    if capability.startswith("8.")
}

# Linear layers of one decoder block, as Hugging Face models have them: name -> (k, n).
LLAMA_2_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
              "gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}  # fmt: skip
LLAMA_3_8B = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
              "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}  # fmt: skip
LLAMA_3_70B = {"q": (8192, 8192), "k": (8192, 1024), "v": (8192, 1024), "o": (8192, 8192),
               "gate": (8192, 28672), "up": (8192, 28672), "down": (28672, 8192)}  # fmt: skip
QWEN_2_7B = {"q": (3584, 3584), "k": (3584, 512), "v": (3584, 512), "o": (3584, 3584),
             "gate": (3584, 18944), "up": (3584, 18944), "down": (18944, 3584)}  # fmt: skip
MISTRAL_7B = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
              "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}  # fmt: skip
LLAMA_2_13B = {"q": (5120, 5120), "k": (5120, 5120), "v": (5120, 5120), "o": (5120, 5120),
               "gate": (5120, 13824), "up": (5120, 13824), "down": (13824, 5120)}  # fmt: skip
QWEN_2_14B = {"q": (5120, 5120), "k": (5120, 1024), "v": (5120, 1024), "o": (5120, 5120),
              "gate": (5120, 13824), "up": (5120, 13824), "down": (13824, 5120)}  # fmt: skip
QWEN_2_32B = {"q": (5120, 5120), "k": (5120, 1024), "v": (5120, 1024), "o": (5120, 5120),
              "gate": (5120, 27648), "up": (5120, 27648), "down": (27648, 5120)}  # fmt: skip
QWEN_3_8B = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
             "gate": (4096, 12288), "up": (4096, 12288), "down": (12288, 4096)}  # fmt: skip
MODELS = {"Llama-2-7B": LLAMA_2_7B, "Llama-3-8B": LLAMA_3_8B, "Llama-3-70B": LLAMA_3_70B,
          "Qwen2-7B": QWEN_2_7B, "Mistral-7B": MISTRAL_7B, "Llama-2-13B": LLAMA_2_13B,
          "Qwen2.5-14B": QWEN_2_14B, "Qwen2.5-32B": QWEN_2_32B, "Qwen3-8B": QWEN_3_8B}  # fmt: skip


def scaled_model_shapes(divisor: int) -> list[tuple[int, int]]:
    """Distinct layer shapes of all models, each side divided and rounded up to 128."""

    def scale(size: int) -> int:
        return -(-size // (divisor * 128)) * 128

    return sorted({(scale(k), scale(n)) for m in MODELS.values() for k, n in m.values()})
