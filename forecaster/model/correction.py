"""What the hedge still misses: a linear correction of its mix, learned per stream, target and horizon.

    correction  w' x, x what each expert but the last value said, in the mix's usual errors; recursive least squares
                of what the mix missed, h records later
    share       how far it is believed: odds ~ exp(eta G) / prior, G the discounted squared errors that it saved

A mean of experts with weights above zero cannot say "less of this one than nothing", or "all
of them say too little"; this can. Begun at zero, bounded, and believed no more than it has earned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forecaster.model import hedge
from forecaster.model.layout import CORRECTION_VARIANCE_MAX
from forecaster.model.normalise import TINY
from forecaster.model.readout import gain
from forecaster.model.runtime import Fields, Tensor, tf
from forecaster.model.spec import NetworkSpec

# One record ahead; longer ahead less is forgotten, since successive errors share most of their changes.
FORGETTING = 0.9995
# In the mix's usual errors: what an expert said beside the last value, and the correction itself.
SAID_MAX, CORRECTION_MAX = 20.0, 4.0
# The mix is believed until the correction has shown more: five times as much.
MIX_PRIOR = 5.0
_LOGIT_MAX = 50.0


def learn(
    spec: NetworkSpec,
    state: Fields,
    usual: Tensor,
    settled: Tensor,
    change: Tensor,
    said: Tensor,
    mixed: Tensor,
    corrected: Tensor,
) -> Fields:
    """Take in what the settled forecasts missed.

    Args:
        spec: the network's.
        state: the streams' fields.
        usual: [batch, D, H], the mix's usual error in the target's units, this record's included.
        settled: bool[batch, D, H].
        change: [batch, D, H], what happened.
        said: [batch, D, H, E], what each expert said then.
        mixed: [batch, D, H], what the hedge said then.
        corrected: [batch, D, H], what that was corrected to.

    Returns:
        The fields that changed.
    """
    unit = tf.maximum(usual, TINY)
    limit = np.sqrt(hedge.LOSS_MAX)
    features = tf.clip_by_value(said[..., 1:] / unit[..., None], -SAID_MAX, SAID_MAX)
    miss = tf.clip_by_value((change - mixed) / unit, -limit, limit)
    left = tf.clip_by_value((change - corrected) / unit, -limit, limit)
    weights, old = state["correction/weights"], state["correction/covariance"]
    forgotten = (1.0 - FORGETTING) / np.array(spec.horizons, np.float32)[:, None]
    found, covariance = gain(old, features, 1.0 - forgotten, CORRECTION_VARIANCE_MAX / _steps(spec)[:, None])
    moved = weights + found * (miss - tf.reduce_sum(weights * features, axis=-1))[..., None]
    # A row that came in damaged begins anew.
    moved = tf.where(tf.math.is_finite(moved), moved, 0.0)
    memory = hedge.memory(spec, hedge.SQUARES_MEMORY)[:, 0]
    saved = memory * state["correction/saved"] + tf.square(miss) - tf.square(left)
    return {
        "correction/weights": tf.where(settled[..., None], moved, weights),
        "correction/covariance": tf.where(settled[..., None, None], covariance, old),
        "correction/saved": tf.where(settled, saved, state["correction/saved"]),
    }


def correct(spec: NetworkSpec, fields: Fields, said: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Correct the hedge's forecast.

    Args:
        spec: the network's.
        fields: with what `learn` changed.
        said: [batch, D, H, E], what each expert says, changes in the target's units.
        mixed: [batch, D, H], what the hedge makes of it.

    Returns:
        The forecast and the correction taken in full, both [batch, D, H].
    """
    bound = CORRECTION_MAX * fields["hedge/usual"]
    by = tf.reduce_sum(fields["correction/weights"] * said[..., 1:], axis=-1)
    by = tf.maximum(tf.minimum(by, bound), -bound)
    earned = hedge.SQUARES_RATE * _steps(spec) ** -hedge.RATE_POWER * fields["correction/saved"]
    share = tf.sigmoid(tf.clip_by_value(earned - np.log(MIX_PRIOR), -_LOGIT_MAX, _LOGIT_MAX))
    return mixed + share * by, mixed + by


def _steps(spec: NetworkSpec) -> NDArray[np.float32]:
    return np.array(spec.horizons, np.float32)
