"""One campaign per target: it fuzzes for some seconds, or a number of cases, from one seed, and reports findings."""

import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.fuzzed_gateway import FuzzedGateway, open_fuzzed_gateway
from tests.fuzz.raw import HttpFuzzer, write_findings

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
WARM_UP = 0.1  # of the time: caches, pools and the heap reach their size
GROWTH_MB = 32.0  # after the warm-up; a leak of a few bytes per request exceeds it in a long run
GROWTH_DESCRIPTORS = 40  # the fuzzer's own connections, some of them being closed
# A bad message costs a row of a 200, not the request: so a body that the schema forbids may be accepted. And a body
# that the schema allows may be refused, when its Idempotency-Key came with another body before.
EXCLUDED_CHECKS = "negative_data_rejection,positive_data_acceptance"


@dataclass
class Result:
    """The result of a campaign."""

    target: str
    cases: int
    findings: list[str]
    notes: list[str] = field(default_factory=list)


async def run_campaign(
    target: str, environment: Mapping[str, str], seed: int, seconds: float, findings: Path, *, most: int | None = None
) -> Result:
    """Run one campaign. `environment` names the servers; `most` ends it after so many cases."""
    if target in ("requests", "frames"):
        return await pure(target, seed, seconds, findings, most=most)
    async with open_fuzzed_gateway(environment) as gateway:
        if target == "http":
            result = await http(gateway, seed, seconds, findings, most=most)
        else:
            result = await document(gateway, seed, seconds, findings, most=most)
        await gateway.settle()
        result.findings += gateway.faults()
        neighbour = gateway.neighbour
        sent, errors, p99_ms = len(neighbour.took_s), len(neighbour.failures), neighbour.p99_ms()
        counted, consumed = sum(map(gateway.counted, gateway.callers)), gateway.consumed.total()
        result.notes += [
            f"neighbour: {sent:,} requests, {errors} errors, p99 {p99_ms:.0f} ms",
            f"messages: {counted:,} counted, {consumed:,} out of the queue",
        ]
        return result


async def http(gateway: FuzzedGateway, seed: int, seconds: float, findings: Path, *, most: int | None = None) -> Result:
    """Fuzz with conversations over raw sockets."""
    fuzzer = HttpFuzzer(gateway, seed)
    tally = fuzzer.tally
    began = time.monotonic()
    await fuzzer.run(until=began + seconds * WARM_UP, most=most and int(most * WARM_UP))
    before = gateway.process.footprint()
    await fuzzer.run(until=began + seconds, most=most)
    after = gateway.process.footprint()
    rate = tally.requests / (time.monotonic() - began)
    if tally.findings:
        write_findings(tally, findings, seed)
    result = Result("http", tally.requests, [finding for finding, _ in tally.findings])
    answers = ", ".join(f"{label} {count:,}" for label, count in sorted(tally.statuses.items()))
    result.notes = [
        f"{rate:,.0f} requests a second; answers: {answers}",
        f"resident: {before.resident_mb:.1f} MB after the first tenth, {after.resident_mb:.1f} MB at the end",
        f"descriptors: {before.descriptors} after the first tenth, {after.descriptors} at the end",
    ]
    if (grown_mb := after.resident_mb - before.resident_mb) > GROWTH_MB:
        result.findings.append(f"memory grew by {grown_mb:.0f} MB")
    if after.descriptors > before.descriptors + GROWTH_DESCRIPTORS:
        result.findings.append(f"{after.descriptors} descriptors are open, {before.descriptors} were")
    return result


async def document(
    gateway: FuzzedGateway, seed: int, seconds: float, findings: Path, *, most: int | None = None
) -> Result:
    """Fuzz with schemathesis on the OpenAPI document that the gateway serves."""
    program = Path(sys.executable).with_name("schemathesis")
    options = [
        *("run", f"{gateway.process.url}/openapi.json", "--seed", str(seed), "--no-color", "--continue-on-failure"),
        *("--header", f"X-Api-Key: {gateway.damaged.key}", "--exclude-checks", EXCLUDED_CHECKS),
        *("--max-examples", str(most or 1_000_000), "--max-time", str(max(1, int(seconds)))),
        *("--generation-database", "none"),
    ]
    # A folder for the files that it may leave behind.
    with tempfile.TemporaryDirectory() as directory:
        status, output = await _run(program, *options, cwd=directory)
    generated = re.search(r"([\d,]+) generated", output)
    cases = int(generated[1].replace(",", "")) if generated else 0
    result = Result("document", cases, [])
    if status or not cases:
        report = _folder(findings) / f"document-{seed}.txt"
        report.write_text(output)
        failures = re.findall(r"^- (.+)$", output, re.MULTILINE)
        result.findings = [f"schemathesis: {line}" for line in failures] or [output]
        if not cases:
            result.findings.append(f"no case was generated in {seconds:.0f} s: nothing was tested. Give more --minutes")
        result.findings.append(f"see {report}")
    return result


async def pure(target: str, seed: int, seconds: float, findings: Path, *, most: int | None = None) -> Result:
    """Fuzz the pure modules with atheris, in a process of its own, since libFuzzer ends the process."""
    prefix = _folder(findings) / f"{target}-"
    with tempfile.TemporaryDirectory() as grown:
        arguments = [
            *("-m", "tests.fuzz.pure", target, grown, str(CORPUS / target)),
            *(f"-seed={seed % 2**32 or 1}", f"-max_total_time={max(1, int(seconds))}", "-max_len=100000"),
            *("-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={prefix}"),
            *([f"-runs={most}"] if most else []),
        ]
        status, output = await _run(Path(sys.executable), *arguments, cwd=ROOT)
    executed = re.search(r"number_of_executed_units: (\d+)", output)
    result = Result(target, int(executed[1]) if executed else 0, [])
    if status or not executed:
        result.findings = [output[-3000:]]
    return result


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path.absolute()


async def _run(program: Path, *arguments: str, cwd: str | Path) -> tuple[int, str]:
    """Run a program; return its exit code and everything it printed."""
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    return process.returncode or 0, output.decode(errors="replace")
