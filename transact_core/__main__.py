"""`python -m transact_core`."""

import sys

from transact_core.cli import main
from transact_core.memory import give_large_blocks_back

give_large_blocks_back()
sys.exit(main())
