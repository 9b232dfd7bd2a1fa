"""``python -m scale_mae``, which torchrun can start."""

import sys

from scale_mae.cli import main

sys.exit(main())
