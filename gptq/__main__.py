"""Entry point of ``python -m gptq``."""

import os
import sys

# The solver is a run of many thousand small operations, and OpenMP's threads by default spin where
# they wait for each other. On 2 busy cores that made some layers take over 20 times as long as with
# threads that sleep. Must be set before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    from .cli import main
except ModuleNotFoundError as error:
    if error.name != "transformers":  # the one that `pip install marlin` does not bring along
        raise
    print(
        "marlin: error: expected the package transformers, found none; "
        'pip install "marlin[gptq]" brings it along',
        file=sys.stderr,
    )
    sys.exit(2)

sys.exit(main())
