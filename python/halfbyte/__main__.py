"""``python -m halfbyte``: the command."""

import sys

from halfbyte.cli import main

sys.exit(main())
