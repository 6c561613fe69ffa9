"""The process in which chat templates are rendered: ``inputs.template_rendering`` starts it."""

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from dycoke_jax.inputs.child_process import Message, Tell, answer_requests

MEGABYTES = 512
"""Memory in millions of bytes that rendering may take."""


def _answer(request: Message, _: Tell) -> Message:
    try:
        rendered: Any = render_jinja_template(
            [request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["tokens"],
        )
        text = rendered[0][0]
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # A template is a program: it may raise anything.
        return {"error": next(iter(str(error).strip().splitlines()), type(error).__name__)}
    if len(text) > request["most"]:
        return {"error": f"it writes {len(text)} characters"}
    return {"text": text}


if __name__ == "__main__":
    answer_requests(_answer, MEGABYTES)
