"""GPTQ for Marlin: quantize Hugging Face models to 4 bits (``python -m gptq --help``).

hessian      second moments of a layer's inputs          (tensors only)
grid         the 4-bit grid and the search for scales    (tensors only)
solver       GPTQ and round-to-nearest                   (tensors only)
calibration  text to samples
plan         which layers get quantized
walk         one decoder layer at a time through a model
export       models in, Marlin checkpoints out
evaluate     negative log-likelihood and perplexity
cli          the commands
"""
