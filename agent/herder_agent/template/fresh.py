"""Entry of a fresh interpreter's child: `PYTHON -P -X utf8 .../template/fresh.py FD`, FD being its end of the task
socket.

The agent's first frame is `open`: the child preloads and runs `setup` itself, answers `idle`, and then lives as a
forked child does (`child.serve`).
"""

import sys

if __name__ == "__main__":
    package = type(sys)("_herder_template")
    package.__path__ = [__file__.rpartition("/")[0] or "."]
    sys.modules["_herder_template"] = package
    child = __import__("_herder_template.child").child
    sys.modules["__main__"] = type(sys)("__main__")
    child.run_fresh(int(sys.argv[1]))
