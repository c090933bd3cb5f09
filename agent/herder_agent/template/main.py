"""Entry of a template process: `PYTHON -P -X utf8 .../template/main.py FD`, FD being its end of the control socket.

Kept tiny because a script is compiled at each start. The siblings are loaded as the private package `_herder_template`,
so that this folder never stands on the user's `sys.path`; and `__main__` is left blank, so that what a task finds there
(or `multiprocessing`'s spawn runs again) is nothing of ours.
"""

import sys

if __name__ == "__main__":
    package = type(sys)("_herder_template")
    package.__path__ = [__file__.rpartition("/")[0] or "."]
    sys.modules["_herder_template"] = package
    life = __import__("_herder_template.life").life
    sys.modules["__main__"] = type(sys)("__main__")
    life.run(sys.argv)
