"""`python -m training` is `jaxattn-train`."""

import sys

from training.cli import main

sys.exit(main())
