"""Input arrays for any LLM graph: what each input is for, arrays from tokens, a validation set, arrays from files."""

from nmonnx.feeds.make import Past, make_feeds
from nmonnx.feeds.read import read_feeds
from nmonnx.feeds.sample import Feed, Samples, plan_feeds, sample_feeds, vocabulary
from nmonnx.feeds.signature import Port, Signature, signature

__all__ = [
    "Feed",
    "Past",
    "Port",
    "Samples",
    "Signature",
    "make_feeds",
    "plan_feeds",
    "read_feeds",
    "sample_feeds",
    "signature",
    "vocabulary",
]
