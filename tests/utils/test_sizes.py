import pytest

from keras_t5gemma.conversion.convert import convert
from keras_t5gemma.utils.sizes import parse_bytes, parse_shard_size

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize(
    "text, count",
    [
        ("80GB", 80e9),
        ("80 GiB", 80 * 2**30),
        ("1.5TB", 1.5e12),
        ("500MB", 5e8),
        ("60KB", 6e4),
        ("1e3 B", 1000),
        ("1024", 1024),
        (1024, 1024),
        (5e9, 5e9),
    ],
)
def test_bytes_of_a_size(text, count):
    assert parse_bytes(text, "memory") == count


@pytest.mark.parametrize(
    "value", ["80 bananas", "-1GB", "nan", "inf", "1.2.3GB", "5gb", "", 0, True, None]
)
def test_what_is_no_size(value):
    with pytest.raises(ValueError, match="`memory` must be a number of bytes, or .*80"):
        parse_bytes(value, "memory")


def test_a_shard_size_is_in_gb_or_has_a_unit():
    assert (
        parse_shard_size(5) == parse_shard_size("5GB") == parse_shard_size("5") == 5e9
    )
    assert parse_shard_size(1e-4) == parse_shard_size("100KB") == 100_000


def test_a_shard_size_in_bytes_is_refused(tmp_path):
    accepted = "number of GB up to 10,000, or .*'5GB'.*; got 5000000000.0"
    with pytest.raises(ValueError, match=f"`max_shard_size` must be a {accepted}"):
        convert("t5gemma_mini", tmp_path / "out", max_shard_size=5e9)
    with pytest.raises(ValueError, match="`max_shard_size` must be .*'much'"):
        convert("t5gemma_mini", tmp_path / "out", max_shard_size="much")
    assert not (tmp_path / "out").exists()


def test_files_are_split_at_the_shard_size(tmp_path):
    for to, kind in (("keras_t5gemma", "h5"), ("transformers", "safetensors")):
        out = tmp_path / to
        convert("t5gemma_mini", out, to=to, max_shard_size="9MB")
        files = list(out.glob(f"*.{kind}"))
        assert len(files) == 2
        assert max(f.stat().st_size for f in files) < 9.1e6
