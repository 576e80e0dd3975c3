"""`python -m benchmarks.gpu_code`."""

import sys

from benchmarks.gpu_code import command

sys.exit(command.main())
