"""Properties: random inputs against slow and obvious models. TEST_EXAMPLES_TIMES=20 tries 20 times as many."""

import os

MORE = int(os.environ.get("TEST_EXAMPLES_TIMES", "1"))  # above 1 the examples are drawn anew each time
