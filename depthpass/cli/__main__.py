"""``python -m depthpass.cli``."""

import sys

from depthpass.cli import main

sys.exit(main())
