"""reftlab beside its peers on the embedded model: every environment in turn, round after round.

    make bench                                                          # three rounds, then the report
    python analyses/benchmarks/peers/bench.py --rounds 5 --peers reftlab peft

A round runs each environment's script once, in an order that differs from round to round. What a process
has measured is kept in `out/bench/rounds/`, under a key made of the code that is measured: Ctrl-C loses the
process that is running, and the same command goes on from there. Then `results.json`, `results.png` and the
tables in `README.md` are written anew.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import environments
import report
import works

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PEERS = ("reftlab", *environments.PACKAGES)
ONCE = ("equality",)  # no timing, so that one round is enough
PACKAGE_OF = {"transformer_lens": "transformer-lens", "transformer_lens_2": "transformer-lens"}
SURROUNDINGS = {
    "OMP_NUM_THREADS": str(works.THREADS),
    "MKL_NUM_THREADS": str(works.THREADS),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Process:
    """One process of a round.

    Attributes:
        name: of its file of results.
        peer: whose interpreter and script it takes.
        arguments: for the script.
    """

    name: str
    peer: str
    arguments: tuple[str, ...] = ()

    def command(self, to: Path, least: bool) -> list[str]:
        script = HERE / f"{self.peer}_works.py"
        ending = ["--to", str(to), *(["--least"] if least else [])]
        return [str(environments.python(self.peer)), str(script), *self.arguments, *ending]


def processes(peers: list[str]) -> list[Process]:
    first = tuple(work for work in works.WORKS if work != works.EQUAL)
    found = [Process(peer, peer, ("--works", *first)) for peer in peers]
    if "reftlab" in peers:
        found += [Process("equality", "reftlab", ("--works", works.EQUAL))]
        found += [
            Process(f"memory-{way.split()[0]}", "reftlab", ("--memory", way))
            for way in ("plain hook", "cone")
        ]
    return found


def key(least: bool) -> str:
    """Of all code whose change makes older timings worthless, and of the environments' packages."""
    digest = hashlib.sha256(repr((environments.PACKAGES, least, platform.node())).encode())
    for path in sorted([*(ROOT / "reftlab").rglob("*.py"), HERE / "works.py", *HERE.glob("*_works.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run(process: Process, file: Path, log: Path, least: bool) -> bool:
    """Runs one process; its lines stand in `file` only once it has ended well."""
    for left in file.parent.glob(f"{file.stem}.*.part"):
        left.unlink()
    # Named after this process: one that was killed may have left its child behind, still writing.
    part = file.with_suffix(f".{os.getpid()}.part")
    with log.open("w") as output:
        done = subprocess.run(
            process.command(part, least),
            env=os.environ | SURROUNDINGS,
            stdout=output,
            stderr=output,
            check=False,
        )
    if done.returncode == 0:
        part.rename(file)
    return done.returncode == 0


def measure(folder: Path, rounds: int, peers: list[str], least: bool) -> Iterator[str]:
    """Runs what has not been run yet; yields what failed."""
    every = processes(peers)
    for number in range(rounds):
        turn = number % len(every)
        for process in [*every[turn:], *every[:turn]]:
            file = folder / f"{number}-{process.name}.jsonl"
            if file.exists() or (number and process.name in ONCE):
                continue
            log, started = file.with_suffix(".log"), time.perf_counter()
            good = run(process, file, log, least)
            said = "" if good else f" FAILED, see {log.relative_to(ROOT)}"
            took = time.perf_counter() - started
            print(f"round {number + 1} of {rounds}: {process.name} {took:.0f} s{said}", flush=True)
            if not good:
                yield f"{process.name} in round {number + 1}"


def read(folder: Path) -> list[dict[str, object]]:
    """Every finished process's lines, with the number of their round."""
    lines = []
    for file in sorted(folder.glob("*.jsonl")):
        number = int(file.name.split("-")[0])
        lines += [{"round": number, **json.loads(line)} for line in file.read_text().splitlines()]
    return lines


def versions(peer: str) -> dict[str, str]:
    names = list(dict.fromkeys([PACKAGE_OF.get(peer, peer), "torch", "transformers"]))
    asked = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    done = subprocess.run(
        [environments.python(peer), "-c", asked], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def machine() -> dict[str, object]:
    """Processor, cores and memory, as far as the system tells."""
    words, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        words = named[0].split(":", 1)[1].strip() if named else words
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": words,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": works.THREADS,
    }


def import_time(folder: Path) -> str:
    """What `import_time.py` says; run once."""
    file = folder / "import.txt"
    if not file.exists():
        command = [sys.executable, str(HERE.parent / "import_time.py")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        file.write_text(said.strip())
    return file.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--fresh", action="store_true", help="forget the rounds that were measured already")
    parser.add_argument(
        "--least", action="store_true", help="a short run of everything; its report stays in out/"
    )
    options = parser.parse_args()
    options.peers = list(dict.fromkeys(["reftlab", *options.peers]))  # every ratio is to reftlab
    for peer in options.peers:
        if peer != "reftlab":
            environments.make(peer)
    environments.write_model()
    folder = environments.CACHE / "rounds" / key(options.least)
    folder.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        for file in folder.iterdir():
            file.unlink()
    rounds = 1 if options.least else options.rounds
    failed = list(measure(folder, rounds, options.peers, options.least))
    lines = read(folder)
    if not lines:
        raise SystemExit("nothing was measured")
    results = {
        "machine": machine(),
        "versions": {peer: versions(peer) for peer in options.peers},
        "reftlab": importlib.metadata.version("reftlab"),
        "import": "" if options.least else import_time(folder),
        "lines": lines,
    }
    target = folder if options.least else HERE
    report.write(results, target)
    print(f"\nwrote {', '.join(str((target / name).relative_to(ROOT)) for name in report.FILES)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    # A plain `kill` ends the running child too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("killed"))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on where this one was")
