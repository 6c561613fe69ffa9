"""What the tasks over made-up clips ask lmms-eval to call."""


def visual(doc):
    return [doc["clip"]]


def word_for_word(doc, results):
    return {"right": float(results[0] == doc["answer"])}


def choices(doc):
    return doc["choices"]


def next_round(
    doc,
    lmms_eval_specific_kwargs=None,
    previous_output=None,
    round_idx=None,
    previous_round_info=None,
):
    """The first question; from the second round on, what lmms-eval asks of a task of rounds."""
    if round_idx is None:
        return doc["question"]
    return [doc["clip"]], doc["next_question"], round_idx == 2, previous_output, None


def both_rounds(doc, results):
    first, second = results[0]
    return {
        "first": float(first == doc["answer"]),
        "second": float(second == doc["next_answer"]),
    }
