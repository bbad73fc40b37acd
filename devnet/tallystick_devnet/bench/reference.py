"""transformers' own `generate` in a process of its own, asked line by line: what the network is compared with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tallystick_devnet.processes import ProcessFailed


class Reference:
    """Use as a context manager."""

    def __init__(self, folder: Path, threads: int) -> None:
        """threads: at most; it takes one instead where that is quicker in a trial."""
        command = [sys.executable, "-m", "tallystick_devnet.bench.reference", str(folder), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def generate(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """{"ids", "first_s": until the first token, "rest_s": for the others}."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProcessFailed(f"generate's process ended with status {self._process.wait()}; see above")
        found: dict[str, Any] = json.loads(line)
        return found


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):  # type: ignore[misc]
        """When each token came; the prompt comes first."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    model.generation_config = GenerationConfig()  # nothing ends an answer, and no token is penalised

    def generate(prompt: list[int], tokens: int) -> dict[str, Any]:
        ids, clock = torch.tensor([prompt]), Clock()
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0,
                streamer=clock,
            )  # fmt: skip
        first = clock.times[1]
        found = out[0, ids.shape[1] :].tolist()
        return {"ids": found, "first_s": first - began, "rest_s": clock.times[-1] - first}

    def seconds(count: int) -> float:
        torch.set_num_threads(count)
        return min(float(generate(list(range(2, 34)), 9)["rest_s"]) for _ in range(4))

    quickest = min({1, threads}, key=seconds)
    torch.set_num_threads(quickest)
    answer({"threads": quickest, "ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        answer(generate(asked["prompt"], asked["tokens"]))


def answer(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
