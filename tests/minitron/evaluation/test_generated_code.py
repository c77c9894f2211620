"""Programs that a model writes run in a sandbox, if the user allows it, and reach nothing outside.

Where bubblewrap is not installed or not allowed, nothing runs: an attack is then refused instead of stopped.
"""

from __future__ import annotations

import os
import socket
import sys

import pytest
from helpers.evaluating import byte_tokenizer, tiny_model, write_jsonl
from helpers.programs import RUNS_PROGRAMS, has_sandbox, sandboxed

from minitron.errors import InputError
from minitron.evaluation import Task, evaluate, evaluate_documents, generated_code
from minitron.evaluation.requests import DocumentRequests
from minitron.evaluation.sandbox import Limits, Sandbox, StoppedError
from minitron.evaluation.task_index import stock
from minitron_platform import plan
from minitron_platform.recipes.load import load_recipe

# The system calls of the kernel's keyrings, and io_uring's, have no function in Python.
KEYS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
add_key, request_key, keyctl = (248, 249, 250) if os.uname().machine == "x86_64" else (217, 218, 219)
"""

# Each ends without an exception only if the attack succeeds.
ATTACKS = {
    "an endless loop": "while True: pass",
    "a loop that ignores signals": "import signal, time\nsignal.signal(15, 1)\nsignal.signal(24, 1)\nwhile True: time.sleep(9)",
    "a fork bomb": "import os, time\nfor _ in range(40):\n    if os.fork() == 0: time.sleep(60)",
    "threads": "import threading, time\nfor _ in range(40): threading.Thread(target=time.sleep, args=[60]).start()",
    "10 GB of memory": "bytearray(10 << 30)",
    "100 MB of files": "for n in range(20): open(f'/tmp/{{n}}', 'wb').write(bytes(5_000_000))",
    "memory mounted in a user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(1 << 28) == 0",
    "memory shared by System V": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.shmget(0, 1 << 20, 0o1600) != -1"
    ),
    "messages of System V": "import ctypes\nassert ctypes.CDLL(None).msgget(0, 0o1600) != -1",
    "memory behind a descriptor": "import os\nos.memfd_create('a')",
    "memory as a file": "open('/dev/shm/a', 'w').write('a')",
    "reading a file outside": "open({secret!r}).read()",
    "writing a file outside": "open({secret!r}, 'w').write('replaced')",
    "a new file beside the system's": "open('/usr/planted', 'w')",
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)",
    "the keys of the user": KEYS + "assert libc.syscall(keyctl, 0, -3, 0) != -1",  # the id of the session's keyring
    "the names of the user's keys": "import os\nassert os.stat('/proc/keys').st_dev == os.stat('/proc').st_dev",
    "a key for the next program": KEYS + "assert libc.syscall(add_key, b'user', b'a', b'a', 1, -3) != -1",
    "a key by request": KEYS
    + "assert libc.syscall(request_key, b'user', b'a', None, 0) != -1 or ctypes.get_errno() != 1",
    "system calls in a ring": KEYS + "assert libc.syscall(425, 8, ctypes.create_string_buffer(120)) != -1",
    "a socket to the machine's host": "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "a socket to the kernel": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "the kernel's ciphers": "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "the limits of the process that counts": (
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))"
    ),
    "the priority of the process that counts": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "the scheduler of the process that counts": (
        "import os\nos.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))"
    ),
    "the cores of the process that counts": "import os\nos.sched_setaffinity(os.getppid(), [min(os.sched_getaffinity(0))])",
    "the environment": "import os\nos.environ['MINITRON_TEST_SECRET']",
    "the environment of the process that started it": "open('/proc/1/environ').read().index('MINITRON_TEST_SECRET')",
    "the memory of the process that counts": "import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb+')",
    "processes outside": "import os\nos.kill({pid}, 0)",
    "the rights of root": "import os\nos.setuid(0)",
    "an early end that looks like success": "import os\nos._exit(0)",
    "a word that looks like success": "import os\nos.write(3, b'passed')\nos._exit(0)",
    "the end of the process that counts": "import os\nos.kill(os.getppid(), 9)",
    "the end of everything": "import os\nos.kill(-1, 9)",
    "endless output": "while True: print('a' * 9999)",
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """Calls a file that runs programs, each of them for half a second at most: whether one was solved."""
    file = tmp_path_factory.mktemp("runner") / "runner.py"
    file.write_text(RUNS_PROGRAMS)
    file.parent.chmod(0o755)  # root's sandbox has the rights of another user
    sandbox = Sandbox(Limits(seconds=0.5), [file.parent])
    yield lambda program: sandbox.call(file, "solved", program)
    sandbox.stop()


def escapes(run, program: str) -> bool:
    """Whether a program that a sandbox should stop ends well. Without a sandbox it does not run."""
    try:
        return run(program) == 1.0
    except (StoppedError, InputError):
        return False


def test_a_program_runs_or_is_refused_with_the_package_to_install(runner):
    if has_sandbox():
        assert runner("open('/tmp/mine', 'w').write('a')") == 1.0
        assert runner("assert sum([1, 2]) == 4") == 0.0
        assert runner("assert not __import__('os').path.exists('/tmp/mine')") == 1.0  # what the first one left is gone
    else:
        with pytest.raises(InputError, match="there is no sandbox") as refused:
            runner("pass")
        assert "apt-get install bubblewrap" in refused.value.remedy


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_stopped_and_the_next_program_runs_as_before(name, runner, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_TEST_SECRET", "secret")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        attack = ATTACKS[name].format(secret=str(secret), port=server.getsockname()[1], pid=os.getpid())
        assert not escapes(runner, attack)
    assert secret.read_text() == "secret"
    assert escapes(runner, "pass") == has_sandbox()


LEFT_BEHIND = {
    "a file": "open('/tmp/a', 'w').write('a')",
    "a closed folder": "import os\nos.mkdir('/tmp/a')\nopen('/tmp/a/a', 'wb').write(bytes(9_000_000))\nos.chmod('/tmp/a', 0)",
    "a deep folder": "import os\nfor _ in range(300):\n    os.mkdir('a')\n    os.chdir('a')",
}


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_nothing_that_a_program_leaves_behind_is_there_for_the_next(name, tmp_path):
    """Files that cannot be deleted cost a new sandbox; the answer to the program is the one that it had."""
    with sandboxed(tmp_path, Limits(seconds=10)) as run:  # megabytes may take the clock's limit on a busy machine
        for program in (
            LEFT_BEHIND[name],
            "import os\nassert not os.path.exists('/tmp/a')",
            "for n in 'ab': open(f'/tmp/{n}', 'wb').write(bytes(7_000_000))",
        ):
            assert escapes(lambda program: float(run(program)[0]), program) == has_sandbox()


def test_a_program_that_waits_for_a_busy_machine_has_its_cpu_time_all_the_same(tmp_path):
    file = tmp_path / "runner.py"
    file.write_text(RUNS_PROGRAMS)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    sandbox = Sandbox(Limits(seconds=0.5), [tmp_path])

    def run(program: str) -> float:
        return sandbox.call(file, "solved", program, seconds=60)

    assert escapes(run, "import time\ntime.sleep(0.8)") == has_sandbox()
    assert not escapes(run, "while True: pass")
    assert not escapes(run, "import time\nwhile True: time.sleep(9)")
    sandbox.stop()


def humaneval(folder, count: int = 3) -> Task:
    documents = [
        {
            "task_id": str(n),
            "prompt": "def add(a, b):\n",
            "test": "def check(f):\n    assert f(1, 2) == 3",
            "entry_point": "add",
        }
        for n in range(count)
    ]
    return Task("humaneval", str(write_jsonl(folder / "documents" / "test.jsonl", documents)))


def planted(folder, monkeypatch) -> None:
    """A working folder with the file that `evaluate.load("code_eval")` runs, and with modules named as lm-eval's."""
    monkeypatch.chdir(folder)
    for name in ("code_eval", "utils"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")


def test_humaneval_is_scored_in_the_sandbox_and_no_file_of_the_working_folder_runs(tmp_path, monkeypatch):
    planted(tmp_path, monkeypatch)
    answers = ["    return a + b\n", "    import os; os._exit(0)\n", "    return a - b\n"]
    monkeypatch.setattr(
        DocumentRequests, "generate_until", lambda self, requests, **_: [answers[r.doc_id] for r in requests]
    )
    task = Task("humaneval", humaneval(tmp_path).data, allow_code=True)
    if has_sandbox():
        result = evaluate_documents(tiny_model(0), byte_tokenizer(), [task], samples=3)["humaneval"]
        assert (result.score.metric, result.score.num_documents) == ("pass@1", 3)
        assert result.score.value == pytest.approx(1 / 3)
        # what the model wrote and the program that ran, the right one last
        shown = [(sample.value, sample.answer, sample.extracted) for sample in result.samples]
        programs = [f"def add(a, b):\n{answer}" for answer in answers]
        assert shown == [(value, answers[n], programs[n]) for value, n in ((0.0, 1), (0.0, 2), (1.0, 0))]
        limits = "5 s of CPU time, 15 s by the clock, or memory"
        assert [sample.problem for sample in result.samples] == [
            f"stopped at a limit ({limits}), or it ended its process",
            "AssertionError, in: assert f(1, 2) == 3",
            None,
        ]
    else:
        with pytest.raises(InputError, match="there is no sandbox"):
            evaluate(tiny_model(0), byte_tokenizer(), [task])
    assert not (tmp_path / "executed").exists()


PROBLEMS = {
    "def add(a, b):\n    return a.no": "AttributeError: 'int' object has no attribute 'no', in: assert f(1, 2) == 3",
    "def add(a, b)": "SyntaxError: expected ':' (<program>, line 1)",
    "raise ValueError('\\n'.join('ab'))": "ValueError: b",
    "class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd": "Odd",
    f"raise ValueError({5000 * 'x'!r})": f"ValueError: {5000 * 'x'}"[:1000],
}


@pytest.mark.skipif(not has_sandbox(), reason="needs bubblewrap")
def test_what_went_wrong_in_a_program_is_told_by_its_error_and_the_line_of_its_test(tmp_path, monkeypatch):
    answers = [[each] for each in PROBLEMS]
    (tmp_path / "several.yaml").write_text(SEVERAL.replace("repeats: 6", "repeats: 1").replace("k: [2]", "k: [1]"))
    (tmp_path / "grade.py").write_text(GRADE.replace('document["prompt"] + each', "each"))
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    monkeypatch.setattr(
        DocumentRequests, "generate_until", lambda self, requests, **_: [answers[r.doc_id][0] for r in requests]
    )
    task = Task("several", humaneval(tmp_path, len(answers)).data, allow_code=True, folder=str(tmp_path))
    [result] = evaluate_documents(tiny_model(0), byte_tokenizer(), [task], samples=9).values()
    assert {sample.answer: sample.problem for sample in result.samples} == PROBLEMS


SEVERAL = """
task: several
output_type: generate_until
dataset_path: documents
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}\\ncheck({{entry_point}})"
repeats: 6
generation_kwargs: {until: ["class"], do_sample: true, temperature: 0.2}
metric_list: [{metric: !function grade.pass_at, aggregation: mean, higher_is_better: true, k: [2]}]
filter_list:
  - {name: programs, filter: [{function: custom, filter_fn: !function grade.programs}]}
"""
GRADE = """
import evaluate
def pass_at(references, predictions, k):
    return evaluate.load("code_eval").compute(references=references, predictions=predictions, k=k)[0]
def programs(answers, documents):
    return [[document["prompt"] + each for each in own] for own, document in zip(answers, documents)]
"""


@pytest.mark.skipif(not has_sandbox(), reason="needs bubblewrap")
def test_programs_that_never_end_leave_time_for_the_others_of_their_document(tmp_path, monkeypatch):
    for name, text in (("several.yaml", SEVERAL), ("grade.py", GRADE)):
        (tmp_path / name).write_text(text)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    monkeypatch.setattr(generated_code, "GRADER_SECONDS", 0.5)
    monkeypatch.setattr(generated_code, "Limits", lambda: Limits(seconds=1.0))
    answers = [*["    while True: pass\n"] * 2, *["    return a + b\n"] * 4]
    monkeypatch.setattr(DocumentRequests, "generate_until", lambda self, requests, **_: answers)
    task = Task("several", humaneval(tmp_path).data, limit=1, allow_code=True, folder=str(tmp_path))
    [result] = evaluate_documents(tiny_model(0), byte_tokenizer(), [task]).values()
    assert result.score.value == pytest.approx(1 - 1 / 15)  # one pair of 15 is the two that never end


def test_formulas_and_programs_that_a_grader_evaluates_run_in_the_sandbox(tmp_path, monkeypatch):
    """cruxeval executes assertions itself, with a guard that a program can walk around."""
    outside = tmp_path / "outside"
    answers = ["f(1) == 1", f"f(1) == (open({str(outside)!r}, 'w').close() or 1)"]
    monkeypatch.setattr(
        DocumentRequests, "generate_until", lambda self, requests, **_: [answers[r.doc_id] for r in requests]
    )
    documents = [{"id": str(n), "code": "def f(x):\n    return x", "input": "1", "output": "1"} for n in range(2)]
    data = str(write_jsonl(tmp_path / "test.jsonl", documents))
    task = Task("cruxeval_output", data, allow_code=True)
    if has_sandbox():
        assert evaluate(tiny_model(0), byte_tokenizer(), [task])[task.name].value == 0.5
    else:
        with pytest.raises(InputError, match="there is no sandbox"):
            evaluate(tiny_model(0), byte_tokenizer(), [task])
    assert not outside.exists()


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "cruxeval_output", "minerva_math_algebra", "noticia"])
def test_without_allow_code_nothing_is_run_and_no_module_of_the_task_loaded(name, tmp_path, monkeypatch):
    """Programs, formulas, and metrics whose code is on the hub."""
    planted(tmp_path, monkeypatch)
    before = set(sys.modules)
    with pytest.raises(InputError, match=rf"task '{name}': (it runs code|its metric '\w+' is Python code)") as refused:
        evaluate(tiny_model(0), byte_tokenizer(), [Task(name, humaneval(tmp_path).data)])
    assert "allow_code: true (--allow-code on the command line)" in refused.value.remedy
    assert not {
        module for module in set(sys.modules) - before if module.startswith("lm_eval.tasks.") and "utils" in module
    }
    assert not (tmp_path / "executed").exists()


def test_a_definition_that_names_a_function_outside_lm_eval_is_refused(tmp_path, monkeypatch):
    """lm-eval imports a module that is not beside the definition from anywhere, also from the working folder."""
    planted(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    tasks = tmp_path / "lm_eval" / "tasks"
    (tasks / "own").mkdir(parents=True)
    (tasks / "own" / "own.yaml").write_text(
        "task: own\noutput_type: generate_until\nprocess_docs: !function code_eval.run\n"
    )
    monkeypatch.setattr("minitron.evaluation.task_index.tasks_folder", lambda: tasks)
    monkeypatch.setattr("minitron.evaluation.own_tasks.tasks_folder", lambda: tasks)
    stock.cache_clear()
    with pytest.raises(InputError, match="which is not in lm-eval's package"):
        evaluate(tiny_model(0), byte_tokenizer(), [Task("own", allow_code=True)])
    stock.cache_clear()
    assert not (tmp_path / "executed").exists()


def test_plan_refuses_a_recipe_with_a_code_task_until_it_allows_code(bench, tmp_path):
    tasks = f"evaluate.tasks=[{{name: humaneval, data: {humaneval(tmp_path).data}}}]"
    with pytest.raises(InputError, match=r"evaluate\.tasks\.0: task 'humaneval': it runs code"):
        plan(load_recipe(str(bench / "recipe.yaml"), [tasks]), storage_path=str(tmp_path / "unused"))
    recipe = load_recipe(str(bench / "recipe.yaml"), [tasks, "evaluate.allow_code=true"])
    if has_sandbox():
        assert plan(recipe, storage_path=str(tmp_path / "unused")).seconds > 0
    else:
        with pytest.raises(InputError, match=r"evaluate\.tasks\.0: there is no sandbox"):
            plan(recipe, storage_path=str(tmp_path / "unused"))
