"""Figures -> tables and a plot. Knows nothing of how they were taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Table = tuple[str, list[list[str]]]


def tables(document: Json) -> Iterator[Table]:
    """Yield the title and the rows of a table for each measure, of who ran in none, and of what our buckets are."""
    absent = never(document)
    for what, measure in document["measures"].items():
        marks = [mark for mark in ("mbu", "mfu") if any(mark in row for row in measure["rows"].values())]
        same = any("same" in row for row in measure["rows"].values())
        header = [
            "contestant", "median", "min..max", f"x {document['base']}", *["same"] * same, *map(str.upper, marks), "",
        ]  # fmt: skip
        rows = [header]
        for name, row in measure["rows"].items():
            if name in absent:
                continue
            if "why" in row:
                rows.append([name, "-", "", "", *[""] * same, *[""] * len(marks), row["why"]])
                continue
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            extra = [f"{row[mark]:.0%}" if mark in row else "" for mark in marks]
            remark = ", ".join(filter(None, ["best" * (name == measure["best"]), row.get("remark", "")]))
            spread = f"{short(row['min'])}..{short(row['max'])}"
            equal = [f"{row['same']:.0%}" if "same" in row else ""] * same
            rows.append([name, short(row["median"]), spread, ratio, *equal, *extra, remark])
        yield f"{what} ({measure['better']} is better)", rows
    if absent:
        yield "contestants that did not run", [["contestant", "why"], *map(list, absent.items())]
    if document.get("buckets"):
        yield "our buckets", bucket_rows(document["buckets"])


def never(document: Json) -> dict[str, str]:
    """Return who has not one figure, and why."""
    rows = [item for measure in document["measures"].values() for item in measure["rows"].items()]
    ran = {name for name, row in rows if "median" in row}
    return {name: row["why"] for name, row in rows if name not in ran}


def bucket_rows(buckets: list[Json]) -> list[list[str]]:
    """Return a row for each bucket."""
    rows = [["bucket", "dtype", "build s", "peak GB", "MB", ""]]
    for row in buckets:
        numbers = [short(row["seconds"]), short(row["peak_bytes"] / 1e9), short(row["bytes"] / 1e6)]
        rows.append([row["bucket"], row["dtype"], *numbers, row["why"] or row["state"]])
    return rows


def show(document: Json, *, markdown: bool) -> None:
    """Print the machine and every table, for a terminal or for the README."""
    machine, limits = document["machine"], document["limits"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    cores = f"{machine['cores']} cores, load average {machine['load_average']:.1f} at the start"
    print(f"{machine['cpu']}, {cores}; {versions}.")
    if limits:
        peaks = ", ".join(f"{name} {limits[f'{name} gflops']:.0f}" for name in ("fp32", "bf16"))
        print(f"Memory is read at {limits['read_gb_s']:.1f} GB/s, matrix products reach {peaks} GFLOP/s.")
    if document["build_s"]:
        print(f"Our {len(document['buckets'])} buckets were built or found in {document['build_s']:.0f} s.")
    print(
        f"Medians of {document['runs']} rounds or as many as a title says; x: times as fast as {document['base']}, "
        "or as large; same: prompts with the ids of Hugging Face at equal precision."
    )
    for title, rows in tables(document):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if markdown:
            lines = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
        print(f"\n{title}\n" + "\n" * markdown + "\n".join(lines))


def short(number: float) -> str:
    """Return a number in about three digits, without an exponent."""
    return f"{number:.{0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2}f}"


def plot(document: Json, path: Path) -> None:
    """Draw tokens/s against context, a line for each contestant."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[int, float]]] = {}
    for measure in document["measures"].values():
        if measure["kind"] != "decode":
            continue
        for name, row in measure["rows"].items():
            if "median" in row:
                lines.setdefault(name, []).append((measure["context"], row["median"]))
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for name, points in lines.items():
        ours = name.startswith("ours ")
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name, linewidth=2.5 if ours else 1.2)
    axes.set(xlabel="tokens of context", ylabel="tokens/s", yscale="log", title="Greedy decode of one sequence")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
