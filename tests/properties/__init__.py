"""Properties: random inputs and worlds, against slow and obvious oracles. TEST_EXAMPLES_TIMES=20 tries more of them."""

import os

MORE = int(os.environ.get("TEST_EXAMPLES_TIMES", "1"))  # above 1 the examples are drawn anew each time
