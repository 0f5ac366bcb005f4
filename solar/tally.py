"""Counts of what was left out or changed, by reason, each with the place where it first happened."""

REASONS = 50  # that are told apart: a reason may quote what stands in a file


class Tally(dict[str, tuple[int, str]]):
    """What was counted: reason -> (how often, where first)."""

    def add(self, reason: str, place: str = "", count: int = 1) -> None:
        """Count it; what comes first for one reason too many goes under "other reasons"."""
        if reason not in self and len(self) >= REASONS:
            reason = "other reasons"
        before, first = self.get(reason, (0, place))
        self[reason] = before + count, first

    def merge(self, other: "Tally") -> None:
        """Add what was counted behind it."""
        for reason, (count, place) in other.items():
            self.add(reason, place, count)

    @classmethod
    def from_json(cls, raw: dict) -> "Tally":
        """What json.dumps has written. Raises ValueError, TypeError or AttributeError for anything else."""
        tally = cls()
        for reason, (count, place) in raw.items():
            tally.add(str(reason), str(place), int(count))
        return tally

    def total(self) -> int:
        return sum(count for count, _ in self.values())

    def lines(self) -> list[str]:
        """A line for each reason: what, how often, where first."""
        return [f"{reason}: {count:,} (first: {place})" for reason, (count, place) in self.items()]
