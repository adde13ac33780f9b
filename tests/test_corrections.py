"""The file of corrections: what was saved is loaded, anything else is refused with a sentence."""

from __future__ import annotations

import numpy as np
import pytest

from nmonnx.errors import InputError
from nmonnx.records.corrections import Correction, Corrections


def test_saved_corrections_load_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    whole = Correction(
        *(rng.normal(size=s).astype(np.float32) for s in (8, (8, 4), 4, 4)),
        low=(rng.normal(size=(8, 2)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)),
    )
    made = Corrections({"/a b/c": whole, "d": Correction()}, "sha", "{}", "a text", {"e": "held-out loss rose"})
    loaded = Corrections.load(made.save(tmp_path / "fit.npz"))
    assert (loaded.source, loaded.recipe, loaded.protocol) == ("sha", "{}", "a text")
    assert loaded.refused == {"e": "held-out loss rose"}
    assert loaded.sites["d"].arrays() == {}
    for name, values in whole.arrays().items():
        np.testing.assert_array_equal(loaded.sites["/a b/c"].arrays()[name], values)


@pytest.mark.parametrize("content", [None, b"", b"no archive", "other"])
def test_what_is_no_file_of_corrections_is_refused(tmp_path, content):
    path = tmp_path / "fit.npz"
    if content == "other":
        np.savez(path, x=np.zeros(3))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="nmonnx fit"):
        Corrections.load(path)
