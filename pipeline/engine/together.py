"""How much is computed together, unless told otherwise: what suits a device, known by its kind. Knows no torch."""

_BATCH_SIZES = {"cuda": 256}
_OTHER_BATCH_SIZE = 128
_STEP_TOKENS = {"cuda": 8192}
_OTHER_STEP_TOKENS = 1024


def default_batch_size(kind: str) -> int:
    """At most so many sequences are answered together, by either engine.

    Args:
        kind: Of the device: `"cpu"`, `"cuda"` or `"mps"`, as `torch.device.type` says.
    """
    return _BATCH_SIZES.get(kind, _OTHER_BATCH_SIZE)


def default_step_tokens(kind: str) -> int:
    """At most so many tokens are computed in a step of the packed engine.

    Args:
        kind: Of the device, as for `default_batch_size`.
    """
    return _STEP_TOKENS.get(kind, _OTHER_STEP_TOKENS)
