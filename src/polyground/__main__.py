"""`python -m polyground` is `polyground`."""

import sys

from polyground.cli import main

sys.exit(main())
