"""What `import reftlab` costs over `import torch`, each in fresh processes, in turn.

python analyses/benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

RUNS = 11
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    seconds("import torch, reftlab")
    rows = [(seconds("import torch"), seconds("import torch, reftlab")) for _ in range(RUNS)]
    torch, both = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"medians of {RUNS} processes: torch {torch:.2f} s, torch and reftlab {both:.2f} s, "
        f"reftlab over torch {both - torch:.3f} s"
    )


if __name__ == "__main__":
    main()
