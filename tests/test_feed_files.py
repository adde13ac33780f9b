"""Feeds from files: arrays are read as they were saved, or refused with what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import toy_decoders

from nmonnx.errors import InputError
from nmonnx.feeds import Signature, make_feeds, read_feeds, signature


@pytest.fixture
def toy(tmp_path: Path) -> Signature:
    path = toy_decoders.split_cache(tmp_path / "toy.onnx", {"ids": "input_ids", "nk": "present_k", "nv": "present_v"})
    return signature(ort.InferenceSession(path), path)


def _savez(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _arrays(sig: Signature) -> dict[str, np.ndarray]:
    return make_feeds(sig, np.ones((1, 2), np.int64), past=3, rng=np.random.default_rng(0))


def test_feeds_are_read_from_archives_and_from_folders(toy, tmp_path):
    arrays = _arrays(toy)
    _savez(tmp_path / "one.npz", arrays)
    (tmp_path / "several").mkdir()
    _savez(tmp_path / "several" / "b.npz", arrays)
    _savez(tmp_path / "several" / "a.npz", arrays)
    (tmp_path / "loose").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "loose" / f"{name}.npy", array)
    expected = {"one.npz": ["one"], "several": ["a", "b"], "loose": ["loose"]}
    for where, names in expected.items():
        feeds = read_feeds(tmp_path / where, toy)
        assert [f.name for f in feeds] == names
        for feed in feeds:
            assert all(np.array_equal(feed.arrays[name], array) for name, array in arrays.items())


def test_integers_of_another_width_are_converted_when_that_loses_nothing(toy, tmp_path):
    arrays = _arrays(toy)
    arrays["input_ids"] = arrays["input_ids"].astype(np.int32)
    _savez(tmp_path / "f.npz", arrays)
    assert read_feeds(tmp_path / "f.npz", toy)[0].arrays["input_ids"].dtype == np.int64


BROKEN = {
    "lacks inputs ['input_ids']": lambda a: a.pop("input_ids"),
    "has arrays ['mask'] that are no inputs": lambda a: a.update(mask=np.ones(2)),
    "'pk' takes float32 [b, 1, p, 4]": lambda a: a.update(pk=np.ones((1, 2, 3, 4), np.float32)),
    "'pv' takes float32": lambda a: a.update(pv=a["pv"].astype(np.float64)),
    "'input_ids' takes int64 [b, t]": lambda a: a.update(input_ids=np.ones(2, np.int64)),
}


@pytest.mark.parametrize("message, spoil", BROKEN.items(), ids=BROKEN.keys())
def test_arrays_that_do_not_fit_the_graph_are_refused(toy, tmp_path, message, spoil):
    arrays = _arrays(toy)
    spoil(arrays)
    _savez(tmp_path / "f.npz", arrays)
    with pytest.raises(InputError) as error:
        read_feeds(tmp_path / "f.npz", toy)
    assert message in str(error.value)


def test_files_that_are_no_arrays_are_refused(toy, tmp_path):
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "objects.npz", input_ids=np.array([{}], object))
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "empty").mkdir()
    for name in ("text.npz", "objects.npz", "single.npy", "empty", "missing.npz"):
        with pytest.raises(InputError, match=name.split(".")[0]):
            read_feeds(tmp_path / name, toy)


def test_a_name_that_no_file_can_have_is_refused(toy, tmp_path):
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        read_feeds(tmp_path / ("x" * 300), toy)


def test_a_damaged_archive_is_named(toy, tmp_path):
    path = tmp_path / "f.npz"
    np.savez_compressed(path, input_ids=np.arange(4096))
    content = bytearray(path.read_bytes())
    content[200:400] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"f\.npz"):
        read_feeds(path, toy)
