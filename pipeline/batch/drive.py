"""Driving a job that holds its output's lease: what is there already, what is answered now, and the end."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.batch.execute import RunCounts, execute
from pipeline.batch.lease import Lease
from pipeline.batch.overwrite import overwrite
from pipeline.batch.plan import PreparedJob
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.receipts import Packer, Receipt
from pipeline.batch.retry import RetryPlan, open_round, put_in_place, read_plan, round_output
from pipeline.batch.run_record import RunRecorder

Execute = Callable[..., RunCounts]
"""Answers the shards that are not done: `execute.execute`, or what takes its place."""


def drive(
    job: PreparedJob,
    lease: Lease,
    progress: Progress,
    phases: Phases,
    recorder: RunRecorder,
    *,
    execute: Execute = execute,
) -> tuple[dict[str, Any], RunCounts | None]:
    """Answer what is not answered yet, and finish the job.

    Args:
        job: The job.
        lease: The lease on its output; it is looked at with every receipt, and again before anything final.
        progress: Shows how far it is.
        phases: A timer for the phases.
        recorder: Takes down what this run does.
        execute: How shards are answered: on Ray, unless told otherwise.

    Returns:
        The manifest, and what this run answered; None when there was nothing to do.

    Raises:
        FingerprintError: The output belongs to another job.
        OutputError: The output cannot be written, or is damaged.
        LeaseLostError: Another driver has taken over.
        JobFailedError: Workers failed; what is committed stays.
    """
    output, config = job.output, job.config
    with phases.phase("plan"):
        if config.overwrite:
            overwrite(output, lease.confirm, keep=[path for shard in job.plan.shards for path in shard.paths])
        is_resumed = output.is_taken()
        output.begin()
        plan = _open_round(job, lease)
        is_complete = output.is_complete()  # another driver may have finished it while this one waited
        if is_complete and not config.retry_errors:
            return output.finish(), None
        done = output.committed()
        if plan is None and config.retry_errors:
            plan = open_round(output.storage, done.values())
        if is_complete and plan is None:
            return output.finish(), None
    packer = Packer(output.storage)

    def on_receipt(receipt: Receipt) -> None:
        lease.check()
        done[receipt.shard] = receipt
        if plan is None:
            packer.add(receipt)

    counts = execute(job, dict(done), progress, phases, on_receipt, recorder=recorder, is_resumed=is_resumed)
    if plan is not None:
        again = _answer_again(job, plan, done, lease, progress, phases, recorder, execute)
        counts = RunCounts(counts.rows + again.rows, counts.completion_tokens + again.completion_tokens)
    with phases.phase("commit"):
        lease.confirm()
        return output.finish(done), counts


def _open_round(job: PreparedJob, lease: Lease) -> RetryPlan | None:
    """The round that an earlier driver left open; its new parts are put in place if they are all there."""
    output = job.output
    plan = read_plan(output.storage)
    if plan is None:
        return None
    if output.sealed() is not None:  # it was finished, but for the sweeping
        output.finish()
        return None
    if set(plan.shards) <= round_output(output, plan).committed().keys():
        put_in_place(output, plan, lease.confirm)
    return plan


def _answer_again(
    job: PreparedJob,
    plan: RetryPlan,
    done: dict[int, Receipt],
    lease: Lease,
    progress: Progress,
    phases: Phases,
    recorder: RunRecorder,
    execute: Execute,
) -> RunCounts:
    mending = replace(job, output=round_output(job.output, plan))
    mended = mending.output.committed()
    others = {shard: receipt for shard, receipt in done.items() if shard not in plan.shards}
    rows, tokens = 0, 0

    def on_receipt(receipt: Receipt) -> None:
        nonlocal rows, tokens
        lease.check()
        rows += done[receipt.shard].errors
        tokens += receipt.completion_tokens - done[receipt.shard].completion_tokens

    execute(mending, {**others, **mended}, progress, phases, on_receipt, recorder=recorder, is_resumed=True)
    with phases.phase("commit"):
        done.update(put_in_place(job.output, plan, lease.confirm))
    return RunCounts(rows, tokens)
