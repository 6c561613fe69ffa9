"""What the server counts and measures, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dycoke_jax.engine.requests import TokenCounts

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FILL = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)


class Metrics:
    """The counters and histograms of one server.

    Attributes:
        requests: requests by the HTTP status of their answer.
        tokens: tokens by kind: ``prompt``, ``completion``, ``visual`` (of the clips, before
            compression) and ``merged`` (visual tokens that entered the language model).
        waiting: requests that the engine has not taken yet; the clips of some are being read.
        running: requests that the engine has taken and not answered.
        batch_fill: requests of each batch as a share of the largest batch.
        seconds: time from the arrival of a request to the end of its answer.
        first_seconds: time from the arrival of a request to the first text of its answer.
    """

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        name = "dycoke_jax"
        self.requests = Counter(
            f"{name}_requests", "Requests by HTTP status.", ["status"], registry=own
        )
        self.tokens = Counter(f"{name}_tokens", "Tokens by kind.", ["kind"], registry=own)
        self.waiting = Gauge(
            f"{name}_requests_waiting", "Requests that wait for the engine.", registry=own
        )
        self.running = Gauge(
            f"{name}_requests_running", "Requests in the hands of the engine.", registry=own
        )
        self.batch_fill = Histogram(
            f"{name}_batch_fill",
            "Requests of a batch as a share of the largest batch.",
            buckets=_FILL,
            registry=own,
        )
        self.seconds = Histogram(
            f"{name}_request_seconds",
            "Time of whole answers.",
            buckets=_SECONDS,
            registry=own,
        )
        self.first_seconds = Histogram(
            f"{name}_first_text_seconds",
            "Time to the first text of an answer.",
            buckets=_SECONDS,
            registry=own,
        )

    def count(self, tokens: TokenCounts) -> None:
        """Counts the tokens of an answer."""
        self.tokens.labels("prompt").inc(tokens.prompt)
        self.tokens.labels("completion").inc(tokens.generated)
        self.tokens.labels("visual").inc(tokens.visual)
        self.tokens.labels("merged").inc(tokens.merged)

    def text(self) -> bytes:
        """All of them in the text format of Prometheus."""
        return generate_latest(self._registry)
