"""`python -m herder_agent`: run an agent in the foreground."""

from herder_agent.main import command

if __name__ == "__main__":
    command()
