"""``python -m stablemask`` is the ``stablemask`` command."""

import sys

from stablemask.cli.main import main

sys.exit(main())
