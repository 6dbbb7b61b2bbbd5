"""One scheduling round: waiting jobs and accounts become arrays, the policy grants, the rest waits.

A namespace's cap on a block is one more row of budget: a job of that namespace must fit both. What
is granted here is checked once more in exact integers before it may be committed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.api.ledgerentry import Granted
from dpmoe_operator.api.privateblock import Unlocking
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.access import Refusal
from dpmoe_operator.control.accounts import Standing
from dpmoe_operator.control.job_status import Waiting, timed_out
from dpmoe_operator.control.market import Market, Row
from dpmoe_operator.control.planning import Planned
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.control.times import format_time, parse_time
from dpmoe_operator.control.views import JobView, Snapshot
from dpmoe_operator.ledger.account import Account
from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.privacy.units import MAX_UNITS, format_epsilon
from dpmoe_operator.scheduling import unlocking
from dpmoe_operator.scheduling.explain import Explanation, explain
from dpmoe_operator.scheduling.filling import check_grants
from dpmoe_operator.scheduling.outcome import Outcome
from dpmoe_operator.scheduling.policies import policy
from dpmoe_operator.scheduling.round import ABSENT, Round

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Unlocked:
    """What unlocking released of an account so far.

    Attributes:
        rule: the unlocking rule, in its state at this round.
        amounts: at each order of the account, in 10⁻⁹ ε.
        complete_at: when time-unlocking will have released all of it; None otherwise.
        soon: what will be released within the operator's foresight; as `amounts` without one.
    """

    rule: unlocking.Unlocking
    amounts: tuple[int, ...]
    complete_at: datetime | None = None
    soon: tuple[int, ...] = ()


@dataclass(frozen=True)
class Allocation:
    """The outcome of a round.

    Attributes:
        granted: records of the jobs that get budget, in the policy's order.
        unlocked: by account.
        outcome: of the policy, on the round's own rows; None if nobody took part.
        apart: why jobs did not take part, by uid.
        explain_rest: why jobs that took part got nothing, by uid.
    """

    granted: tuple[Granted, ...] = ()
    unlocked: Mapping[str, Unlocked] = field(default_factory=dict)
    outcome: Outcome | None = None
    apart: Mapping[str, Waiting] = field(default_factory=dict)
    explain_rest: Callable[[], Mapping[str, Waiting]] = dict

    @cached_property
    def waiting(self) -> Mapping[str, Waiting]:
        """Why every job without budget has none, by its uid.

        Found out when it is asked for: with thousands of jobs it takes as long as the decision, and
        grants need not wait for it.
        """
        return {**self.apart, **self.explain_rest()}


def allocate(
    snapshot: Snapshot,
    settings: Settings,
    judged: Mapping[tuple[str, str], Standing],
    plans: Mapping[str, Planned],
    refusals: Mapping[str, Refusal],
    market: Market | None = None,
) -> Allocation:
    """Run the policy over the jobs that may get budget now.

    Args:
        snapshot: jobs, accounts, time.
        settings: the policy, and the fairness share.
        judged: blocks and their accounts.
        plans: jobs that could be planned, by uid.
        refusals: jobs that could not, by uid.
        market: remembers prices between rounds; None to start afresh.
    """
    apart: dict[str, Waiting] = {
        uid: Waiting(refusal.reason, refusal.message)
        for uid, refusal in refusals.items()
        if not snapshot.ledger.knows(uid)
    }
    candidates: list[Planned] = []
    for uid, planned in plans.items():
        if snapshot.ledger.knows(uid):
            continue
        hold = _held_back(planned, snapshot)
        if hold is not None:
            apart[uid] = hold
        else:
            candidates.append(planned)
    unlocked = _unlocked(snapshot, judged, candidates, settings.foresight_seconds)
    if not candidates:
        return Allocation(unlocked=unlocked, apart=apart)
    market = market or Market()
    table = _Table(snapshot, candidates, unlocked)
    round_ = table.round(looks_ahead=settings.foresight_seconds > 0)
    rows = table.meaning()
    orders = tuple(map(str, table.orders))
    outcome = policy(settings.policy).grant(
        round_, prices=market.quote(rows, orders), fairness=settings.fairness
    )
    check_grants(round_, outcome.granted)
    market.learn(rows, orders, outcome.prices)
    return Allocation(
        granted=tuple(table.tasks[int(task)].reservation for task in outcome.granted),
        unlocked=unlocked,
        outcome=outcome,
        apart=apart,
        explain_rest=partial(_explained, table, round_, outcome),
    )


def _explained(table: "_Table", round_: Round, outcome: Outcome) -> dict[str, Waiting]:
    """Why each job that took part in a round and got nothing has to wait, by its uid."""
    waiting = {}
    for explanation in explain(
        round_, outcome.granted, outcome.order, table.rules(), outcome.planned
    ):
        planned = table.tasks[explanation.task]
        waiting[planned.job.meta.uid] = _in_words(planned, explanation, table)
    return waiting


def _held_back(planned: Planned, snapshot: Snapshot) -> Waiting | None:
    """Why a planned job does not take part in this round."""
    spec = planned.job.spec
    assert spec is not None
    if timed_out(planned.job, snapshot.now):
        return _waiting(planned, Reason.PENDING_EVALUATION, "its timeout is over")
    if spec.suspend:
        return _waiting(
            planned, Reason.SUSPENDED, "spec.suspend is true; set it to false to ask for budget"
        )
    if any(account not in snapshot.ledger.accounts for account in planned.accounts):
        return _waiting(
            planned, Reason.PENDING_EVALUATION, "the account of a block is being opened"
        )
    return None


def _waiting(planned: Planned, reason: Reason, message: str) -> Waiting:
    privacy = planned.plan.privacy
    return Waiting(
        reason,
        message,
        epsilon=privacy.epsilon,
        noise_multiplier=privacy.noise_multiplier,
        sampling_rate=privacy.sampling_rate,
        steps=privacy.steps,
        blocks=[block.name for block in planned.plan.blocks],
    )


def _unlocked(
    snapshot: Snapshot,
    judged: Mapping[tuple[str, str], Standing],
    candidates: Sequence[Planned],
    foresight: float,
) -> dict[str, Unlocked]:
    """What every standing block's account released so far.

    Arrivals are the jobs that were ever granted on the account and those that wait for it now.
    """
    arrivals: dict[str, int] = {}
    for planned in candidates:
        for name in planned.accounts:
            arrivals[name] = arrivals.get(name, 0) + 1
    result: dict[str, Unlocked] = {}
    for standing in judged.values():
        account = snapshot.ledger.accounts.get(standing.account_name or "")
        if account is None or standing.refusal is not None or standing.retired is not None:
            continue
        name = account.opened.account
        seen = account.spending.jobs + arrivals.get(name, 0)
        rule = _rule(account, standing.spec.unlocking, seen)
        result[name] = _released(account, rule, snapshot.now, foresight)
    return result


def _released(
    account: Account, rule: unlocking.Unlocking, now: datetime, foresight: float
) -> Unlocked:
    capacity_row = np.array(account.capacity, dtype=np.int64)
    fraction = unlocking.fraction(rule, now.timestamp())
    row = unlocking.unlocked(capacity_row, fraction)
    later = unlocking.fraction(rule, now.timestamp() + foresight)
    soon = unlocking.unlocked(capacity_row, later)
    complete_at = None
    if isinstance(rule, unlocking.ByTime) and fraction < 1:
        complete_at = datetime.fromtimestamp(rule.opened + rule.lifetime, UTC)
    return Unlocked(rule, tuple(row.tolist()), complete_at, tuple(soon.tolist()))


def _rule(account: Account, declared: Unlocking, arrivals: int) -> unlocking.Unlocking:
    if declared.arrivals is not None:
        return unlocking.ByArrivals(fair_shares=declared.arrivals, arrivals=arrivals)
    if declared.lifetime_seconds is not None:
        opened = parse_time(account.time).timestamp()
        return unlocking.ByTime(opened, float(declared.lifetime_seconds), declared.steps)
    return unlocking.Immediate()


class _Table:
    """The round's arrays, and what their tasks and rows mean: each point of a job is a task."""

    def __init__(
        self, snapshot: Snapshot, jobs: Sequence[Planned], unlocked: Mapping[str, Unlocked]
    ) -> None:
        self.snapshot, self.unlocked = snapshot, unlocked
        self.tasks = tasks = [point for job in jobs for point in job.points]
        self._group = [place for place, job in enumerate(jobs) for _ in job.points]
        names = sorted({name for task in tasks for name in task.demand})
        self.accounts = [snapshot.ledger.accounts[name] for name in names]
        self.orders = sorted({Decimal(o) for a in self.accounts for o in a.opened.orders})
        self.row_of = {name: i for i, name in enumerate(names)}
        self.caps: list[tuple[Account, str, str]] = []
        self._cap_rows: dict[tuple[str, str], int] = {}
        for task in tasks:
            self._add_caps(task)

    def _add_caps(self, task: Planned) -> None:
        namespace = task.job.meta.namespace
        for name, epsilon in task.caps.items():
            if (name, namespace) not in self._cap_rows:
                self._cap_rows[name, namespace] = len(self.accounts) + len(self.caps)
                self.caps.append((self.snapshot.ledger.accounts[name], namespace, epsilon))

    def rows_of(self, task: Planned) -> list[int]:
        """Rows that a task asks: its accounts, and the caps of its namespace on them."""
        namespace = task.job.meta.namespace
        own = [self.row_of[name] for name in task.demand]
        return own + [self._cap_rows[name, namespace] for name in task.caps]

    def meaning(self) -> list[Row]:
        """What each row means, in words that outlive the round."""
        own: list[Row] = [(account.opened.account, None) for account in self.accounts]
        return own + [(account.opened.account, namespace) for account, namespace, _ in self.caps]

    def account_of(self, row: int) -> tuple[Account, str | None]:
        """The account of a row, and the namespace whose cap it is, if it is one."""
        if row < len(self.accounts):
            return self.accounts[row], None
        account, namespace, _ = self.caps[row - len(self.accounts)]
        return account, namespace

    def rules(self) -> list[unlocking.Unlocking]:
        """The unlocking rule of each row; a cap is open from the start."""
        own = [self.unlocked[account.opened.account].rule for account in self.accounts]
        return own + [unlocking.Immediate() for _ in self.caps]

    def round(self, *, looks_ahead: bool = False) -> Round:
        """The arrays that policies see; with what unlocks soon if the operator looks ahead."""
        capacity_rows, unlocked_rows, reserved_rows, consumed_rows = [], [], [], []
        soon_rows = []
        for account in self.accounts:
            capacity_rows.append(self._spread(account, account.capacity, ABSENT))
            unlocked = self.unlocked[account.opened.account]
            unlocked_rows.append(self._spread(account, unlocked.amounts, ABSENT))
            soon_rows.append(self._spread(account, unlocked.soon, ABSENT))
            reserved_rows.append(self._spread(account, account.spending.reserved, 0))
            consumed_rows.append(self._spread(account, account.spending.consumed, 0))
        for account, namespace, epsilon in self.caps:
            opened, spent = account.opened, account.of_namespace(namespace)
            limit = capacity(
                Decimal(epsilon), Decimal(opened.delta), opened.orders, opened.conversion
            )
            capacity_rows.append(self._spread(account, limit, ABSENT))
            unlocked_rows.append(capacity_rows[-1])
            soon_rows.append(capacity_rows[-1])
            reserved_rows.append(self._spread(account, spent.reserved, 0))
            consumed_rows.append(self._spread(account, spent.consumed, 0))
        rows = [self.rows_of(task) for task in self.tasks]
        jobs = [task.job for task in self.tasks]
        return Round(
            orders=np.array([float(order) for order in self.orders]),
            demand=self._demands(),
            indptr=np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64),
            indices=np.array([i for row in rows for i in row], dtype=np.int64),
            capacity=np.array(capacity_rows, dtype=np.int64),
            consumed=np.array(consumed_rows, dtype=np.int64),
            reserved=np.array(reserved_rows, dtype=np.int64),
            unlocked=np.array(unlocked_rows, dtype=np.int64),
            arrival=np.array([job.meta.created.timestamp() for job in jobs]),
            weight=np.array([task.weight for task in self.tasks]),
            priority=np.array([_spec_of(job, "priority") for job in jobs], dtype=np.int64),
            fair_shares=np.array([_fair_shares(rule) for rule in self.rules()], dtype=np.int64),
            group=np.array(self._group, dtype=np.int64)
            if len(set(self._group)) < len(self.tasks)
            else None,
            soon=np.array(soon_rows, dtype=np.int64) if looks_ahead else None,
        )

    def _spread(self, account: Account, amounts: Sequence[int], absent: int) -> list[int]:
        """Amounts on an account's orders, laid out on the orders of the round, saturated."""
        at = dict(zip(map(Decimal, account.opened.orders), amounts, strict=True))
        return [min(at.get(order, absent), MAX_UNITS) for order in self.orders]

    def _demands(self) -> Rows:
        """int64[T, A]: what each task asks, and more than there ever is at orders it has not."""
        place_of = {order: place for place, order in enumerate(self.orders)}
        places = {
            account.opened.account: [place_of[Decimal(order)] for order in account.opened.orders]
            for account in self.accounts
        }
        demands = np.full((len(self.tasks), len(self.orders)), MAX_UNITS, dtype=np.int64)
        for row, task in zip(demands, self.tasks, strict=True):
            for name, amounts in task.demand.items():
                row[places[name]] = amounts
        return demands


def _fair_shares(rule: unlocking.Unlocking) -> int:
    """Into how many fair shares the owner splits a block; 0 if the owner says nothing about it."""
    return rule.fair_shares if isinstance(rule, unlocking.ByArrivals) else 0


def _spec_of(job: JobView, field_name: str) -> int:
    return int(getattr(job.spec, field_name))


def _about(number: int) -> str:
    """A number to two digits: one job's grant must not change the statuses of all behind it."""
    if number < 100:
        return str(number)
    step = 10 ** (len(str(number)) - 2)
    return f"about {round(number / step) * step}"


def _in_words(planned: Planned, explanation: Explanation, table: _Table) -> Waiting:
    """An explanation with its numbers, for the job's author."""
    account, namespace = table.account_of(explanation.block)
    # By today's name: the block may have been renamed since its account was opened.
    name = next(b.name for b in planned.plan.blocks if b.account == account.opened.account)
    where = f"block {name}" if namespace is None else f"the cap of {namespace} on block {name}"
    asked, left = format_epsilon(explanation.asked), format_epsilon(max(explanation.left, 0))
    numbers = f"{where} (order {explanation.order:g}): asks {asked}, left {left}"
    when = ""
    if explanation.unlock_at is not None:
        moment = datetime.fromtimestamp(explanation.unlock_at, UTC)
        when = f"; enough is unlocked at {format_time(moment)}"
    elif explanation.arrivals is not None:
        when = f"; enough is unlocked once {explanation.arrivals} more jobs have asked"
    # In tenths: what others get must not change the statuses of all who wait.
    tenths = int((explanation.fits_now or 0.0) * 10)
    smaller = f"; a demand {tenths}0 % as large would fit now" if tenths else ""
    texts = {
        Reason.DEMAND_EXCEEDS_CAPACITY: f"{numbers} even of an unspent budget; ask for a smaller"
        " epsilon, fewer steps or a larger noise multiplier",
        Reason.BLOCK_EXHAUSTED: f"{numbers} for ever, the rest is consumed; ask for less or for"
        " other blocks",
        Reason.WAITING_FOR_REFUND: f"{numbers}; running jobs hold the rest and may return some"
        f"{smaller}",
        Reason.WAITING_FOR_UNLOCK: f"{numbers} of what is unlocked{when}{smaller}",
        Reason.OUTRANKED: f"rank {_about(explanation.rank)} of {_about(explanation.of)} in the"
        f" order of the policy; {numbers} after the jobs before it{smaller}",
    }
    if explanation.held:
        texts[Reason.OUTRANKED] = (
            f"rank {_about(explanation.rank)} of {_about(explanation.of)} in the order of the"
            f" policy; budget is kept for jobs before it that fit once more is unlocked: {numbers}"
            " after them"
        )
    if explanation.kept:
        texts[Reason.WAITING_FOR_UNLOCK] = (
            f"rank {_about(explanation.rank)} of {_about(explanation.of)} in the order of the"
            " policy; budget is kept for it, unless jobs come that are worth more before all of"
            f" its blocks is unlocked{when.replace('; enough is unlocked', '')}"
        )
    return _waiting(planned, explanation.reason, _closest(planned) + texts[explanation.reason])


def _closest(planned: Planned) -> str:
    """Which point of an elastic job is explained."""
    spec = planned.job.spec
    assert spec is not None
    if spec.elastic is None:
        return ""
    blocks = len(planned.plan.blocks)
    return (
        f"closest at epsilon {planned.plan.privacy.epsilon:g} on {blocks}"
        f" {'block' if blocks == 1 else 'blocks'}, utility {planned.utility}: "
    )
