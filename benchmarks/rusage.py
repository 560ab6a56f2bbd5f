"""Run a command and write its exit code, seconds and peak memory as JSON: rusage.py FILE COMMAND…

A program of its own: Linux lets a new process start with the peak memory of the process it was
forked from, so whoever starts what is measured must be small.
"""

import json
import os
import sys
import time

start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
# The maximum over the process and what it has waited for itself.
_, status, usage = os.wait4(pid, 0)
result = {
    "code": os.waitstatus_to_exitcode(status),
    "seconds": time.perf_counter() - start,
    "peak_bytes": usage.ru_maxrss * 1024,
}
with open(sys.argv[1], "w", encoding="utf-8") as file:  # noqa: PTH123 (pathlib is not small)
    json.dump(result, file)
