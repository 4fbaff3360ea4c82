"""One campaign per target: so many seconds, or cases, from one seed; what was found, and what it cost."""

import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.raw import HttpFuzzer, write_findings
from tests.fuzz.stand import Stand, open_stand

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
WARM_UP = 0.1  # of the time: caches, pools and the heap find their size
GROWTH_MB = 32.0  # beyond what it held after that: what a leak of a few bytes a request would exceed in a long run
GROWTH_DESCRIPTORS = 40  # the fuzzer's own connections, some of them on their way out
# A bad message costs a row of a 200, not the request: so a body that the schema forbids may be answered well. And a
# good one may be refused, where its Idempotency-Key had come with another.
EXCLUDED_CHECKS = "negative_data_rejection,positive_data_acceptance"


@dataclass
class Result:
    """What a campaign came to."""

    target: str
    cases: int
    findings: list[str]
    notes: list[str] = field(default_factory=list)


async def play(
    target: str, environment: Mapping[str, str], seed: int, seconds: float, findings: Path, *, most: int | None = None
) -> Result:
    """Play one. `environment` names the servers; `most` ends it after so many cases."""
    if target in ("requests", "frames"):
        return await pure(target, seed, seconds, findings, most=most)
    async with open_stand(environment) as stand:
        if target == "http":
            result = await http(stand, seed, seconds, findings, most=most)
        else:
            result = await document(stand, seed, seconds, findings, most=most)
        await stand.settle()
        result.findings += stand.faults()
        neighbour, callers = stand.neighbour, stand.callers
        sent, errors, p99_ms = len(neighbour.latencies_s), len(neighbour.errors), neighbour.p99_ms()
        counted, published = sum(caller.counted for caller in callers), sum(caller.published for caller in callers)
        result.notes += [
            f"neighbour: {sent:,} requests, {errors} errors, p99 {p99_ms:.0f} ms",
            f"messages: {counted:,} counted, {published:,} out of the queue",
        ]
        return result


async def http(stand: Stand, seed: int, seconds: float, findings: Path, *, most: int | None = None) -> Result:
    """Conversations over raw sockets."""
    fuzzer = HttpFuzzer(stand, seed)
    tally = fuzzer.tally
    began = time.monotonic()
    await fuzzer.run(until=began + seconds * WARM_UP, most=most and int(most * WARM_UP))
    resident_mb, descriptors = stand.resident_mb(), stand.descriptors()
    await fuzzer.run(until=began + seconds, most=most)
    grown_mb = stand.resident_mb() - resident_mb
    rate = tally.requests / (time.monotonic() - began)
    if tally.findings:
        write_findings(tally, findings, seed)
    result = Result("http", tally.requests, [what for what, _ in tally.findings])
    answers = ", ".join(f"{label} {count:,}" for label, count in sorted(tally.statuses.items()))
    result.notes = [
        f"{rate:,.0f} requests a second; answers: {answers}",
        f"resident: {resident_mb:.1f} MB after the first tenth, {resident_mb + grown_mb:.1f} MB at the end",
        f"descriptors: {descriptors} after the first tenth, {stand.descriptors()} at the end",
    ]
    if grown_mb > GROWTH_MB:
        result.findings.append(f"memory grew by {grown_mb:.0f} MB")
    if stand.descriptors() > descriptors + GROWTH_DESCRIPTORS:
        result.findings.append(f"{stand.descriptors()} descriptors are open, {descriptors} were")
    return result


async def document(stand: Stand, seed: int, seconds: float, findings: Path, *, most: int | None = None) -> Result:
    """Schemathesis on the OpenAPI document, as the gateway serves it."""
    program = Path(sys.executable).with_name("schemathesis")
    options = [
        *("run", f"{stand.process.url}/openapi.json", "--seed", str(seed), "--no-color", "--continue-on-failure"),
        *("--header", f"X-Api-Key: {stand.damaged.key}", "--exclude-checks", EXCLUDED_CHECKS),
        *("--max-examples", str(most or 1_000_000), "--max-time", str(max(1, int(seconds)))),
        *("--generation-database", "none"),
    ]
    with tempfile.TemporaryDirectory() as directory:  # whatever it may leave behind
        status, said = await _run(program, *options, cwd=directory)
    generated = re.search(r"([\d,]+) generated", said)
    cases = int(generated[1].replace(",", "")) if generated else 0
    result = Result("document", cases, [])
    if status or not cases:
        report = _folder(findings) / f"document-{seed}.txt"
        report.write_text(said)
        result.findings = [f"schemathesis: {line}" for line in re.findall(r"^- (.+)$", said, re.MULTILINE)] or [said]
        result.findings.append(f"see {report}")
    return result


async def pure(target: str, seed: int, seconds: float, findings: Path, *, most: int | None = None) -> Result:
    """Atheris on the pure modules; a run of its own, since it ends with its process."""
    prefix = _folder(findings) / f"{target}-"
    with tempfile.TemporaryDirectory() as grown:
        arguments = [
            *("-m", "tests.fuzz.pure", target, grown, str(CORPUS / target)),
            *(f"-seed={seed % 2**32 or 1}", f"-max_total_time={max(1, int(seconds))}", "-max_len=100000"),
            *("-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={prefix}"),
            *([f"-runs={most}"] if most else []),
        ]
        status, said = await _run(Path(sys.executable), *arguments, cwd=ROOT)
    executed = re.search(r"number_of_executed_units: (\d+)", said)
    result = Result(target, int(executed[1]) if executed else 0, [])
    if status or not executed:
        result.findings = [said[-3000:]]
    return result


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path.absolute()


async def _run(program: Path, *arguments: str, cwd: str | Path) -> tuple[int, str]:
    """A program's exit code and all it printed."""
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    return process.returncode or 0, said.decode(errors="replace")
