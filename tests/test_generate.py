"""Generation: the text is what a plain loop over whole prefixes gives; sampling obeys its limits and its seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmonnx.errors import InputError, RunError, UsageError
from nmonnx.inference.decoder import Decoder
from nmonnx.inference.generate import Generation, Sampling, candidates, generate, pick
from nmonnx.inference.text import encode, load_tokenizer, read_text

CONTINUES = ["llama-genai-fp32", "llama-optimum-fp32", "llama-dynamo-kv-fp32", "llama-dynamo-fp32"]
PROMPT = "Once upon a time"
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(lambda x: np.array(x, np.float32))


class Script:
    """Stands in for a decoder that writes the given tokens one after another."""

    def __init__(self, tokens: list[int], vocab: int, context: int | None, eos: tuple[int, ...]) -> None:
        self.tokens, self.vocab, self.context, self.seen = tokens, vocab, context, 0
        self.sig = SimpleNamespace(config=SimpleNamespace(eos=eos))

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self.seen, self.at = tokens.shape[1], -1
        return self._next(tokens.shape[1])

    def step(self, ids: np.ndarray) -> np.ndarray:
        assert ids.tolist() == [self.tokens[self.at]]
        self.seen += 1
        return self._next(1)

    def _next(self, count: int) -> np.ndarray:
        self.at += 1
        return np.eye(self.vocab, dtype=np.float32)[[self.tokens[self.at]]]


def _script(tokens: list[int], vocab: int = 512, context: int | None = None, eos: tuple[int, ...] = ()) -> Decoder:
    return cast(Decoder, Script(tokens, vocab, context, eos))


@pytest.fixture(scope="module")
def tokenizer(shared: Path):
    return load_tokenizer(shared / "models" / "stories260K")


@pytest.mark.parametrize("name", CONTINUES)
def test_greedy_text_equals_a_naive_loop_over_whole_prefixes(zoo, tokenizer, name):
    decoder = Decoder(zoo(name), threads=1)
    result = generate(decoder, tokenizer, PROMPT, max_new_tokens=12, eos=(), special=False)
    ids = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    for _ in range(12):
        ids.append(int(decoder.score(np.array([ids]))[0, -1].argmax()))
    assert result.prompt_tokens + result.tokens == ids
    assert PROMPT + result.text == tokenizer.decode(ids)
    assert (len(result.tokens), result.steps, result.ended) == (12, 11, False)
    assert result.prefill_seconds > 0 and result.decode_seconds > 0


def test_rates_are_tokens_per_second_of_each_phase_alone():
    result = Generation(prompt_tokens=[1] * 8, prefill_seconds=2.0, decode_seconds=0.5, steps=10)
    assert (result.prefill_rate, result.decode_rate) == (4.0, 20.0)
    assert Generation(prompt_tokens=[1]).decode_rate == 0


@pytest.mark.parametrize("flag, config", [((7,), ()), (None, (9, 7))])
def test_an_end_token_ends_the_text_and_is_not_part_of_it(tokenizer, flag, config):
    result = generate(_script([300, 301, 7, 302], eos=config), tokenizer, PROMPT, eos=flag)
    assert (result.tokens, result.ended, result.steps) == ([300, 301], True, 2)


def test_the_end_token_comes_from_the_files_beside_the_model(zoo):
    assert Decoder(zoo("gemma2-genai-fp32"), threads=1).sig.config.eos == (2, 1)
    assert Decoder(zoo("llama-optimum-fp32"), threads=1).sig.config.eos == (2,)
    assert Decoder(zoo("llama-dynamo-fp32"), threads=1).sig.config.eos == ()


@pytest.mark.parametrize("limit, written", [(0, 0), (1, 1), (3, 3)])
def test_no_more_tokens_are_written_than_asked(tokenizer, limit, written):
    result = generate(_script([300] * 9), tokenizer, PROMPT, max_new_tokens=limit)
    assert (len(result.tokens), result.steps) == (written, max(written - 1, 0))


def test_the_context_ends_the_text(tokenizer):
    prompt = len(encode(tokenizer, PROMPT, special=True))
    result = generate(_script([300] * 9, context=prompt + 2), tokenizer, PROMPT)
    assert len(result.tokens) == 3  # the last one is written but not read


def test_streamed_pieces_join_to_the_text_and_never_split_a_character(tokenizer):
    ids = tokenizer.encode("na\u00efve \u732b!", add_special_tokens=False).ids
    assert any(tokenizer.decode([i]).endswith("\ufffd") for i in ids)
    pieces: list[str] = []
    result = generate(_script([*ids, 2]), tokenizer, PROMPT, eos=(2,), on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert "\u732b" in result.text and not any("\ufffd" in piece for piece in pieces)


def test_sampling_with_a_seed_is_reproducible_and_another_seed_differs(zoo, tokenizer):
    decoder = Decoder(zoo("llama-genai-fp32"), threads=1)

    def text(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        return generate(decoder, tokenizer, PROMPT, 16, sampling, eos=()).tokens

    assert text(3) == text(3)
    assert text(3) != text(4)


@given(LOGITS, st.floats(0.05, 5), st.integers(0, 45), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_candidates_are_the_fewest_most_probable_tokens_that_the_limits_allow(logits, temperature, top_k, top_p):
    found = candidates(logits, Sampling(temperature, top_k, top_p))
    kept = found > 0
    scaled = logits.astype(np.float64) / temperature
    full = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")[: top_k or None]
    full = full / full[order].sum()
    assert found.sum() == pytest.approx(1)
    assert kept.sum() <= (top_k or len(logits))
    assert kept[order[0]]
    assert found[order].tolist() == sorted(found, reverse=True)[: len(order)]
    least = order[np.flatnonzero(kept[order])[-1]]
    assert full[kept].sum() - full[least] < top_p + 1e-9
    if kept.sum() < len(order) and full[order[kept.sum()]] > 1e-9:
        assert full[kept].sum() >= top_p - 1e-9


def test_draws_follow_the_probabilities():
    logits, rng = np.log(np.array([0.5, 0.3, 0.2], np.float32)), np.random.default_rng(0)
    draws = np.bincount([pick(logits, Sampling(temperature=1.0), rng) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(draws, [0.5, 0.3, 0.2], atol=0.03)


def test_the_greedy_choice_takes_the_lowest_id_of_a_tie():
    assert pick(np.array([1, 3, 3, 2], np.float32), Sampling(), np.random.default_rng(0)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_end_the_text_with_an_error(temperature):
    with pytest.raises(RunError, match="NaN"):
        pick(np.array([1, np.nan], np.float32), Sampling(temperature), np.random.default_rng(0))


@pytest.mark.parametrize(
    "wrong", [(-1.0, 0, 1.0), (float("nan"), 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.1), (0.0, 0, 1.0, -5)]
)
def test_sampling_limits_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UsageError):
        Sampling(*wrong)


def test_a_prompt_that_the_model_cannot_read_is_refused(tokenizer):
    with pytest.raises(InputError, match="prompt is empty"):
        generate(_script([1]), tokenizer, "", special=False)
    with pytest.raises(InputError, match="not valid UTF-8"):
        generate(_script([1]), tokenizer, "caf\udce9")  # bytes of another encoding on the command line
    with pytest.raises(InputError, match="tokenizer that belongs to the model"):
        generate(_script([1], vocab=100), tokenizer, PROMPT)


def test_special_marks_are_those_of_the_tokenizer(tokenizer):
    assert generate(_script([300]), tokenizer, PROMPT, 1).prompt_tokens[0] == 1
    assert generate(_script([300]), tokenizer, PROMPT, 1, special=False).prompt_tokens[0] != 1
    plain, marked = encode(tokenizer, PROMPT), encode(tokenizer, PROMPT, special=True)
    assert marked.tolist() == [1, *plain.tolist()]
    assert plain.dtype == np.int64


def test_the_tokenizer_is_found_by_file_by_folder_and_beside_the_model(shared: Path, tmp_path):
    folder = shared / "models" / "stories260K"
    expected = load_tokenizer(folder).encode(PROMPT).ids
    assert load_tokenizer(folder / "tokenizer.json").encode(PROMPT).ids == expected
    assert load_tokenizer(beside=folder / "model.onnx").encode(PROMPT).ids == expected
    with pytest.raises(InputError, match="copy it beside the model"):
        load_tokenizer(beside=tmp_path / "model.onnx")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no tokenizer was given"):
        load_tokenizer()


def test_a_text_file_is_utf_8_and_not_empty(tmp_path):
    file = tmp_path / "text.txt"
    for content, message in ((b"\xff\xfe", "not UTF-8"), (b" \n", "is empty")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_text(file)
    file.write_bytes("\ufeffna\u00efve\n".encode())
    assert read_text(file) == "na\u00efve\n"
    with pytest.raises(InputError, match="is not a file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / ("x" * 300))
