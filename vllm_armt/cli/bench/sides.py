"""The two sides of a comparison: an ARMT, and vLLM's own engine for its base model, checked against each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_armt.cli.bench.engines import Engine, engines, prompt
from vllm_armt.cli.bench.report import describe
from vllm_armt.cli.bench.session import Session, disagreement

if TYPE_CHECKING:
    from vllm_armt.cli.bench.report import Report
    from vllm_armt.cli.bench.shapes import Model

SIDES = ("armt", "base")


@contextmanager
def both(report: Report, model: Model, armt: dict[str, Any], base: dict[str, Any]) -> Iterator[dict[str, Engine]]:
    """Engines by the names of `SIDES`, warmed up; `armt` and `base` are further arguments of `engines.start`.

    Where both must compute the same it is verified: within its first segment an ARMT is its base model.
    A checkpoint's base model runs with other weights and is not compared.
    """
    with engines({"model": model} | armt, {"model": model, "base": True} | base) as started:
        report.engines.append(model.case | dict(zip(SIDES, (engine.setting for engine in started), strict=True)))
        for engine in started:
            warm_up(engine)
        if model.directory is None:
            length = min(model.segment_size, *(engine.setting["max_model_len"] - 1 for engine in started))
            answers = [_next_token(engine, length) for engine in started]
            if (difference := disagreement(answers, model.dtype)) is not None:
                report.problems.append(
                    f"{describe(model.case)}: within the first segment, ARMT and base model differ by "
                    f"{difference:.3g} in a log-probability."
                )
        yield dict(zip(SIDES, started, strict=True))


def warm_up(engine: Engine) -> None:
    """Run a full step of prefill and some decodes, so that kernels are there and buffers have been touched."""
    session = Session(engine)
    longest = engine.setting["max_model_len"] - 4
    # a text that no measurement begins with: its blocks must not be found in the prefix cache
    session.submit(prompt(engine, max(1, min(engine.step_tokens, longest)), seed=-1), 4, check=True)
    session.finish()


def _next_token(engine: Engine, length: int) -> list[float]:
    session = Session(engine)
    request = session.submit(prompt(engine, length, seed=-2), 1, check=True)
    session.finish()
    return request.log_probs
