"""The one loop: snapshot → decide → commit to the ledger → act on the cluster.

Everything that happens only wakes it. A round that fails anywhere is simply run again: what it
committed is in the ledger, and the next round decides the rest anew.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from dpmoe_operator.api.ledgerentry import Record
from dpmoe_operator.control.allocation import Allocation
from dpmoe_operator.control.decide import decide, react
from dpmoe_operator.control.freeze import frozen
from dpmoe_operator.control.market import Market
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.kube.apply import Applier
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import ApiError, Forbidden
from dpmoe_operator.kube.lease import Leadership
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.resources import PODS
from dpmoe_operator.kube.workloads import WorkloadWatch
from dpmoe_operator.launch.launching import JOB_UID
from dpmoe_operator.ledger.account import Grant
from dpmoe_operator.ledger.entry import Unverified, in_entries
from dpmoe_operator.ledger.log import Ledger, NoAnswer, StaleView, format_time
from dpmoe_operator.scheduling.policies import policy

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
FROZEN_SECONDS = 5.0


class RoundLoop:
    """Runs rounds while this process leads.

    Attributes:
        last_round: monotonic time at which a round last ended well.
    """

    def __init__(
        self,
        *,
        client: KubeClient,
        picture: Picture,
        ledger: Ledger,
        leadership: Leadership,
        resync: Callable[[], Awaitable[None]],
        watch: WorkloadWatch,
        settings: Settings,
        identity: str,
        round_seconds: float,
    ) -> None:
        self.last_round = time.monotonic()
        self._client, self._picture, self._ledger = client, picture, ledger
        self._leadership, self._settings = leadership, settings
        self._resync, self._watch = resync, watch
        self._applier = Applier(client, picture, identity=identity, leads=lambda: leadership.held)
        self._planner = Planner(settings)
        self._market = Market()
        self._round_seconds = round_seconds

    async def run(self) -> None:
        """Run rounds for ever: at once when something changed, else every `round_seconds`."""
        fresh = False
        await asyncio.to_thread(policy(self._settings.policy).warm_up)
        while True:
            if not self._leadership.held:
                fresh = False
                await self._wait_for_leadership()
            try:
                if not fresh:
                    await self._ledger.load()
                    await self._look_again()
                    fresh = True
                again = await self.round()
            except StaleView as view:
                logger.warning("%s; deciding again", view)
                fresh, again = False, True
            except Unverified as error:
                logger.critical("granting is frozen: %s: %s", error.reason, error)
                fresh, again = False, True
                await self._say_frozen(error)
                self.last_round = time.monotonic()  # A restart would not mend the ledger.
                await asyncio.sleep(FROZEN_SECONDS)
            except (ApiError, NoAnswer, TimeoutError) as error:
                logger.warning("round given up: %s", error or type(error).__name__)
                again = True
                await asyncio.sleep(RETRY_SECONDS)
            if not again:
                await self._wait()

    async def round(self) -> bool:
        """One round.

        Returns:
            Whether the next one should follow at once, since the ledger changed.
        """
        self._picture.changed.clear()
        unserved = await self._watch.follow(self._picture.data_namespaces(self._ledger.state))
        await self._confirm_pods()
        now = datetime.now(UTC)
        snapshot = self._picture.snapshot(self._ledger.state, now, unserved)
        decision = await asyncio.to_thread(
            decide, snapshot, self._settings, self._planner, self._market
        )
        if not self._leadership.held:
            return True
        for records in in_entries(decision.records):
            entry = await self._ledger.append(records, time=format_time(now))
            logger.info("%s: %s", entry, _summary(records))
        if decision.allocation.granted:
            logger.info("round: %s", _efficiency(decision.allocation))
        await self._ledger.secure()
        if any(record.account_opened for record in decision.records):
            # Jobs could not ask for these accounts yet; what people read can wait for that.
            return True
        actions = await asyncio.to_thread(react, snapshot, decision, self._settings)
        if actions and not decision.records:
            # A Job whose grant this view does not have yet looks like one without a grant.
            await self._ledger.confirm()
        complete = await self._applier.apply(actions)
        self._forget()
        await self._ledger.tidy(now, self._picture.job_uids())
        self.last_round = time.monotonic()
        return bool(decision.records) or not complete

    async def _look_again(self) -> None:
        """See the cluster at least as late as the ledger.

        Another operator may have written about objects that no watch has brought here yet, and
        what is not seen looks deleted: its grant would be settled, its pods stopped.
        """
        await self._resync()
        await self._watch.restart()

    async def _wait_for_leadership(self) -> None:
        self.last_round = time.monotonic()
        await self._plan_ahead()
        while not self._leadership.held:
            self.last_round = time.monotonic()
            await _within(self._leadership.wait(), self._round_seconds)

    async def _plan_ahead(self) -> None:
        """Decide without effect: plans take long to calibrate, and are remembered."""
        try:
            await self._ledger.load()
            snapshot = self._picture.snapshot(self._ledger.state, datetime.now(UTC))
            await asyncio.to_thread(decide, snapshot, self._settings, self._planner)
        except (ApiError, NoAnswer, TimeoutError, Unverified) as error:
            logger.info("not planned ahead: %s", error)

    async def _wait(self) -> None:
        if await _within(self._picture.changed.wait(), self._round_seconds):
            # Objects that are applied together arrive together: let a burst become one round.
            await asyncio.sleep(0.05)

    async def _say_frozen(self, error: Unverified) -> None:
        snapshot = self._picture.snapshot(self._ledger.state, datetime.now(UTC))
        try:
            await self._applier.apply(frozen(snapshot, error.reason, str(error)))
        except ApiError as problem:
            logger.warning("could not say so in the statuses: %s", problem)

    async def _confirm_pods(self) -> None:
        """Read the pods of workloads that ended: their last word must not be missed.

        A namespace that is forbidden by now keeps its own from being settled, and no others.
        """
        for workload in self._picture.unconfirmed(self._ledger.state):
            uid = workload.meta.labels[JOB_UID]
            try:
                pods, version = await self._client.list(
                    PODS, workload.meta.namespace, f"{JOB_UID}={uid}"
                )
            except Forbidden as error:
                logger.warning("%s is not confirmed: %s", workload.meta.name, error)
                continue
            self._picture.confirm_pods(workload, pods, version)

    def _forget(self) -> None:
        jobs = self._picture.job_uids()
        grants = self._ledger.state.grants
        self._picture.forget_pods_of(
            [
                uid
                for uid in self._picture.pod_owners()
                if uid not in jobs and _over(grants.get(uid))
            ]
        )
        self._planner.forget_all_but(jobs)


async def _within(event: Awaitable[object], seconds: float) -> bool:
    """Wait for an event, but not longer; whether it came.

    Not `wait_for`: before Python 3.12 it forgets a cancellation that meets the event, and the
    process would never end.
    """
    try:
        async with asyncio.timeout(seconds):
            await event
    except TimeoutError:
        return False
    return True


def _over(grant: Grant | None) -> bool:
    return grant is None or grant.settled is not None


def _efficiency(allocation: Allocation) -> str:
    """What a round was worth, of what it could have been, and who of the modest got their share."""
    outcome = allocation.outcome
    assert outcome is not None
    bound = "" if outcome.bound is None else f" of at most {outcome.bound:g}"
    return (
        f"weight {outcome.weight:g}{bound} is granted; of {outcome.fair} jobs that ask at most"
        f" their fair share, {outcome.fair_granted} are"
    )


def _summary(records: list[Record]) -> str:
    kinds = [next(iter(record.to_object())) for record in records]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
