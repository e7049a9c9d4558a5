"""`python -m claritycore` is the command line."""

from .cli import main

raise SystemExit(main())
