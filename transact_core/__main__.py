"""`python -m transact_core`."""

import sys

from transact_core.base.memory import give_large_blocks_back
from transact_core.cli import main

give_large_blocks_back()
sys.exit(main())
