"""`python -m herder_coordinator`: the same as `herder coordinator`."""

from __future__ import annotations

from herder_coordinator.main import main

if __name__ == "__main__":
    main()
