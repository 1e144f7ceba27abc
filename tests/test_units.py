import pytest

from qkit import units
from qkit.errors import QkitError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16GiB", 16 << 30),
        ("500M", 500_000_000),
        ("1.5g", 1_500_000_000),
        ("4096", 4096),
        (" 2 kib ", 2048),
        ("3TB", 3 * 10**12),
        ("0.1g", 100_000_000),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_parse_size(text, expected):
    assert units.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-3G", "1e9", "5 PB", "GiB"])
def test_bad_sizes(text):
    with pytest.raises(QkitError, match="is not a size"):
        units.parse_size(text, "--max-memory")


def test_written_for_people():
    assert [units.size(n) for n in (0, 999, 1500, 2_500_000, 3_100_000_000, 4.2e12)] == [
        "0 B", "999 B", "1.5 kB", "2.5 MB", "3.1 GB", "4.20 TB",
    ]  # fmt: skip
    assert [units.duration(s) for s in (0.2, 42, 125, 7300)] == ["under 1 s", "42 s", "2 min 5 s", "2 h 1 min"]
