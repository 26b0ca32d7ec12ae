"""Atomic writes of single files."""

import pytest

from keras_t5gemma.checkpoints.atomic import atomic_file

pytestmark = pytest.mark.one_backend


def test_the_new_content_replaces_the_old(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("old")
    with atomic_file(path) as staged:
        staged.write_text("new")
        assert path.read_text() == "old" and staged.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_content(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as staged:
        staged.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
