"""How sentences stand in a text: between others, on a line of their own, in brackets, in a list; and how people ask."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """What stands around a sentence.

    Attributes:
        before: up to it; a space before that, where it begins no line.
        after: behind it.
        joined: whether no space parts it from its neighbours.
    """

    before: str = ""
    after: str = ""
    joined: bool = False


INLINE = Form()
"""Between two sentences."""

FACTS = {
    "inline": INLINE,
    "joined": Form(joined=True),
    "line": Form("\n", "\n"),
    "paragraph": Form("\n\n", "\n\n"),
    "tab": Form("\n\t", "\n"),
    "indent": Form("\n    ", "\n"),
    "quote": Form('"', '"'),
    "single quote": Form("'", "'"),
    "curly quote": Form("“", "”"),
    "bracket": Form("(", ")"),
    "square bracket": Form("[", "]"),
    "dash": Form("- "),
    "long dash": Form("—"),
    "item": Form("\n- ", "\n"),
    "starred item": Form("\n* ", "\n"),
    "numbered item": Form("\n1. ", "\n"),
    "mail": Form("\n> ", "\n"),
    "comment": Form("\n# ", "\n"),
    "note": Form("\nNote: ", "\n"),
    "heading": Form("\n\n## News\n", "\n"),
}
"""Of facts, and of sentences that look like facts."""

QUESTIONS = {
    "inline": INLINE,
    "joined": Form(joined=True),
    "space": Form(after=" "),
    "line": Form("\n"),
    "paragraph": Form("\n\n"),
    "turn": Form("\n", "\n"),
    "paragraph turn": Form("\n\n", "\n"),
    "question": Form("\nQuestion: "),
    "question paragraph": Form("\n\nQuestion: "),
    "question, answer": Form("\nQuestion: ", "\nAnswer:"),
    "question, answer, paragraph": Form("\n\nQuestion: ", "\nAnswer:"),
    "question, answer, space": Form("\n\nQuestion: ", "\nAnswer: "),
    "q, a": Form("\nQ: ", "\nA:"),
    "answer": Form("\n", "\nAnswer:"),
    "answer, inline": Form("", " Answer:"),
    "answer, paragraph": Form("\n\n", "\n\nAnswer:"),
    "context": Form("\n</context>\n\nQuestion: "),
    "context, answer": Form("\n</context>\n\nQuestion: ", "\nAnswer:"),
}
"""Of questions; what is written next is the answer."""
