"""A report as titled tables of text: what the terminal and the HTML page both show, in the same words.

A new kind of finding becomes one more function here, and appears everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..backend import TensorSpec
from ..cost import Cost
from ..measure import Timing
from ..notes import Ranking
from ..verify import Certificate
from .values import AuditSummary, Report

RANKED = 20  # places of a ranking where not all are shown


@dataclass(frozen=True)
class Section:
    """One table. ``numeric`` are the indices of right-aligned columns; ``tone`` marks rows by index.

    A tone is ``"warning"`` or ``"error"``: what must not be overlooked. ``bars`` are lengths, 0 to 1, one
    for each row, drawn behind the last column; the caption says what they mean.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    tones: tuple[tuple[int, str], ...] = ()
    caption: str = ""
    bars: tuple[float, ...] = ()

    def tone(self, row: int) -> str:
        """The tone of a row, or nothing."""
        return dict(self.tones).get(row, "")


def sections(report: Report, *, full: bool = False) -> Iterator[Section]:
    """The tables of a report; ``full`` lists every place of a note and of a ranking, not only the first."""
    yield _overview(report)
    yield _cost("cost", "captured", report.original, "optimised", report.final)
    if report.passes:
        yield _passes(report)
    notes = _notes(report, full)
    if notes.rows:
        yield notes
    for record in report.passes:
        yield from (_ranking(pass_name(record.text), r, full) for r in record.rankings if r.rows)
    if report.certificates:
        yield _certificates(report)
    if report.audit is not None:
        yield from audit_sections(report.audit, full)
    if report.contestants:
        yield _contestants(report)
    yield _latency(report)
    if report.files:
        rows = tuple((name, size_text(size)) for name, size in report.files.items())
        yield Section("files", ("file", "size"), rows, frozenset({1}))
    if report.versions:
        yield Section("versions", ("package", "version"), tuple(report.versions.items()))


def _overview(report: Report) -> Section:
    target = report.target
    rows = [
        ("model", report.model),
        ("target", f"{target.name} ({target.arch})"),
        ("backend", report.backend),
        ("pipeline", report.pipeline or "(empty)"),
        *(("input", spec_text(spec)) for spec in report.inputs),
        *(("output", spec_text(o) if isinstance(o, TensorSpec) else repr(o)) for o in report.outputs),
        ("example inputs", report.example_source),
    ]
    return Section("graphprune", ("", ""), tuple(rows))


def _cost(title: str, first: str, before: Cost, second: str, after: Cost) -> Section:
    rows = (
        ("operators", f"{before.nodes:,}", f"{after.nodes:,}", change(before.nodes, after.nodes)),
        ("parameters", count_text(before.parameters), count_text(after.parameters),
         change(before.parameters, after.parameters)),
        ("tensor bytes", size_text(before.bytes), size_text(after.bytes), change(before.bytes, after.bytes)),
        ("MACs", count_text(before.macs), count_text(after.macs), change(before.macs, after.macs)),
    )  # fmt: skip
    return Section(title, ("", first, second, "change"), rows, frozenset({1, 2, 3}))


def _passes(report: Report) -> Section:
    rows, tones = [], []
    for index, record in enumerate(report.passes):
        before, after = record.before, record.after
        certificate = record.certificate
        if certificate is not None:
            proof = str(certificate)
            if record.mask is not None:
                proof = f"masking {record.mask}; outputs {certificate}"
        else:
            proof = "not verified" if record.changed else "unchanged"
        if (certificate is not None and not certificate.passed) or (certificate is None and record.changed):
            tones.append((index, "warning"))
        rows.append((
            record.text,
            arrow(f"{before.nodes:,}", f"{after.nodes:,}"),
            arrow(count_text(before.parameters), count_text(after.parameters)),
            arrow(size_text(before.bytes), size_text(after.bytes)),
            arrow(count_text(before.macs), count_text(after.macs)),
            proof,
            f"{record.seconds:.2f} s",
        ))  # fmt: skip
    columns = ("pass", "operators", "parameters", "bytes", "MACs", "certificate", "time")
    return Section("passes", columns, tuple(rows), frozenset({1, 2, 3, 4, 6}), tuple(tones))


def _notes(report: Report, full: bool) -> Section:
    """Notes with one message share a row, so that fifty folded layers do not bury one refusal."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for note in report.notes:
        groups.setdefault(("", "info", note), [])
    for record in report.passes:
        for entry in record.notes:
            key = (pass_name(record.text), entry.kind, entry.message)
            groups.setdefault(key, []).append(entry.where)
    rows = tuple((*key, places(where, full)) for key, where in groups.items())
    tones = tuple((i, "warning") for i, row in enumerate(rows) if row[1] == "refused")
    return Section("notes", ("pass", "kind", "note", "where"), rows, frozenset(), tones)


def _ranking(name: str, ranking: Ranking, full: bool) -> Section:
    """A row and a bar for every place; without ``full`` the first ones and all that were chosen."""
    shown = [(p, r) for p, r in enumerate(ranking.rows, 1) if full or p <= RANKED or r.chosen]
    missing = len(ranking.rows) - len(shown)
    more = f"{missing} more are in the report's JSON and HTML" if missing else ""
    return Section(
        f"{name}: {ranking.title}",
        ("place", "name", ranking.unit, ""),
        tuple((str(place), row.name, f"{row.value:.1f}", row.remark) for place, row in shown),
        frozenset({0, 2}),
        tuple((i, "warning") for i, (_, row) in enumerate(shown) if row.chosen),
        "; ".join(filter(None, (ranking.caption, more))),
        tuple(row.share for _, row in shown),
    )


def _certificates(report: Report) -> Section:
    rows, tones = [], []
    for index, (title, certificate) in enumerate(report.certificates.items()):
        rows.append((title, *certificate_text(certificate)))
        if not certificate.passed:
            tones.append((index, "error"))
    columns = ("comparison", "verdict", "max error", "mean error", "SQNR", "argmax agreement")
    return Section(
        "certificates", columns, tuple(rows), frozenset({2, 3, 4, 5}), tuple(tones),
        "errors are relative to the largest reference value",
    )  # fmt: skip


def audit_sections(audit: AuditSummary, full: bool) -> Iterator[Section]:
    """Operators by kind and precision, and those that are not as asked."""
    rows = tuple(
        (kind, precision, f"{count:,}", count_text(macs) if macs else "")
        for kind, precision, count, macs in audit.operators
    )
    shown = rows if full else rows[:12]
    caption = f"and {len(rows) - len(shown)} more kinds" if len(shown) < len(rows) else ""
    if audit.integers:
        caption = "; ".join(filter(None, (f"{audit.integers:.1%} of the MACs in integers", caption)))
    columns = ("operator", "precision", "count", "MACs")
    yield Section("what the runtime executes", columns, shown, frozenset({2, 3}), (), caption)
    fallbacks = audit.fallbacks
    if fallbacks:
        tones = tuple((i, "warning") for i in range(len(fallbacks)))
        columns = ("operator", "kind", "precision", "why")
        yield Section("not as asked", columns, fallbacks, frozenset(), tones)


def _contestants(report: Report) -> Section:
    rows = tuple(
        (one.backend, f"{one.timing.median_ms:.3f} ms",
         f"{one.timing.low_ms:.3f} to {one.timing.high_ms:.3f} ms", str(one.to_chosen),
         "taken" if one.chosen else "")
        for one in report.contestants
    )  # fmt: skip
    columns = ("backend", "median", "quartiles", "times as long", "")
    caption = "in turns in one process; the target's default stays where the others are within the spread"
    return Section("backends", columns, rows, frozenset({1, 2, 3}), (), caption)


def _latency(report: Report) -> Section:
    latency = report.latency
    if latency.artifact is None:
        reason = latency.reason or "not measured"
        return Section("latency", ("",), ((reason,),), frozenset(), ((0, "warning"),))
    timings = {f"artifact, {report.backend}": (latency.artifact, f"{latency.speedup or ''}")}
    if latency.unrounded is not None:
        timings[f"the same in float, {report.backend}"] = (latency.unrounded, "")
    if latency.original is not None:
        timings = {"original, eager": (latency.original, ""), **timings}
    threads = "default threads" if latency.threads is None else f"threads: {latency.threads}"
    caption = f"called in turn in one process, {threads}{', on ' + latency.host if latency.host else ''}"
    if latency.gain is not None:
        caption = f"{caption}; {latency.gain} times as fast as in float"
    return timing_section(timings, caption)


def timing_section(timings: Mapping[str, tuple[Timing, str]], caption: str) -> Section:
    """Latencies by name, each with how many times faster it is."""
    rows = tuple(
        (name, f"{t.median_ms:.3f} ms", f"{t.low_ms:.3f} to {t.high_ms:.3f} ms", str(t.rounds), speedup)
        for name, (t, speedup) in timings.items()
    )
    columns = ("", "median", "quartiles", "rounds", "times faster")
    return Section("latency", columns, rows, frozenset({1, 2, 3, 4}), (), caption)


def certificate_text(certificate: Certificate) -> tuple[str, str, str, str, str]:
    """Verdict, largest and mean relative error, SQNR and argmax agreement."""
    verdict = ("exact" if certificate.exact else "recorded") if certificate.passed else "FAILED"
    details = [f"computed in {certificate.precision}"] if certificate.precision else []
    details += [certificate.reason] if certificate.reason else []
    if details:
        verdict = f"{verdict}: {'; '.join(details)}"
    return (
        verdict,
        error_text(certificate.max_relative),
        error_text(certificate.mean_relative),
        f"{certificate.sqnr:.1f} dB",
        f"{100 * certificate.agreement:.2f} %",
    )


def error_text(error: float) -> str:
    """``3.1e-07``, and a plain 0 for no difference at all."""
    return f"{error:.1e}" if error else "0"


def spec_text(spec: TensorSpec) -> str:
    """``x: float32[batch, 3, 224, 224]``."""
    return f"{spec.name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]"


def count_text(count: float) -> str:
    """``4.1 G``, ``25.6 M``, ``512``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"


def size_text(size: float) -> str:
    """Bytes in decimal units: ``102.4 MB``."""
    text = count_text(size)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def change(before: float, after: float) -> str:
    """``-12.5 %``, or nothing where nothing changed."""
    if before == after:
        return ""
    return f"{100 * (after - before) / before:+.1f} %" if before else "new"


def arrow(before: str, after: str) -> str:
    """``before -> after``, or the one value where both read the same."""
    return after if before == after else f"{before} -> {after}"


def pass_name(text: str) -> str:
    """The name of a pass in its textual form, without options."""
    return text.partition("{")[0]


def places(where: Sequence[str], full: bool) -> str:
    """The places of a note: the first three and how many more, or all."""
    named = [w for w in where if w]
    shown = named if full else named[:3]
    more = len(named) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
