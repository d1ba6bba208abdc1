"""`python -m tests.planted`, see `plant`."""

from .plant import main

raise SystemExit(main())
