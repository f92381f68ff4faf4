import sys

from marlin.cli import main

sys.exit(main())
