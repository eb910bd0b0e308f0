"""``python -m av_memory`` is the command ``av-memory``."""

import sys

from av_memory.cli import main

sys.exit(main())
