"""Faults that engines are known to have: told as warnings, not as failures. Each needs a link.

When one is mended, take it out: the test then guards against its return.
"""

import json

#: Engine → (where it is reported, the fields that matter, words of the answer).
KNOWN = {
    "vllm": (
        (
            "https://github.com/vllm-project/vllm/pull/44537",
            lambda body: not isinstance(body.get("structured_outputs", {}), dict),
            "object has no attribute",
        ),
        (
            "https://github.com/vllm-project/vllm/issues/2703",
            lambda body: body.get("echo") and body.get("stream") and body.get("n") not in (None, 1),
            "InternalServerError",
        ),
    ),
}


def known(engine, odd, said):
    """The link of a fault that this complaint is known as; None if it is news."""
    try:
        body = json.loads(odd.body)
    except ValueError:
        return None
    for link, asked, words in KNOWN.get(engine, ()):
        if isinstance(body, dict) and words in said and asked(body):
            return link
    return None
