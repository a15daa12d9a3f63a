"""`python -m transact_core`."""

import sys

from transact_core.cli import main

sys.exit(main())
