"""The agent: one per node; runs attempts in children of templates. It itself never forks."""
