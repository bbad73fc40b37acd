"""Which hops are audited once a session has been signed for under `audit`: secret coins, one for each 512 positions."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from tallystick.session.proving import unproven

if TYPE_CHECKING:
    from tallystick.session.session import Session

AUDIT_EVERY = 512
"""Positions behind one coin: what a cheater gains grows with a session, and so must the chance that it is found."""

_COINS = secrets.SystemRandom()


def to_audit(session: Session, probability: float) -> list[int]:
    """The hops that are recomputed, each once: for every 512 positions that were begun, with this probability, one.

    A hop that is under suspicion always is, instead of what the coins say.
    """
    model, suspicions = session.setting.manifest.model_id, session.setting.suspicions
    suspect = [i for i, hop in enumerate(session.route) if suspicions.is_suspect(model, hop.node, hop.span)]
    if session.sketching.is_on and suspect:
        return [_COINS.choice(suspect)]
    coins = -(-len(session.ids) // AUDIT_EVERY)
    return sorted({draw(session) for _ in range(coins) if _COINS.random() < probability})


def draw(session: Session) -> int:
    """The hop that is audited when a coin has fallen: every other time one whose class that may prove."""
    first = unproven(session)
    return _COINS.choice(first) if first and _COINS.random() < 0.5 else _COINS.randrange(len(session.route))
