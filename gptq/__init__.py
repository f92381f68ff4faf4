"""GPTQ for Marlin: quantize Hugging Face models to 4 bits (``marlin quantize --help``).

hessian      second moments of a layer's inputs          (tensors only)
grid         the 4-bit grid and the search for scales    (tensors only)
order        which inputs are rounded first              (tensors only)
columns      the loop over a segment's inputs            (tensors only)
refine       better scales and codes once all are known  (tensors only)
solver       GPTQ and round-to-nearest, out of these     (tensors only)
calibration  text to samples
plan         which layers get quantized
record       what a model hands its layers
visit        modules on a device for a while
collect      Hessians of one layer's linears
travellers   the samples on their way through the layers
robust       a solution for every layer, whatever happens
walk         one decoder layer at a time through a model
resume       finished layers of an unfinished run
run          all of it, from a model to Marlin layers
report       how it went
memory       what to do when it runs out
phases       where the seconds went
export       models in, Marlin checkpoints out
evaluate     negative log-likelihood and perplexity
options      the options of the commands
cli          the commands
"""
