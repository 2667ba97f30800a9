"""The report as one HTML file: no script, no network, light and dark, wide and narrow."""

from __future__ import annotations

from collections import Counter, defaultdict
from html import escape
from typing import Any

from dougong_compat.report.plots import margin_strip, stacked_bar

__all__ = ["html"]

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--fg:#1d1b18;--dim:#6b665e;--line:#dfdad2;--card:#fff;--good:#2f7d4f;
--bad:#b3261e;--skip:#b9b2a6;--warn:#9a6b00;--mark:#8a5a2b}
@media(prefers-color-scheme:dark){:root{--bg:#171614;--fg:#ece8e1;--dim:#a19a8e;--line:#36322c;--card:#1f1d1a;
--good:#6cc08b;--bad:#f2877d;--skip:#5a544b;--warn:#e0b354;--mark:#d0a070}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:72rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .25rem;letter-spacing:-.01em}h2{font-size:1.15rem;margin:2.5rem 0 .75rem}
p{margin:.4rem 0}.dim{color:var(--dim)}code,pre{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.86em}
a{color:var(--mark)}
.verdict{display:inline-block;font-size:.8em;vertical-align:.12em;
font-weight:650;padding:.1rem .6rem;border-radius:.35rem;border:1px solid currentColor}
.CONFORMANT{color:var(--good)}.NOT{color:var(--bad)}.INVALID{color:var(--warn)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;background:var(--card)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr:last-child td{border-bottom:0}th{color:var(--dim);font-weight:550}
td.bound{white-space:normal}.ok{color:var(--good)}.no{color:var(--bad);font-weight:650}.un{color:var(--dim)}
.fail{border:1px solid var(--line);border-left:3px solid var(--bad);background:var(--card);border-radius:.4rem;
padding:.6rem .8rem;margin:.6rem 0;overflow-wrap:anywhere}
.fail pre{margin:.4rem 0 0;white-space:pre-wrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(7rem,1fr));gap:.75rem;margin:1.25rem 0}
.tile{border:1px solid var(--line);border-radius:.5rem;background:var(--card);padding:.6rem .9rem}
.tile b{display:block;font-size:1.5rem;line-height:1.25;font-variant-numeric:tabular-nums}.tile span{color:var(--dim)}
.tile.zero b{color:var(--dim);font-weight:500}
.family{display:grid;grid-template-columns:6.5rem 1fr;gap:.4rem 1rem;padding:.6rem .9rem;
border-bottom:1px solid var(--line);align-items:center}
.family:last-child{border-bottom:0}.chips{display:flex;flex-wrap:wrap;gap:.35rem;align-items:center}
.chip{border:1px solid var(--good);border-radius:.35rem;padding:.05rem .5rem;font-size:.86em;white-space:nowrap}
.chip small{color:var(--dim);margin-left:.4em;font-size:.86em;font-variant-numeric:tabular-nums}
.chip.refused{border-color:var(--skip);color:var(--dim)}.chip.undeclared{border-style:dashed}
.chip.failed{border-color:var(--bad);color:var(--bad);font-weight:650}.chip.failed small{color:inherit}
.more{margin-top:.75rem}.more summary{color:var(--dim)}.more .scroll{margin-top:.5rem}
details>summary{cursor:pointer}svg{display:block;width:100%;height:auto}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1rem}
figure{margin:0;padding:.75rem;border:1px solid var(--line);border-radius:.5rem;background:var(--card)}
figcaption{font-size:.85rem;color:var(--dim);margin-top:.25rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:0}dt{color:var(--dim)}dd{margin:0;
overflow-wrap:anywhere}
@media(max-width:36rem){main{padding:1.25rem .9rem 3rem}h1{font-size:1.35rem}dl{grid-template-columns:1fr}
dd{margin-bottom:.5rem}th,td{padding:.3rem .35rem;font-size:.88rem}.plots{grid-template-columns:1fr}.wide{display:none}
.tiles{grid-template-columns:1fr 1fr}.tile:first-child{grid-column:1/-1}.name{display:block;font-size:.8rem;
white-space:normal}.family{grid-template-columns:1fr}td:first-child{white-space:normal}}
"""

_WORDS = {"CONFORMANT": "conformant", "NOT": "not conformant", "INVALID": "invalid"}
_FAMILY_NAMES = {
    "block": "block size", "dim": "head size", "kv": "cache dtype", "ratio": "heads per KV head", "op": "other ops",
}  # fmt: skip
_WIDE = ("executed", "floor", "margin", "")
_BAD = ("FAIL", "ERROR", "CRASH", "TIMEOUT", "XPASS")
_LEVEL_NAMES = {
    "L0": "device and memory", "L1": "op numerics", "L2": "paged-KV semantics", "L3": "engine parity",
    "L4": "determinism and stress",
}  # fmt: skip


def html(report: dict[str, Any], needs: dict[str, tuple[str, ...]] | None = None) -> str:
    """The page. ``needs``: case id -> capabilities, for the matrix."""
    word, totals = report["verdict"], report["totals"]
    failed = sum(totals[name.lower()] for name in _BAD)
    parts = [
        f"<h1>{escape(report['backend'])} <span class='verdict {word}'>{_WORDS[word]}</span></h1>",
        (
            f"<p class='dim'>{escape(report['environment'].get('device', ''))} · profile {report['profile']} in "
            f"{report['seconds']:.0f} s · suite {report['suite']['version']} · {escape(_moment(report['when']))} · "
            f"tolerance {report['manifest']['tolerance']}</p>"
        ),
        _tiles(totals, failed, len(report.get("not_run", ()))),
    ]
    parts += [f"<p class='{word}'>{escape(reason)}</p>" for reason in report["reasons"]]
    parts.append(_levels(report))
    parts.append(_failures(report))
    parts.append(_matrix(report, needs or {}))
    parts.append(_margins(report))
    if report["performance"]:
        parts.append(_performance(report))
    parts.append(_environment(report))
    title = f"{escape(report['backend'])}: {word.lower()} ({report['profile']})"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _moment(when: str) -> str:
    return f"{when[:16].replace('T', ' ')} UTC"


def _tiles(totals: dict[str, int], failed: int, not_run: int) -> str:
    shown = (
        ("cases", totals["cases"], ""), ("passed", totals["pass"], "ok"), ("failed", failed, "no"),
        ("refused", totals["unsupported"], "un"), ("waived", totals["waived"], "un"),
        *([("not run", not_run, "no")] if not_run else ()),
    )  # fmt: skip
    return "<div class='tiles'>" + "".join(
        f"<div class='tile{'' if count else ' zero'}'><b class='{kind}'>{count:,}</b><span>{name}</span></div>"
        for name, count, kind in shown
    ) + "</div>"  # fmt: skip


def _levels(report: dict[str, Any]) -> str:
    rows = []
    for name, level in report["levels"].items():
        if not level["required"]:
            continue
        outcomes = [case["outcome"] for case in report["cases"] if case["level"] == name]
        bad = sum(outcome in _BAD for outcome in outcomes)
        skipped = outcomes.count("UNSUPPORTED") + outcomes.count("WAIVED")
        margin = "" if level["worst_margin"] is None else f"{level['worst_margin']:.2f}"
        rows.append(
            f"<tr><td>{name} <span class='dim name'>{_LEVEL_NAMES[name]}</span></td><td>{level['required']}</td>"
            f"<td class='wide'>{level['executed']}</td><td class='wide'>{level['floor']}</td>"
            f"<td class='ok'>{level['passed']}</td>"
            f"<td class='{'no' if bad else 'un'}'>{bad}</td><td class='un'>{skipped}</td><td class='wide'>{margin}</td>"
            f"<td class='wide' style='min-width:9rem'>{stacked_bar(level['passed'], bad, skipped)}</td></tr>"
        )
    head = "".join(
        f"<th{' class=wide' if name in _WIDE else ''}>{name}</th>"
        for name in ("level", "cases", "executed", "floor", "passed", "failed", "refused", "margin", "")
    )
    legend = (
        "Refused: not declared in the manifest, and the backend said no before it computed. Margin: the worst error "
        "of a case that passed, as a share of its bound. Floor: cases that must be executed for a verdict."
    )
    return (
        f"<h2>Levels</h2><div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"
        f"<p class='dim'>{legend}</p>"
    )


def _failures(report: dict[str, Any]) -> str:
    bad = [case for case in report["cases"] if case["outcome"] in _BAD]
    if not bad:
        return "<h2>Failures</h2><p>None.</p>"
    shown = []
    for case in bad[:200]:
        link = f" · <a href='{escape(case['link'])}'>upstream</a>" if case.get("link") else ""
        shown.append(
            f"<div class='fail'><b>{case['outcome']}</b> <code>{escape(case['id'])}</code>{link}<br>"
            f"{escape(case.get('message', ''))}<pre>{escape(case.get('reproduce', ''))}</pre></div>"
        )
    more = f"<p class='dim'>and {len(bad) - 200} more in report.json</p>" if len(bad) > 200 else ""
    groups = Counter(case["id"].rpartition("/")[0] for case in bad)
    most = ", ".join(f"<code>{escape(name)}</code> {count}" for name, count in groups.most_common(8))
    where = f"<p class='dim'>Most of them in {most}.</p>" if len(bad) > 8 else ""
    return f"<h2>Failures ({len(bad)})</h2>{where}{''.join(shown)}{more}"


def _matrix(report: dict[str, Any], needs: dict[str, tuple[str, ...]]) -> str:
    """Capability by outcome: passed of those run, or refused."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for case in report["cases"]:
        column = 0 if case["outcome"] == "PASS" else 1 if case["outcome"] in _BAD else 2
        for need in needs.get(case["id"], ()):
            found[need][column] += 1
    if not found:
        return ""
    capabilities = report["manifest"]["capabilities"]
    families: dict[str, list[str]] = defaultdict(list)
    rows = []
    for need in sorted(found, key=_order):
        good, bad, refused = found[need]
        declared = _declared(need, capabilities)
        family, _, member = need.partition(":")
        kind = "failed" if bad else "holds" if good else "refused"
        count = f"{bad} of {good + bad} failed" if bad else f"{good}" if good else "refused"
        families[family if member else "of its own"].append(
            f"<span class='chip {kind}{'' if declared else ' undeclared'}'>{escape(member or need.replace('_', ' '))}"
            f"<small>{count}</small></span>"
        )
        rows.append(
            f"<tr><td><code>{escape(need)}</code></td><td>{'yes' if declared else 'no'}</td>"
            f"<td class='ok'>{good}</td><td class='{'no' if bad else 'un'}'>{bad}</td>"
            f"<td class='un'>{refused}</td></tr>"
        )
    matrix = "".join(
        f"<div class='family'><span class='dim'>{_FAMILY_NAMES.get(family, family)}</span>"
        f"<div class='chips'>{''.join(chips)}</div></div>"
        for family, chips in families.items()
    )
    head = "".join(f"<th>{name}</th>" for name in ("capability", "declared", "passed", "failed", "refused"))
    return (
        "<h2>Capabilities</h2><p class='dim'>Each with the number of cases that passed. Dashed: not declared in the "
        f"manifest, and probed.</p><div class='scroll'>{matrix}</div>"
        "<details class='more'><summary>As a table</summary>"
        f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div></details>"
    )


def _order(need: str) -> tuple[str, int, str]:
    family, _, member = need.partition(":")
    return family, int(member) if member.isdigit() else 0, member


def _declared(need: str, capabilities: dict[str, Any]) -> bool:
    from dougong_compat.manifest import FAMILIES

    family, _, member = need.partition(":")
    if not member:
        return bool(capabilities.get(family))
    listed = capabilities.get(FAMILIES.get(family, ""), [])
    return listed == "any" or member in listed


def _margins(report: dict[str, Any]) -> str:
    groups: dict[str, list[float]] = defaultdict(list)
    for case in report["cases"]:
        if case.get("margin") is not None and case["outcome"] == "PASS":
            level, group, *rest = case["id"].split("/")
            # a bug's own cases are few: together they make a picture
            whole = group in ("regression", "corpus") or len(rest) < 2
            name = f"{level}/{group}" if whole else f"{level}/{group}/{rest[0]}"
            groups[name].append(float(case["margin"]))
    plots = [
        f"<figure>{margin_strip(values)}<figcaption><b>{escape(name)}</b><br>{len(values)} cases, "
        f"worst {max(values):.2f} of its bound"
        "</figcaption></figure>"
        for name, values in sorted(groups.items())
        if max(values) > 0
    ]
    if not plots:
        return ""
    return (
        "<h2>Margins</h2><p class='dim'>Cases by error over bound: 1 fails. A kernel that drifts shows here first.</p>"
        f"<div class='plots'>{''.join(plots)}</div>"
    )


def _performance(report: dict[str, Any]) -> str:
    ceilings, rows = [], []
    for row in report["performance"]:
        if row["name"].startswith("ceiling: "):
            name = row["name"].partition(": ")[2].replace("matmul", "matrix product")
            ceilings.append(f"{name} {row['achieved']}")
            continue
        time = f"{row['microseconds']:,.1f}" if "microseconds" in row else ""
        share = "" if row.get("share") is None else f"{row['share']:.0%}"
        bound, invalid = str(row.get("message") or row.get("ceiling", "")), " class='no'" if row.get("invalid") else ""
        achieved = escape(str(row.get("achieved", "")))
        rows.append(
            f"<tr><td>{escape(row['name'])}</td><td>{time}</td><td class='wide'>{achieved}</td>"
            f"<td class='bound'>{escape(bound)}</td><td{invalid}>{share}</td></tr>"
        )
    names = ("shape", "µs", "achieved", "bound by", "share")
    head = "".join(f"<th{' class=wide' if name == 'achieved' else ''}>{name}</th>" for name in names)
    own = f"<p class='dim'>This device's own ceilings: {escape(', '.join(ceilings))}.</p>" if ceilings else ""
    return f"<h2>Performance</h2>{own}<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _kernel(kernel: dict[str, Any]) -> str:
    return f"{kernel['provider']} (plugin {' '.join((kernel['plugin'], kernel.get('version', ''))).strip()})"


def _providers(cases: list[dict[str, Any]]) -> str:
    """Whose code passed how many cases: where a backend's own kernels refuse, the core's reference may answer."""
    found = Counter(case["provider"] for case in cases if case["outcome"] == "PASS" and case.get("provider"))
    return ", ".join(f"{name}: {count:,}" for name, count in found.most_common()) or "nobody"


def _fuzzing(search: dict[str, Any]) -> str:
    return f"{search['examples']} examples, {'one failed' if search['failed'] else 'none failed'}"


def _environment(report: dict[str, Any]) -> str:
    environment = report["environment"]
    rows = {
        "device": f"{environment.get('device', '')} ({environment.get('device_type', '')})",
        "plugin": f"{environment.get('plugin', '')} {environment.get('version', '')}",
        "kernels": ", ".join(map(_kernel, environment.get("kernels", []))) or "the core's reference",
        "answered by": _providers(report["cases"]),
        "left out": ", ".join(environment.get("left_out", [])) or "no other plugin's kernels were on offer",
        "layouts": ", ".join(layout["name"] for layout in environment.get("layouts", [])),
        "torch": environment.get("torch", ""),
        "python": f"{environment.get('python', '')} on {environment.get('machine', '')}",
        "manifest": report["manifest"].get("source", ""),
        "cases": f"sha256 {report['suite']['cases_sha256']}",
        "workers": report.get("jobs", 1),
        "worker restarts": report.get("worker_restarts", 0),
        **({"fuzzing": _fuzzing(report["fuzzing"])} if "fuzzing" in report else {}),
        **environment.get("facts", {}),
    }
    body = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in rows.items())
    return f"<h2>Environment</h2><dl>{body}</dl>"
