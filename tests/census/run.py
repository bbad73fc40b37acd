"""The whole census: workers of their own, so that a type that crashes or hangs costs only itself."""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from census.configs import Entry, entries
from census.exam import Result
from census.table import put_table, special_cases

TIMEOUT_SECONDS = 150
_GRAVITY = ("bitwise", "close", "refused", "unbuildable", "wrong")
ROOT = Path(__file__).parents[2]


class Worker:
    """One process; started again after a crash or a timeout."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def examine(self, entry: Entry) -> dict[str, Any]:
        process = self._process
        if process is None or process.poll() is not None:
            path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
            process = self._process = subprocess.Popen(
                ["nice", "-n", "3", sys.executable, "-m", "census.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        timer = threading.Timer(TIMEOUT_SECONDS, process.kill)
        timer.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(entry.name + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer:
            return json.loads(answer)  # type: ignore[no-any-return]
        why = f"the process ended with {process.wait()}, or took over {TIMEOUT_SECONDS} s"
        return asdict(Result(entry.type, entry.task, entry.architecture, "wrong", why))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def take_census(chosen: Sequence[Entry], jobs: int, kept: Path | None = None) -> list[dict[str, Any]]:
    """The results, in the order of `chosen`. kept: a file of results, a line each; what is in it is not run again."""
    before = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    known = {(one["type"], one["task"]): one for one in before}
    results: dict[int, dict[str, Any]] = {}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index, entry in enumerate(chosen):
        if (entry.type, entry.task) in known:
            results[index] = known[entry.type, entry.task]
        else:
            waiting.put(index)

    def work() -> None:
        worker = Worker()
        try:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                results[index] = found = worker.examine(chosen[index])
                if kept is not None:
                    with kept.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                said = f"{chosen[index].name}: {found['result']} {found['why']}".strip()
                canonical = "canonical" if found["canonical"] else f"stock ({found['canonical_why']})"
                sys.stderr.write(f"{len(results)}/{len(chosen)} {said} | {canonical}\n")
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(len(chosen))]


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts, of model types. A type is bitwise, or canonical, when all its text tasks in transformers' tables are;
    else it is what the worst of them is."""
    types: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        types.setdefault(result["type"], []).append(result)
    worst = {name: max(found, key=lambda one: _GRAVITY.index(one["result"])) for name, found in types.items()}
    reasons = {kind: {name: one["why"] for name, one in worst.items() if one["result"] == kind} for kind in _GRAVITY}
    return {
        "types": len(types),
        "built": len(types) - len(reasons["unbuildable"]),
        "bitwise": len(reasons["bitwise"]),
        "close": len(reasons["close"]),
        "wrong": reasons["wrong"],
        "refused": reasons["refused"],
        "unbuildable": reasons["unbuildable"],
        "canonical": sum(all(one["canonical"] for one in found) for found in types.values()),
        "packs": sum(all(one["packs"] for one in found) for found in types.values()),
        "published": sum(all(one["published"] for one in found) for found in types.values()),
        "pairs": len(results),
        "special_cases": special_cases(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="census", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--types", help="model types, comma-separated; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, help="a file of results: what it holds is kept, what is new is added")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    said = parser.parse_args()
    wanted = set(said.types.split(",")) if said.types else None
    chosen = [entry for entry in entries() if wanted is None or entry.type in wanted]
    results = take_census(chosen, said.jobs, said.results)
    if said.write:
        put_table(ROOT / "docs" / "models.md", results, summary(results))
    sys.stdout.write((json.dumps(summary(results)) if said.json else json.dumps(summary(results), indent=1)) + "\n")


if __name__ == "__main__":
    main()
