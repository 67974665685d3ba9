"""``python -m inferkit`` is the ``inferkit`` command."""

import sys

from inferkit.cli import main

sys.exit(main())
