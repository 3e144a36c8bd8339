"""Updates the breakers of a node, and of a model on that node, when an attempt ends. Changes only the account."""

from __future__ import annotations

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.outcomes import AttemptContext, Blame


def count_success(account: NodeAccount, model: str | None, now: float, *, takes_slot: bool) -> None:
    """Counts an attempt that was served. A request without a slot needs no inference, so it shows nothing about the
    models."""
    account.breaker = account.breaker.record_success()
    if takes_slot:
        account.model_breakers.record_success(model, now)


def count_failure(account: NodeAccount, context: AttemptContext, blame: Blame, now: float) -> None:
    """Counts an attempt that was not served for the breaker that ``blame`` names. For the other breaker the outcome
    proves nothing: if this request was its trial, the trial ends without a result."""
    is_models_fault = blame not in (Blame.NOBODY, Blame.NODE)
    if is_models_fault and context.model is not None:
        # Every user of the gateway can read the message in the status. So only a message about a load is kept, because
        # any other message may quote the prompt.
        reply = context.reply
        message = reply.message if reply is not None and blame is Blame.MODEL_LOAD else ""
        node_is_suspect = account.model_breakers.record_failure(
            context.model, blame, message, now, was_loaded=context.was_loaded
        )
        account.breaker = account.breaker.trip(now) if node_is_suspect else account.breaker.cancel_trial()
        return
    if context.takes_slot:
        account.model_breakers.cancel_trial(context.model)
    is_nodes_fault = blame is Blame.NODE
    account.breaker = account.breaker.record_failure(now) if is_nodes_fault else account.breaker.cancel_trial()
