"""Promise 7 in its short form, and whether the loop would notice a broken one. Long: CONTRIBUTING.md."""

import time

from gateway.store import Account, Store
from scripts.servers import Servers
from tests.conftest import MakeSettings, StartGateway
from tests.integration.revocation import TAKINGS, Verdict, gateways, play

TRIALS = 300


async def test_what_is_taken_away_is_refused_from_the_commit_on_by_every_process(servers: Servers) -> None:
    async with gateways(servers, 3) as urls:
        tally = await play(urls, servers.database_url, times=TRIALS, seed=1)
    assert tally.broken == []
    assert sum(tally.trials.values()) == TRIALS
    assert set(tally.trials) == set(TAKINGS)
    # The commits did meet requests in flight: some just before, some just after.
    assert tally.beside[Verdict(200, "")] > 0
    assert all(tally.beside[taking.told] > 0 for taking in TAKINGS.values())
    assert set(tally.beside) == {Verdict(200, ""), *(taking.told for taking in TAKINGS.values())}


class CachingStore(Store):
    """The mistake that the loop is there to catch: remembers accounts for a moment."""

    SECONDS = 0.05

    async def find_account(self, key_sha256: bytes) -> Account | None:
        cache = self.__dict__.setdefault("cache", {})
        known: tuple[float, Account | None] | None = cache.get(key_sha256)
        if known is None or known[0] < time.monotonic():
            known = cache[key_sha256] = time.monotonic() + self.SECONDS, await super().find_account(key_sha256)
        return known[1]


async def test_the_loop_notices_a_cache_of_fifty_milliseconds(
    servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings())
    gateway.runtime.store.__class__ = CachingStore
    tally = await play([gateway.api_url], servers.database_url, times=40, seed=1)
    accepted = [broken for broken in tally.broken if "status=200, code=''" in broken]
    assert any(broken.startswith("key revoked") for broken in accepted)
    assert any(broken.startswith("account suspended") for broken in accepted)
