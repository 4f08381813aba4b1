"""Verification: which guesses to keep, and the one token drawn after them.

This room knows no model, no cache and no tokenizer, and imports only torch. It sees rows of scores,
guessed tokens and noise, for a batch whose rows may have guessed different numbers of tokens, and
it never leaves the device.

One law holds for all of it: the tokens kept, followed by the token drawn, are distributed as plain
sampling from the target's rows. `tests/laws` checks that by enumerating every outcome.

Two ways to verify:

- `verify`: rejection, for guesses whose noise is their own. Rules "token" (`token.py`) and "block"
  (`block.py`).
- `match`: comparison, for a target whose choices are already settled: greedy, or noise shared with
  the draft (`coupled.py`).

Read next: `reference.py`.
"""

from specdec.verify.block import block_acceptance, longest_success
from specdec.verify.coupled import keyed_gumbel, row_keys
from specdec.verify.draw import choose, draw, highest, sample
from specdec.verify.matching import match
from specdec.verify.op import Rule, verify
from specdec.verify.residual import residual_weights
from specdec.verify.token import leading_successes, token_acceptance

__all__ = [
    "Rule",
    "block_acceptance",
    "choose",
    "draw",
    "highest",
    "keyed_gumbel",
    "leading_successes",
    "longest_success",
    "match",
    "residual_weights",
    "row_keys",
    "sample",
    "token_acceptance",
    "verify",
]
