"""The whole job on a real language model: ``make demo``, or ``python -m demo --help``."""
