"""``python -m halfbyte``: the command."""

import sys

from halfbyte.cli.main import main

sys.exit(main())
