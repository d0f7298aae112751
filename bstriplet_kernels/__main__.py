"""`python -m bstriplet_kernels` examines the installation."""

import sys

from .doctor import main

sys.exit(main())
