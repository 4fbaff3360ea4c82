"""Promise 7 in its short form, and whether the loop would notice a broken one. Long: CONTRIBUTING.md."""

from gateway.postgres.queries import Account, Queries
from testbed import Servers
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


class CachingQueries(Queries):
    """The mistake that the loop is there to catch: remembers the accounts it has let in."""

    async def find_account(self, key_sha256: bytes) -> Account | None:
        cache: dict[bytes, Account] = self.__dict__.setdefault("cache", {})
        if key_sha256 not in cache:
            account = await super().find_account(key_sha256)
            if account is None or not account.is_active:
                return account
            cache[key_sha256] = account
        return cache[key_sha256]


async def test_the_loop_notices_a_cache(
    servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings())
    gateway.runtime.queries.__class__ = CachingQueries
    tally = await play([gateway.api_url], servers.database_url, times=40, seed=1)
    noticed = {broken.partition(",")[0] for broken in tally.broken}
    assert noticed == {"key revoked", "account suspended"}, "and nothing of lists, which are not cached"
