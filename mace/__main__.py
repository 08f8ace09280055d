"""`python -m mace`: the command line."""

from mace.cli import main

raise SystemExit(main())
