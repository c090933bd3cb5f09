"""An audit as a whole: what settles by itself, what is looked at again, and the verdict that comes of it."""

from __future__ import annotations

from pathlib import Path

from agent.template import driver
from herder_agent.template import findings


def test_thread_that_is_just_ending_is_waited_for() -> None:
    def setup() -> None:
        import threading
        import time

        threading.Thread(target=time.sleep, args=(0.05,)).start()

    with driver.ready(setup) as running:
        assert running.ready["fork_point"] == "setup"
        assert running.steps[1]["threads"] == 1


def test_fork_point_is_the_deepest_safe_state_and_not_the_last_before_the_first_unsafe_one(tmp_path: Path) -> None:
    (tmp_path / "begins.py").write_text(
        "import threading\n"
        "release = threading.Event()\n"
        "thread = threading.Thread(target=release.wait)\n"
        "thread.start()\n"
    )
    (tmp_path / "ends.py").write_text("import begins\nbegins.release.set()\nbegins.thread.join()\n")
    with driver.ready(paths=[str(tmp_path)], preload=["begins", "ends"]) as running:
        assert [step["verdict"] for step in running.steps] == ["safe", "unsafe", "safe", "safe", "safe"]
        assert running.ready["fork_point"] == "import ends"
        assert running.ready["reason"] == ""


def test_worst_finding_is_the_verdict() -> None:
    report = findings.Report()
    assert report.verdict == findings.SAFE
    for verdict, then in (("note", "safe"), ("allowed", "safe"), ("unknown", "unknown"), ("unsafe", "unsafe")):
        report.findings.append(findings.Finding("R0", "seen", verdict=verdict))
        assert report.verdict == then
    first = report.first_unsafe()
    assert first is report.findings[-1]
    assert str(first) == "R0: seen"
