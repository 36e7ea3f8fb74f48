"""The two rules by which vLLM goes on when a waiting request gets no tokens in a step.

Where the hook for the length of a chunk gives none, admission ends, in 0.31 to 0.33. Where encoders or drafts leave a
request without tokens, 0.33 skips it and looks at the next one (vllm/v1/core/sched/scheduler.py:1394), and that may
spread. Ours has to be fair under both.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from vllm.v1.core.sched import scheduler
from vllm.v1.core.sched.scheduler import Scheduler

ASKED = """\
                            num_external_computed_tokens,
                        )
                        if num_new_tokens == 0:
"""
"""Where vLLM's `schedule` has asked for a chunk of a waiting request; as it stands in a class."""

ENDS = f"{ASKED}                            break\n"
SKIPS = f"{ASKED}                            skip_request(request_queue)\n                            continue\n"


@contextmanager
def requests_without_tokens_are_skipped() -> Iterator[None]:
    """Put vLLM's scheduling under the other rule.

    Raises:
        AssertionError: vLLM's `schedule` has not the one place that this changes.
    """
    with patch.object(Scheduler, "schedule", _skipping_schedule()):
        yield


@cache
def _skipping_schedule() -> Any:
    source = inspect.getsource(Scheduler.schedule)
    assert source.count(ENDS) == 1, "vLLM's rule of admission has changed"
    namespace = dict(vars(scheduler))
    exec(textwrap.dedent(source.replace(ENDS, SKIPS)), namespace)
    return namespace["schedule"]
