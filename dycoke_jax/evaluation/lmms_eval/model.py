"""The class that lmms-eval calls: requests of its tasks to answers of ``LlavaVideo``."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts, unwrap_generation_output
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from dycoke_jax.checkpoint.opening import open_checkpoint
from dycoke_jax.checks import shown
from dycoke_jax.engine.requests import Answer, Failure, Request
from dycoke_jax.evaluation.lmms_eval.arguments import arguments_of
from dycoke_jax.evaluation.lmms_eval.requests import clip_of, decoding_of, question_of
from dycoke_jax.files import read_json_object
from dycoke_jax.llava_video import LlavaVideo

_PAIR = (0.5, True)
_MUST_WRAP_PAIRS = unwrap_generation_output(_PAIR)[0] != _PAIR
"""lmms-eval 0.7.3 makes a text of a pair, unless it stands in place of a text."""


class DycokeJax(lmms):
    """The model ``dycoke_jax`` of lmms-eval, for tasks about videos.

    Requests run together in batches, whatever tasks they are of, and each gets the answer that it
    gets alone. Clips are given by path and read by this package; of damaged ones what can be
    decoded is used, with a warning.

    Prompts, frames and generation settings are those of lmms-eval's ``llava_onevision``, and with
    ``video_fps`` and ``add_time_instruction`` those of its ``llava_vid``.
    """

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        """Loads the model.

        Args:
            arguments: those of ``arguments.Arguments``.

        Raises:
            DycokeError: if an argument is refused, or the checkpoint cannot be loaded.
        """
        super().__init__()
        self.arguments = arguments_of(arguments)
        checkpoint = open_checkpoint(
            self.arguments.pretrained, pool_mode=self.arguments.mm_spatial_pool_mode
        )
        if self.arguments.compression is not None:
            self.arguments.compression.stages.check(
                checkpoint.config, self.arguments.max_frames_num
            )
        self.llava = LlavaVideo.from_checkpoint(checkpoint, mesh=self.arguments.mesh_sizes)
        for note in (*self.llava.notes, *_penalty_notes(checkpoint.folder.path)):
            logger.warning(note)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers questions.

        Args:
            requests: lmms-eval's instances; ``args`` of each are the text of the question, the
                settings of generation, ``doc_to_visual``, and the document's number, task and
                split.

        Returns:
            A ``GenerationResult`` for each, with the numbers of tokens of the prompt, as the
            language model read it after merging, and of the answer.

        Raises:
            DycokeError: see ``Arguments.failures``.
        """
        asked = []
        for number, request in enumerate(requests):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            asked.append(self._request(context, visuals, settings, task, number))
        return [_result(answer) for answer in self._answers(asked)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answers questions of several rounds, where each follows from the answers before it.

        Each round is a conversation of its own, as in the reference models. The requests that go on
        run their next round together.

        Args:
            requests: as for ``generate_until``, with ``doc_to_text`` after ``doc_to_visual``.

        Returns:
            The answers of all rounds of each request, as the task's ``doc_to_text`` keeps them.

        Raises:
            DycokeError: see ``Arguments.failures``.
        """
        rounds: list[list[str]] = [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        asked = {}
        for number, request in enumerate(requests):
            context, settings, doc_to_visual, _, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            asked[number] = self._request(context, visuals, settings, task, number)
        index = 0
        while asked:
            for number, answer in zip(asked, self._answers([*asked.values()]), strict=True):
                rounds[number].append(_text(answer))
            index += 1
            following = {}
            for number in asked:
                _, settings, _, doc_to_text, doc_id, task, split = requests[number].args
                visuals, text, is_over, outputs, infos[number] = doc_to_text(
                    self.task_dict[task][split][doc_id],
                    previous_output=rounds[number],
                    round_idx=index,
                    previous_round_info=infos[number],
                )
                rounds[number] = list(outputs)
                if not is_over:
                    following[number] = self._request(text, visuals, settings, task, number)
            asked = following
        return rounds

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Computes how likely given answers are, by teacher forcing.

        Args:
            requests: lmms-eval's instances; ``args`` of each are the text of the question, the
                answer or a function that makes it of the document, ``doc_to_visual``, and the
                document's number, task and split.

        Returns:
            For each the mean negative log-likelihood of the answer's tokens and of the token that
            ends it, in nats, of which lmms-eval takes the smallest as the choice, and whether
            greedy decoding would give the answer. The reference models also count the newline
            after the end token.

        Raises:
            DycokeError: if a clip or prompt cannot be read.
        """
        clips, questions, answers = [], [], []
        for request in requests:
            context, target, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            clip = clip_of(doc_to_visual(document), task)
            clips.append(clip)
            questions.append(question_of(context, task, has_clip=clip is not None))
            answers.append(target if isinstance(target, str) else target(document))
        likelihoods = self.llava.score(
            clips,
            questions,
            answers,
            compression=self.arguments.compression,
            sampling=self.arguments.sampling,
            prompting=self.arguments.prompting,
            allow_damaged=True,
            batch_size=self.arguments.batch_size,
        )
        pairs = [(-like.total / len(like.token_ids), like.is_greedy) for like in likelihoods]
        return [GenerationResult(pair) for pair in pairs] if _MUST_WRAP_PAIRS else pairs

    def _request(
        self, context: str, visuals: Any, settings: Mapping[str, Any], task: str, number: int
    ) -> Request:
        clip = clip_of(visuals, task)
        return Request(
            question_of(context, task, has_clip=clip is not None),
            clip,
            decoding_of(settings, task, number),
            self.arguments.sampling,
            self.arguments.prompting,
            allow_damaged=True,
        )

    def _answers(self, asked: Sequence[Request]) -> list[Answer | None]:
        """Answers requests, in their order; None in place of an answer that failed."""
        answers: list[Answer | None] = [None] * len(asked)
        run = self.llava.run(
            asked,
            compression=self.arguments.compression,
            batch_size=self.arguments.batch_size,
        )
        with closing(run), tqdm(total=len(asked), desc="Model Responding") as bar:
            for result in run:
                bar.update()
                if isinstance(result, Failure):
                    if self.arguments.failures == "raise":
                        raise result.error
                    logger.error(f"a request gets an empty answer: {result.message}")
                elif result.answer is not None:
                    answers[result.index] = result.answer
                    for note in result.answer.notes:
                        logger.warning(note)
        return answers


def _penalty_notes(folder: Path) -> tuple[str, ...]:
    """A note on a checkpoint whose settings make the reference models penalise repetition."""
    file = folder / "generation_config.json"
    penalty = read_json_object(file).get("repetition_penalty", 1) if file.exists() else 1
    if penalty in (None, 1):
        return ()
    return (
        f"{file} sets a repetition_penalty of {shown(penalty)}, which lmms-eval's own models apply "
        "and dycoke_jax does not; long answers may differ from theirs",
    )


def _text(answer: Answer | None) -> str:
    return "" if answer is None else answer.text.strip()


def _result(answer: Answer | None) -> Any:
    if answer is None:
        return GenerationResult("")
    counts = TokenCounts(input_tokens=answer.tokens.prompt, output_tokens=answer.tokens.generated)
    return GenerationResult(_text(answer), counts)
