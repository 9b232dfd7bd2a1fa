"""``python -m scale_mae`` is the same as ``scale-mae``. torchrun starts it as a module."""

import sys

from scale_mae.cli import main

sys.exit(main())
