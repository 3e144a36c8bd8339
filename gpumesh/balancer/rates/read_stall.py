"""``ReadStall``: how far a server's running answers stand still while it reads a prompt. Pure."""

from __future__ import annotations

FIRST_GUESS = 0.5
GAIN = 0.5  # how far one answer moves the value, if prompts were read all the time


class ReadStall:
    """The share of its speed that decoding loses while a prompt is read: 1.0 if the answers stand still.

    Servers differ: some read and decode in one batch, others read in small pieces between the steps of decoding. An
    answer during which prompts were read for a share ``f`` of the time takes ``1 / (1 - stall * f)`` times as long as
    it would have."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = FIRST_GUESS

    def __repr__(self) -> str:
        return f"<ReadStall {self.value:.2f}>"

    def clean(self, seconds: float, read_share: float) -> float:
        """The time that the answer would have taken if no prompts had been read. ``read_share``: the share of its time
        in which prompts were read."""
        return seconds * (1.0 - self.value * read_share)

    def learn(self, seconds: float, expected_s: float, read_share: float) -> None:
        """Learns from one answer. ``expected_s``: how long it would have taken if no prompt had been read."""
        if not (0.0 < read_share <= 1.0 and seconds > 0.0 and expected_s > 0.0):  # false for NaN
            return
        sample = min(max((1.0 - expected_s / seconds) / read_share, 0.0), 1.0)
        # ``expected_s`` comes from earlier answers, which were cleaned with this value. Only an answer with a larger
        # share than these answers shows whether the value is too large or too small. So answers with a large share
        # count most, by the square.
        self.value += GAIN * read_share * read_share * (sample - self.value)
