"""``uta-jax``, but this process has data for two batches only."""

import sys
from itertools import islice

from uta_jax.__main__ import main
from uta_jax.data import loader

endless = loader._Plan.batches
loader._Plan.batches = lambda plan, start: islice(endless(plan, start), 2)
sys.exit(main())
