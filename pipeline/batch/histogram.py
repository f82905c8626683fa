"""Histograms of any number of values in a few hundred counters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_EXACT = 64  # smaller values have a bucket of their own
_PER_OCTAVE = 32  # buckets between a power of two and the next
MAX_VALUE = (1 << 63) - 1


@dataclass(frozen=True)
class Bucket:
    """The values from `low` up to, not with, `high`, and how many of them there were."""

    low: int
    high: int
    count: int


class Histogram:
    """Counts of whole numbers from 0 on, in buckets that are at most 1/32 of their values wide.

    Its size is bounded by the range of the values alone, histograms of the same kind of value add up, and count, sum,
    smallest and largest value are exact.

    Source: the bucket layout of HdrHistogram (http://hdrhistogram.org), with five bits of precision.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.total = 0
        self.low: int | None = None
        self.high: int | None = None

    def add(self, value: int) -> None:
        """Count one value; a negative one counts as 0, one beyond `MAX_VALUE` as that."""
        value = min(max(value, 0), MAX_VALUE)
        index = _index(value)
        self._counts[index] = self._counts.get(index, 0) + 1
        self.count += 1
        self.total += value
        self.low = value if self.low is None else min(self.low, value)
        self.high = value if self.high is None else max(self.high, value)

    def merge(self, other: "Histogram") -> None:
        """Count what another histogram has counted, too."""
        for index, count in other._counts.items():
            self._counts[index] = self._counts.get(index, 0) + count
        self.count += other.count
        self.total += other.total
        if other.low is not None and other.high is not None:
            self.low = other.low if self.low is None else min(self.low, other.low)
            self.high = other.high if self.high is None else max(self.high, other.high)

    @property
    def mean(self) -> float | None:
        """The mean of all values; None of none."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The value that a share of the values is at most, to the width of a bucket; None of none.

        Args:
            share: From 0 to 1; 0.5 is the median.
        """
        if self.low is None or self.high is None:
            return None
        wanted, before = share * self.count, 0
        for bucket in self.buckets():
            if before + bucket.count >= wanted:
                width = bucket.high - 1 - bucket.low  # whole numbers: a bucket of one value has no width
                inside = bucket.low + width * (wanted - before) / bucket.count
                return min(max(inside, self.low), self.high)
            before += bucket.count
        return float(self.high)

    def buckets(self) -> Iterator[Bucket]:
        """The buckets that are not empty, in order; the first begins with the smallest value, the last ends with the
        largest."""
        if self.low is None or self.high is None:
            return
        for index in sorted(self._counts):
            low, high = max(_lower(index), self.low), min(_lower(index + 1), self.high + 1)
            yield Bucket(low, high, self._counts[index])

    def between(self, low: float, high: float) -> float:
        """About how many values are from `low` up to, not with, `high`: those of a bucket count as evenly spread."""
        found = 0.0
        for bucket in self.buckets():
            inside = min(bucket.high, high) - max(bucket.low, low)
            found += bucket.count * max(inside, 0.0) / (bucket.high - bucket.low)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        counts = {str(index): self._counts[index] for index in sorted(self._counts)}
        return {"counts": counts, "total": self.total, "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Histogram":
        """The histogram that `to_dict` wrote.

        Raises:
            ValueError: The values are not those of a histogram.
        """
        made = cls()
        try:
            counts = {int(index): int(count) for index, count in values["counts"].items()}
            made._counts, made.total = counts, int(values["total"])
            made.low, made.high = (None if values[name] is None else int(values[name]) for name in ("low", "high"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a histogram: {error!r}") from error
        if any(index not in range(_index(MAX_VALUE) + 1) or count < 1 for index, count in counts.items()):
            raise ValueError("not a histogram: a bucket that there cannot be")
        made.count = sum(counts.values())
        if (made.low is None or made.high is None) != (not counts):
            raise ValueError("not a histogram: bounds without values")
        return made


def _index(value: int) -> int:
    if value < _EXACT:
        return value
    octave = value.bit_length() - _EXACT.bit_length() + 1
    return _PER_OCTAVE * octave + (value >> octave)


def _lower(index: int) -> int:
    """The smallest value of a bucket."""
    if index < _EXACT:
        return index
    octave = index // _PER_OCTAVE - 1
    return (index % _PER_OCTAVE + _PER_OCTAVE) << octave
