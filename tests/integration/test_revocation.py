"""Promise 7 in a short form, and a check that the loop notices a broken gateway. Long form: CONTRIBUTING.md."""

from collections.abc import Sequence

from gateway.postgres.queries import Account, Queries
from testbed import Servers
from tests.integration.revocation import TAKINGS, Verdict, gateways, run_trials
from tests.support.gateways import MakeSettings, StartGateway

TRIALS = 300


async def test_every_process_refuses_from_the_commit_of_a_revocation_on(servers: Servers) -> None:
    async with gateways(servers, 3) as urls:
        tally = await run_trials(urls, servers.database_url, times=TRIALS, seed=1)
    assert tally.broken == []
    assert sum(tally.trials.values()) == TRIALS
    assert set(tally.trials) == set(TAKINGS)
    # The commits did meet requests in flight: some just before, some just after.
    assert tally.beside[Verdict(200, "")] > 0
    assert all(tally.beside[taking.told] > 0 for taking in TAKINGS.values())
    assert set(tally.beside) == {Verdict(200, ""), *(taking.told for taking in TAKINGS.values())}


class CachingQueries(Queries):
    """Queries with the fault that the loop exists to find: it caches accounts."""

    async def find_account(self, key_sha256: bytes, numbers: Sequence[str] = ()) -> Account | None:
        cache: dict[bytes, Account] = self.__dict__.setdefault("cache", {})
        account = await super().find_account(key_sha256, numbers)
        if key_sha256 not in cache:
            if account is None or not account.is_active:
                return account
            cache[key_sha256] = account
        cached = cache[key_sha256]
        return Account(cached.id, cached.is_active, (account or cached).lists)


async def test_the_loop_notices_a_cache(
    servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings())
    gateway.runtime.queries.__class__ = CachingQueries
    tally = await run_trials([gateway.api_url], servers.database_url, times=40, seed=1)
    noticed = {broken.partition(",")[0] for broken in tally.broken}
    assert noticed == {"key revoked", "account suspended"}, "and nothing of lists, which are not cached"
