"""Runs lmms-eval itself with the plug-in on made clips; ``.ci/lmms`` starts it.

    python -m support.lmms_eval_checks

Everything is local: clips, documents and the tiny model that ships. What lmms-eval reports is
compared with ``dycoke-jax eval`` and with direct calls of ``LlavaVideo``.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COUNT, FRAMES = 4, 16
TASKS = Path(__file__).parent / "lmms_eval_tasks"
DAILY_OMNI_ANSWERS = "TABT"
"""The tiny model names no letter, but its answers often begin with that of "The"."""
OPTIONS = ["A. red", "B. blue", "C. green", "D. white"]
PROMPTS = {
    "videomme_local": (
        "Select the best answer to the following multiple-choice question based on the video and "
        "the subtitles. Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "Which colour?\nA. red\nB. blue\nC. green\nD. white\n\n"
        "Answer with the option's letter from the given choices directly.",
        16,
    ),
    "mvbench_local": (
        "Question:How many?\nOption:\n(A) 1\n(B) 2\n(C) 3\nOnly give the best option.\n",
        16,
    ),
    "daily_omni_local": (
        "\nYour task is to accurately answer multiple-choice questions based on the given video.\n"
        "Select the single most accurate answer from the given choices.\nQuestion: What is there?\n"
        "Choices: ['A. red', 'B. blue', 'C. green', 'D. white']\nYour answer should be a capital "
        "letter representing your choice: A, B, C, or D. Don't generate any other text.\n",
        10,
    ),
}
"""The texts of the benchmarks' own tasks, and their numbers of new tokens."""


def write_lines(path: Path, documents: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def built_in(task: str) -> Path:
    """The file of a task that comes with lmms-eval."""
    import lmms_eval

    assert lmms_eval.__file__ is not None
    return Path(lmms_eval.__file__).parent / "tasks" / task


def write_tasks(folder: Path, home: Path, files: list[Path], clips: list[Any]) -> None:
    """Writes documents about the clips beside the tasks that use them.

    Tasks of others are included whole; only the place of their documents is another.
    """
    shutil.copytree(TASKS, folder)
    made = []
    for file, clip in zip(files, clips, strict=True):
        for number, question in enumerate(clip.questions):
            following = clip.questions[(number + 1) % len(clip.questions)]
            made.append({"clip": str(file), "question": question.text, "answer": question.answer})
            made[-1] |= {"next_question": following.text, "next_answer": following.answer}
            choices = [question.answer, following.answer]
            right = number % 2
            made[-1] |= {"choices": choices[::-1] if right else choices, "number": right}
    write_lines(folder / "made_clips.jsonl", made)

    local = {
        "videomme": ("videomme/videomme.yaml", "test", home / "videomme/data"),
        "mvbench": (
            "mvbench/mvbench_action_count.yaml",
            "train",
            home / "mvbench_video/perception/videos",
        ),
        "daily_omni": ("", "train", home / "daily_omni/Videos"),
    }
    from dycoke_jax.evaluation.lmms_eval import TASKS as OWN

    for name, (path, split, videos) in local.items():
        source = built_in(path) if path else OWN / "daily_omni/daily_omni.yaml"
        (folder / f"{name}_local.yaml").write_text(
            f"include: {source}\ntask: {name}_local\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{split}: {name}.jsonl}}}}\n"
        )
        for number, file in enumerate(files):
            place = f"{number}/{number}_video.mp4" if name == "daily_omni" else f"{number}.mp4"
            (videos / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, videos / place)
    numbers = [str(number) for number in range(COUNT)]
    write_lines(
        folder / "videomme.jsonl",
        (
            {"videoID": n, "question_id": n, "question": "Which colour?", "options": OPTIONS}
            | {"answer": answer, "duration": "short", "domain": "Knowledge"}
            | {"sub_category": "Geography", "task_type": "Counting Problem"}
            # The tiny model names no letters; two known answers are none, which it gives.
            for n, answer in zip(numbers, ["A", "", "B", ""], strict=True)
        ),
    )
    write_lines(
        folder / "mvbench.jsonl",
        (
            {"video": f"{n}.mp4", "question": "How many?", "candidates": ["1", "2", "3"]}
            | {"answer": "2"}
            for n in numbers
        ),
    )
    write_lines(
        folder / "daily_omni.jsonl",
        (
            {"video_id": n, "Question": "What is there?", "Choice": OPTIONS}
            | {"Answer": answer, "video_duration": length}
            for n, answer, length in zip(
                numbers, DAILY_OMNI_ANSWERS, ["30s", "60s"] * 2, strict=True
            )
        ),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        check(Path(temporary))
    print("passed")


def check(work: Path) -> None:
    home, folder = work / "home", work / "tasks"
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from dycoke_jax import Decoding, DyCoke, FrameSampling, LlavaVideo
    from dycoke_jax.assets import TINY
    from dycoke_jax.evaluation.accuracy import FILE_SIZE
    from dycoke_jax.evaluation.lmms_eval import TASKS as OWN
    from dycoke_jax.tasks.clip_files import write_clip
    from dycoke_jax.tasks.pictures import draw
    from dycoke_jax.tasks.scenes import SceneSettings
    from dycoke_jax.tasks.task import MONITORED, task_clip

    clips = [task_clip("test", MONITORED + n, SceneSettings(FRAMES)) for n in range(COUNT)]
    files = [work / f"{number}.mp4" for number in range(COUNT)]
    for file, clip in zip(files, clips, strict=True):
        write_clip(file, draw(clip.scene, FILE_SIZE))
    write_tasks(folder, home, files, clips)
    own_tasks = TaskManager("WARNING", include_path=str(OWN), include_defaults=False).all_tasks
    assert own_tasks == ["daily_omni"]
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    documented = re.findall(r"^\| [^|]+ \| `(\w+)` \|", page, re.MULTILINE)
    assert len(documented) >= 10
    assert set(documented) <= {*TaskManager("WARNING").all_tasks, *own_tasks}
    made = [json.loads(line) for line in (folder / "made_clips.jsonl").read_text().splitlines()]

    program = str(Path(sys.executable).parent / "dycoke-jax")
    command = [program, "eval", str(work / "eval.json"), "--clips", str(COUNT), "--through-files"]
    subprocess.run([*command, "--compress", "dycoke"], check=True)
    own = json.loads((work / "eval.json").read_text())["settings"]
    llava = LlavaVideo.from_pretrained(TINY)
    names = ["made_clips", "made_clips_rounds", "made_clips_choice"]
    names += ["videomme_local", "mvbench_local", "daily_omni_local"]
    for setting, method, given in (("full", None, ""), ("dycoke", DyCoke(), ",dycoke=True")):
        manager = TaskManager(
            "WARNING", include_path=str(folder), include_defaults=False, model_name="dycoke_jax"
        )
        run = evaluator.simple_evaluate(
            model="dycoke_jax",
            model_args=f"pretrained={TINY},max_frames_num={FRAMES}{given}",
            tasks=names,
            batch_size=4,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
        scores, samples = run["results"], run["samples"]
        print(setting, {name: scores[name] for name in names})
        assert own[setting]["all"]["asked"] == len(made) > 30
        accuracy = own[setting]["all"]["accuracy"]
        assert accuracy > 0.5
        assert math.isclose(scores["made_clips"]["right,none"], accuracy)
        rounds = scores["made_clips_rounds"]
        assert math.isclose(rounds["first,none"], accuracy)
        # Each question of a clip is the second one once.
        assert math.isclose(rounds["second,none"], accuracy)

        # Choices: the smaller mean loss of the answer's tokens, with the space before it.
        likely = llava.score(
            [doc["clip"] for doc in made for _ in range(2)],
            [doc["question"] for doc in made for _ in range(2)],
            [f" {choice}" for doc in made for choice in doc["choices"]],
            compression=method,
            sampling=FrameSampling(FRAMES),
            batch_size=8,
        )
        means = [sum(one.log_likelihoods) / len(one.token_ids) for one in likely]
        chosen = [int(b > a) for a, b in zip(means[::2], means[1::2], strict=True)]
        right = sum(c == doc["number"] for c, doc in zip(chosen, made, strict=True))
        assert right > len(made) / 2
        assert math.isclose(scores["made_clips_choice"]["acc,none"], right / len(made))

        # The prompts of tasks of benchmarks, and what their scorers make of the answers.
        answers = {}
        for name, (text, new) in PROMPTS.items():
            direct = llava.generate(
                files,
                [text] * COUNT,
                compression=method,
                decoding=Decoding(new),
                sampling=FrameSampling(FRAMES),
            )
            answers[name] = [answer.text.strip() for answer in direct]
            entries = sorted(samples[name], key=lambda entry: entry["doc_id"])
            assert [entry["arguments"][0] for entry in entries] == [text] * COUNT
            assert [entry["filtered_resps"][0] for entry in entries] == answers[name]
        assert scores["videomme_local"]["videomme_perception_score,none"] == 50
        assert scores["mvbench_local"]["mvbench_accuracy,none"] == 0
        letters = zip(answers["daily_omni_local"], DAILY_OMNI_ANSWERS, strict=True)
        right = [text[:1].upper() == letter for text, letter in letters]
        omni = scores["daily_omni_local"]
        assert omni["daily_omni_accuracy,none"] == sum(right) / COUNT > 0
        assert omni["daily_omni_accuracy_30s,none"] == sum(right[::2]) / 2
        assert omni["daily_omni_accuracy_60s,none"] == sum(right[1::2]) / 2

    # The command line: what it writes, and how it ends.
    environment = os.environ | {"PYTHONPATH": str(folder)}

    def ends(*arguments: str, tasks: str = "made_clips") -> int:
        command = [sys.executable, "-m", "dycoke_jax.evaluation.lmms_eval", "eval"]
        command += ["--model", "dycoke_jax", "--tasks", tasks, "--include_path", str(folder)]
        command += ["--batch_size", "4", "--output_path", str(work / "out"), "--limit", "4"]
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True
        )
        print(" ".join(arguments), "->", done.returncode, done.stderr.strip()[-200:])
        return done.returncode

    model = f"pretrained={TINY},max_frames_num={FRAMES}"
    assert ends("--model_args", model) == 0
    (written,) = (work / "out").rglob("*_results.json")
    assert "right,none" in json.loads(written.read_text())["results"]["made_clips"]
    assert ends("--model_args", f"{model},device_map=auto") == 1
    files[0].unlink()
    assert ends("--model_args", model) == 1
    assert ends("--model_args", f"{model},failures=empty") == 0


if __name__ == "__main__":
    main()
