"""The arithmetic of the capacity calculator, with round numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.drivers.workers import REPOSITORY
from benchmarks.questions import capacity
from benchmarks.questions.capacity import Costs, Wanted

COSTS = Costs(gateway_cpu_us=2.0, broker_cpu_us=10.0, database_cpu_us=0.1, queue_messages_per_s=50_000)


def test_cores_follow_from_costs_and_rate() -> None:
    taken = capacity.calculate(COSTS, Wanted(1_000_000, headroom=0.5, cores_per_broker_node=8, copies=3))
    assert taken.gateway_cores == pytest.approx(2.0)
    assert taken.gateway_processes == 4
    assert taken.broker_cores == pytest.approx(30.0)
    assert taken.broker_nodes == 8  # 30 cores, half of each kept free, on nodes of 8
    assert taken.queues == 40
    assert taken.database_cores == pytest.approx(0.1)
    assert taken.network_copies_gbit == pytest.approx(2 * taken.network_amqp_gbit)


def test_there_are_never_fewer_nodes_than_copies() -> None:
    assert capacity.calculate(COSTS, Wanted(1_000, copies=3)).broker_nodes == 3


def test_envelopes_spare_the_network_their_frames() -> None:
    wanted = Wanted(1_000_000)
    enveloped = Costs(2.0, 10.0, 0.1, 50_000, sms_per_message=100)
    single = capacity.calculate(COSTS, wanted)
    assert capacity.calculate(enveloped, wanted).network_amqp_gbit < 0.8 * single.network_amqp_gbit


@pytest.mark.parametrize("content", [None, "", "{}", '{"figures": []}', "no JSON"])
def test_a_file_that_compare_has_not_written_is_one_line_with_the_command_that_writes_it(
    tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks", "capacity", "--from", str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --from {file}: ")
    assert done.stderr.endswith(f": write it with `scripts/bench compare --json {file}`\n")
