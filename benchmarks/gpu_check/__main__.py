"""`python -m benchmarks.gpu_check`."""

import sys

from benchmarks.gpu_check import command

sys.exit(command.main())
