"""This process and several: each item once, errors as they are, and what makes no sense is refused."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution import Processes, ThisProcess, workers_of


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "two", None])
def test_what_is_no_number_of_processes_is_refused_with_what_else_to_give(workers):
    with pytest.raises(ExecutionError, match=r"workers=.*at least 1.*RayCluster\(cpus=1\)"):
        workers_of(workers)


def test_one_worker_is_this_process_and_needs_no_pickle():
    lock, here = threading.Lock(), workers_of(1)
    assert here == workers_of(here)
    assert isinstance(here, ThisProcess)
    assert list(here.run(lambda item: (lock and item, os.getpid()), [3, 4])) == [(n, (n, os.getpid())) for n in (3, 4)]


def test_processes_do_each_item_once_and_no_more_are_started_than_there_are_items():
    done = dict(Processes(2).run(lambda item: (item**2, os.getpid()), iter(range(7))))
    assert {item: square for item, (square, _) in done.items()} == {item: item**2 for item in range(7)}
    assert os.getpid() not in {process for _, process in done.values()}
    assert len({process for _, (_, process) in Processes(2).run(lambda item: (item, os.getpid()), [5])}) == 1
    assert list(Processes(2).run(abs, [])) == []


def test_what_is_raised_in_a_process_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        list(Processes(2).run(lambda item: 1 // item, [1, 0]))


def test_what_has_no_pickle_is_sent_to_no_process_and_works_in_this_one():
    lock = threading.Lock()
    with pytest.raises(ExecutionError, match=r"cannot be pickled for other .*lock.*inside functions.*workers=1"):
        list(Processes(2).run(lambda item: lock and item, [1, 2]))
    assert list(workers_of(1).run(lambda item: lock and item, [1])) == [(1, 1)]


def test_a_process_that_dies_is_reported_with_the_way_out():
    with pytest.raises(ExecutionError, match=r"A process was killed.*tasks were finished.*fewer workers"):
        list(Processes(2).run(lambda item: os._exit(1), [1, 2]))


@pytest.mark.slow
def test_another_thread_than_the_main_one_may_share_work_out():
    found = []
    other = threading.Thread(target=lambda: found.extend(Processes(2).run(abs, [-1, -2])))
    other.start()
    other.join()
    assert sorted(found) == [(-2, 2), (-1, 1)]


@pytest.mark.slow
def test_what_was_finished_when_a_process_dies_is_not_lost(tmp_path):
    def work(item):
        if item == "dies":
            while len(list(tmp_path.iterdir())) < 3:
                time.sleep(0.01)
            time.sleep(1)  # for the last result to be on its way
            os._exit(1)
        (tmp_path / item).touch()
        return item.upper()

    results = Processes(2).run(work, ["dies", "a", "b", "c"])
    found = [next(results)]
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.01)
    time.sleep(3)  # the process dies while the first result is dealt with
    found += [next(results), next(results)]
    assert sorted(found) == [("a", "A"), ("b", "B"), ("c", "C")]
    with pytest.raises(ExecutionError, match=r"A process was killed.* after 3 tasks were finished"):
        next(results)


@pytest.mark.slow
def test_no_process_stays_after_the_work():
    processes = {process for _, process in Processes(2).run(lambda item: os.getpid(), [1, 2, 3])}
    assert processes
    assert not any(map(is_there, processes))


UNDER_WAY = """
import os, pathlib, sys, time
from lightning_dtda.execution import Processes

def work(item, directory=sys.argv[1]):
    pathlib.Path(directory, str(os.getpid())).touch()
    time.sleep(600)

list(Processes(2).run(work, [1, 2]))
"""


def is_there(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_asked_to_end_it_leaves_no_process_at_work(tmp_path):
    own = subprocess.Popen([sys.executable, "-c", UNDER_WAY, str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    others = [int(path.name) for path in tmp_path.iterdir()]
    assert len(others) == 2
    own.send_signal(signal.SIGTERM)
    own.wait(300)
    while any(map(is_there, others)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_there, others))
