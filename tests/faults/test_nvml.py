"""A driver that lies or goes away: a library of our own in the place of NVIDIA's, loaded by real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Tally, only_full

LIBRARY = r"""
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
static int calls = 0, gone_after = 1 << 30;
static const char *lie = "";
#define ENTER if (++calls > gone_after) return 15 /* GPU is lost */;
void set_lie(const char *kind, int after) { lie = strdup(kind); calls = 0; gone_after = after; }
static int is(const char *kind) { return !strcmp(lie, kind); }
typedef struct { unsigned long long total, free, used; } memory_t;
int nvmlInit_v2(void) { ENTER return is("no driver") ? 9 : 0; }
int nvmlInitWithFlags(unsigned flags) { return nvmlInit_v2(); }
int nvmlShutdown(void) { ENTER return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { ENTER *count = is("many") ? 4000000000u : 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **handle) {
    ENTER if (is("one lost") && i == 1) return 15;
    *handle = (void *)(size_t)(i + 1); return 0; }
int nvmlDeviceGetUUID(void *h, char *text, unsigned n) {
    ENTER snprintf(text, n, is("same") ? "GPU-1" : "GPU-%d", (int)(size_t)h); return 0; }
int nvmlDeviceGetName(void *h, char *text, unsigned n) {
    ENTER snprintf(text, n, is("names") ? "\x1b]0;owned\x07 \xff\xfe" : "GPU"); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory_t *m) {
    ENTER m->total = 24ull << 30; m->free = 20ull << 30; m->used = 4ull << 30;
    if (is("more free than there is")) m->free = 30ull << 30;
    if (is("no memory")) m->total = m->free = 0;
    if (is("endless")) m->total = m->free = ~0ull;
    return 0; }
int nvmlDeviceGetMigMode(void *h, unsigned *a, unsigned *b) { ENTER return 3; }
int nvmlSystemGetProcessName(unsigned pid, char *text, unsigned n) { ENTER snprintf(text, n, "\x1b[2Jgone"); return 0; }
const char *nvmlErrorString(int code) { return "\x1b[31mlost"; }
"""
CHILD = """
import ctypes, json, sys
library = ctypes.CDLL("libnvidia-ml.so.1")
from heretic.hardware.gpus import visible_gpus
from heretic.hardware.memory_usage import memory_usage
told = []
for kind, after in json.loads(sys.argv[1]):
    library.set_lie(kind.encode(), after)
    report = visible_gpus({})
    library.set_lie(kind.encode(), after)
    use = memory_usage()
    told.append([kind, after, len(report.gpus), report.problem, [[u.used, u.total] for u in use]])
print(json.dumps(told))
"""
TWO = """
import sys
from heretic.cli.main import main
for arguments in (["preflight"], ["run", "--run-name", "mine", "--trials", "1"]):
    sys.argv = ["heretic", *arguments]
    try:
        main()
    except SystemExit as finished:
        print("status", finished.code, flush=True)
"""
LIES = ["", "no driver", "many", "one lost", "same", "names", "more free than there is", "no memory", "endless"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library that lies."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY)
    made = ["-shared", "-fPIC", "-w", "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    subprocess.run([compiler, *made], check=True)
    return folder


def test_every_lie_and_gone_after_every_call(library: Path, tally: Tally) -> None:
    asked = [(lie, 1 << 30) for lie in LIES] + [("", calls) for calls in range(40)]
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment["LD_LIBRARY_PATH"] = str(library)
    command = [sys.executable, "-c", CHILD, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told) == len(asked)
    found = {kind: (count, unseen) for kind, after, count, unseen, _ in told if after > 1000}
    assert found[""] == (3, None)
    assert found["one lost"][0] == 2 and "GPU 1" in found["one lost"][1]
    for kind in ("no driver", "many", "more free than there is", "no memory", "endless"):
        assert found[kind][0] == 0 and found[kind][1], f"{kind} was believed"
    for _, _, count, unseen, use in told:
        assert count == 3 or unseen, "what could not be seen is not said"
        assert all(0 <= used <= total for used, total in use)
    tally("a driver (NVML) that lies", len(LIES), "nothing: not believed, and said")
    tally("a driver (NVML) that is gone after each of its first 40 calls", 40, "nothing: said")


@pytest.mark.parametrize(
    "lie", ["names", *(pytest.param(lie, marks=only_full) for lie in ("one lost", "more free than there is"))]
)
def test_preflight_and_run_under_it(library: Path, config: Path, lie: str, tally: Tally) -> None:
    (library / f"{lie}.c").write_text(LIBRARY.replace('lie = "";', f'lie = "{lie}";'))
    folder = library / lie.replace(" ", "-")
    folder.mkdir()
    made = ["-shared", "-fPIC", "-w", "-o", str(folder / "libnvidia-ml.so.1"), str(library / f"{lie}.c")]
    subprocess.run([str(shutil.which("cc")), *made], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment["LD_LIBRARY_PATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", TWO], env=environment, capture_output=True, text=True, errors="replace"
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said and "\x1b]0" not in said and "\x1b[2J" not in said and "\x1b[31mlost" not in said
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status ")]
    assert done.returncode == 0 and len(statuses) == 2 and set(statuses) <= {"status 0", "status 2"}, said
    tally("preflight and a run with a driver (NVML) that lies", 2, "nothing")
