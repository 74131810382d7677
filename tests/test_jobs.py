"""Commands that survive: sample.py and eval.py after Ctrl-C, kills and damage, with other settings, with large inputs.

An interruption is a KeyboardInterrupt at a chosen chunk, in this process; fault_injection/kill_jobs.py kills processes
at random instants.
"""

# ruff: noqa: F811  (fixtures are imported, and named again as arguments)

import io
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest
from test_commands import KNOWN, MIA, ROOT, TOM, call, knowing_model_dir, read_rows, write_lines  # noqa: F401

import sample as sample_command
from minidpost.data import datasets
from minidpost.errors import UserError
from minidpost.models.weights import load_model, load_template
from minidpost.sampling import sampler
from minidpost.sampling.generate import Sample
from minidpost.sampling.sampler import Request, Row
from minidpost.selftraining.comparison import differences
from minidpost.selftraining.evaluation import paired_difference
from minidpost.selftraining.job import Job
from minidpost.selftraining.run_directory import Chunks
from minidpost.text.tokenizer import load_tokenizer

GOES_ON = "interrupted; the same command continues from here"
OWN = {"id": "a7", "answer": [1, None], "input_answer": "½", "index": {"page": 3}}


class Interrupted:
    """A context in which a command is interrupted where it would save a chunk after `n_chunks`."""

    def __init__(self, n_chunks: int):
        self.n_left = n_chunks
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        commit = Chunks.commit

        def counted(chunks, chunk_index, records):
            if self.n_left == 0:
                raise KeyboardInterrupt
            self.n_left -= 1
            commit(chunks, chunk_index, records)

        self.patch.setattr(Chunks, "commit", counted)

    def __exit__(self, *error):
        self.patch.undo()


@pytest.fixture
def sampling(tiny_model_dir, tmp_path) -> list:
    """A command of 5 questions and 15 rows, in two blocks and five chunks, but for its --output."""
    write_lines(tmp_path / "q.jsonl", *({"question": f"Tom has {n} apples. How many?", "id": n} for n in range(5)))
    flags = ["--samples", 3, "--temperature", 3, "--max-new-tokens", 5, "--chunk", 4, "--slots", 2]
    return ["sample.py", "--input", "q.jsonl", "--checkpoint", tiny_model_dir, *flags]


@pytest.fixture
def whole(call, sampling) -> bytes:
    """What the command writes that nothing disturbs."""
    assert call(*sampling, "--output", "whole.jsonl").status == 0
    return Path("whole.jsonl").read_bytes()


# -- sample.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_chunks", [0, 1, 3])
def test_sampling_goes_on_where_it_was_interrupted(call, sampling, whole, n_chunks):
    with Interrupted(n_chunks):
        outcome = call(*sampling, "--output", "rows.jsonl")
    assert (outcome.status, outcome.complaints) == (130, [f"sample.py: {GOES_ON}"])
    assert not Path("rows.jsonl").exists()
    assert len(list(Path("rows.jsonl.progress").glob("*.jsonl"))) == n_chunks
    outcome = call(*sampling, "--output", "rows.jsonl")
    assert (outcome.status, outcome.complaints) == (0, [])
    assert Path("rows.jsonl").read_bytes() == whole
    assert {path.name for path in Path().iterdir()} == {"q.jsonl", "rows.jsonl", "whole.jsonl"}


def test_a_job_keeps_its_size_of_chunks(call, sampling, whole):
    """Without --chunk, whose default depends on the model, on slots and on how many GPUs there are."""
    with Interrupted(3):
        call(*sampling, "--output", "rows.jsonl")
    place = sampling.index("--chunk")
    outcome = call(*sampling[:place], *sampling[place + 2 :], "--output", "rows.jsonl")
    assert (outcome.status, outcome.complaints) == (0, [])
    assert Path("rows.jsonl").read_bytes() == whole


def test_the_size_of_chunks_of_a_job_that_is_dropped_is_dropped_too(call, sampling, monkeypatch):
    monkeypatch.setattr(sampler, "CHUNK", 10)
    with Interrupted(1):
        call(*sampling, "--output", "rows.jsonl")
    place = sampling.index("--chunk")
    with Interrupted(1):
        call(*sampling[:place], *sampling[place + 2 :], "--seed", 9, "--output", "rows.jsonl", "--overwrite")
    (chunk,) = Path("rows.jsonl.progress").glob("*.jsonl")
    assert chunk.read_bytes().count(b"\n") == 10  # where the first job had four


@pytest.mark.parametrize("command", ["sample.py", "eval.py"])
def test_chunks_of_a_large_model_are_small(call, tiny_model_dir, monkeypatch, command):
    """On a CPU it has eight rows a slot; --chunk counts more, and so do the chunks that a job was begun with."""
    write_lines(Path("q.jsonl"), *({"question": f"How many is {n}?", "answer": "7"} for n in range(90)))
    questions = ["--input", "q.jsonl"] if command == "sample.py" else ["--tasks", "q.jsonl", "--calculator", "on"]
    flags = [*questions, "--checkpoint", tiny_model_dir, "--slots", 2, "--max-new-tokens", 2]

    def chunks(output: str, *more) -> list[int]:
        """The rows of the chunks that are there when the command has been interrupted after one of its own."""
        with Interrupted(1):
            assert call(command, *flags, *more, "--output", output).status == 130
        return [path.read_bytes().count(b"\n") for path in sorted(Path(f"{output}.progress").glob("*.jsonl"))]

    monkeypatch.setattr(sampler, "CHUNK", 40)
    assert chunks("small") == [40]
    monkeypatch.setattr(sampler, "MIN_PARAMETERS_FOR_SMALL_CHUNKS", 1)
    assert chunks("large") == [16]
    assert chunks("small") == [40, 40]
    assert chunks("many-slots", "--slots", 6) == [40]
    if command == "sample.py":
        assert chunks("given", "--chunk", 5) == [5]


def test_only_missing_chunks_are_sampled(call, sampling, whole, monkeypatch):
    with Interrupted(3):
        call(*sampling, "--output", "rows.jsonl")
    committed, commit = [], Chunks.commit

    def noting(chunks, chunk_index, records):
        committed.append((chunk_index, len(records)))
        commit(chunks, chunk_index, records)

    monkeypatch.setattr(Chunks, "commit", noting)
    call(*sampling, "--output", "rows.jsonl")
    assert committed == [(3, 3)]


def test_blocks_of_questions_make_one_file_in_order(call, sampling, whole, monkeypatch):
    """In memory are 2 questions at a time, in chunks of 4 and 2 rows, which a stop falls between."""
    source = (ROOT / "sample.py").read_text(encoding="utf-8").replace("BLOCK = 16", "BLOCK = 2")
    command = Path("sample.py")
    command.write_text(source)
    with Interrupted(3):
        assert call(command.absolute(), *sampling[1:], "--output", "rows.jsonl").status == 130
    assert call(command.absolute(), *sampling[1:], "--output", "rows.jsonl").status == 0
    rows = read_rows("rows.jsonl")
    assert rows == [json.loads(line) for line in whole.splitlines()]
    assert [(row["index"], row["sample"], row["id"]) for row in rows] == [(i, k, i) for i in range(5) for k in range(3)]


@pytest.mark.parametrize("damage", [b"", b'{"index": 0}\n', b'{"index": 0, "sam'])
def test_a_damaged_chunk_is_sampled_again(call, sampling, whole, damage):
    with Interrupted(3):
        call(*sampling, "--output", "rows.jsonl")
    chunk = sorted(Path("rows.jsonl.progress").glob("*.jsonl"))[1]
    chunk.write_bytes(damage)
    (chunk.parent / ".half.jsonl.77.unfinished").write_bytes(b'{"index": 0, "sam')
    Path(".rows.jsonl.unfinished").write_bytes(b'{"index": 0, "sam')
    with pytest.warns(UserWarning, match=f"{chunk.name} was changed since it was written; its part is done again"):
        assert call(*sampling, "--output", "rows.jsonl").status == 0
    assert Path("rows.jsonl").read_bytes() == whole
    assert {path.name for path in Path().iterdir()} == {"q.jsonl", "rows.jsonl", "whole.jsonl"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["--seed", 7], "seed = 42, this command has 7"),
        (["--samples", 2], "samples = 3, this command has 2"),
        (["--temperature", 2], "temperature = 3.0, this command has 2.0"),
        (["--chunk", 5], "chunk = 4, this command has 5"),
        (["--no-calculator"], "no_calculator = False, this command has True"),
        (["--dtype", "bf16"], "dtype = torch.float32, this command has torch.bfloat16"),
        (["--input", "other.jsonl"], "questions = "),
        (["--checkpoint", "OTHER"], "weights = "),
    ],
)
def test_other_settings_are_refused_by_name(call, sampling, knowing_model_dir, changes, complaint):
    with Interrupted(2):
        call(*sampling, "--output", "rows.jsonl")
    write_lines("other.jsonl", *({"question": f"Tom has {n} apples. How many?"} for n in range(5)))
    changes = [knowing_model_dir if change == "OTHER" else change for change in changes]
    before = {path: path.read_bytes() for path in Path("rows.jsonl.progress").iterdir()}
    outcome = call(*sampling, *changes, "--output", "rows.jsonl")
    assert outcome.status == 2
    (line,) = outcome.complaints
    assert line.startswith(f"sample.py: rows.jsonl.progress was begun with {complaint}")
    assert line.endswith("; --overwrite begins anew")
    assert {path: path.read_bytes() for path in Path("rows.jsonl.progress").iterdir()} == before
    assert call(*sampling, *changes, "--output", "rows.jsonl", "--overwrite").status == 0
    assert call(*sampling, *changes, "--output", "undisturbed.jsonl").status == 0
    assert Path("rows.jsonl").read_bytes() == Path("undisturbed.jsonl").read_bytes()


def test_fewer_slots_may_go_on_with_a_warning(call, sampling):
    with Interrupted(2):
        call(*sampling, "--output", "rows.jsonl")
    with pytest.warns(UserWarning, match="slots = 2, this command has 1: rounding may differ"):
        assert call(*sampling, "--slots", 1, "--output", "rows.jsonl").status == 0
    assert len(read_rows("rows.jsonl")) == 15


def test_what_is_there_is_replaced_only_when_asked_and_whole(call, sampling, whole):
    write_lines("rows.jsonl", "old")
    outcome = call(*sampling, "--output", "rows.jsonl")
    message = "sample.py: --output rows.jsonl: exists already; --overwrite replaces it, or choose another name"
    assert (outcome.status, outcome.complaints) == (2, [message])
    with Interrupted(2):
        assert call(*sampling, "--output", "rows.jsonl", "--overwrite").status == 130
    assert Path("rows.jsonl").read_text() == "old\n"
    outcome = call(*sampling, "--output", "rows.jsonl")
    assert outcome.complaints == ["sample.py: rows.jsonl: exists already; --overwrite replaces it"]
    assert len(list(Path("rows.jsonl.progress").glob("*.jsonl"))) == 2
    assert call(*sampling, "--output", "rows.jsonl", "--overwrite").status == 0
    assert Path("rows.jsonl").read_bytes() == whole
    assert not Path("rows.jsonl.progress").exists()


def test_a_kill_after_the_output_has_its_name(call, sampling, whole, monkeypatch):
    def killed(job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Job, "remove", killed)
        assert call(*sampling, "--output", "rows.jsonl").status == 130
    assert Path("rows.jsonl").read_bytes() == whole
    assert call(*sampling, "--seed", 7, "--output", "rows.jsonl").status == 2
    outcome = call(*sampling, "--output", "rows.jsonl")
    assert (outcome.status, outcome.out) == (0, "15 completions of 5 questions: rows.jsonl\n")
    assert Path("rows.jsonl").read_bytes() == whole
    assert not Path("rows.jsonl.progress").exists()
    Path("rows.jsonl").write_text("mine\n")
    assert call(*sampling, "--output", "rows.jsonl").status == 2


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 1, "settings": 3}', '{"format": 1, "settings": {}}'])
def test_a_broken_description_of_a_job_is_one_line(call, sampling, content):
    with Interrupted(2):
        call(*sampling, "--output", "rows.jsonl")
    Path("rows.jsonl.progress/job.json").write_text(content)
    outcome = call(*sampling, "--output", "rows.jsonl")
    assert outcome.status == 2
    (line,) = outcome.complaints
    assert "rows.jsonl.progress" in line
    assert "--overwrite begins anew" in line
    assert call(*sampling, "--output", "rows.jsonl", "--overwrite").status == 0


def test_a_directory_that_is_no_progress_is_left_alone(call, sampling):
    Path("rows.jsonl.progress").mkdir()
    write_lines("rows.jsonl.progress/notes.txt", "mine")
    for flags in ([], ["--overwrite"]):
        outcome = call(*sampling, "--output", "rows.jsonl", *flags)
        assert outcome.status == 2
        assert "rows.jsonl.progress exists and is no job's progress" in outcome.complaints[0]
    assert [path.name for path in Path("rows.jsonl.progress").iterdir()] == ["notes.txt"]


def test_a_second_process_on_an_output_is_refused(call, sampling):
    Path("rows.jsonl.progress").mkdir()  # not by a command in this process, which would hold the lock itself
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    arguments = [sys.executable, "-c", hold, "rows.jsonl.progress/.lock"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        outcome = call(*sampling, "--output", "rows.jsonl", "--overwrite")
        other.stdin.close()
    line = "sample.py: rows.jsonl.progress: another process is at work here; wait for it, or choose another --output"
    assert (outcome.status, outcome.complaints) == (2, [line])
    assert call(*sampling, "--output", "rows.jsonl").status == 0


def test_a_users_own_fields_are_kept(call, knowing_model_dir):
    write_lines("q.jsonl", {"question": TOM, **OWN}, {"question": f" {MIA}", "completion": 1.5})
    call("sample.py", "--input", "q.jsonl", "--checkpoint", knowing_model_dir, "--output", "rows.jsonl")
    tom, mia = read_rows("rows.jsonl")
    assert (tom["index"], tom["answer"], tom["completion"], tom["id"]) == (0, "7", KNOWN[TOM], "a7")
    assert (tom["input_answer"], tom["input_input_answer"], tom["input_index"]) == ([1, None], "½", {"page": 3})
    assert (mia["question"], mia["input_completion"], mia["completion"]) == (MIA, 1.5, KNOWN[MIA])
    call("sample.py", "--input", "rows.jsonl", "--checkpoint", knowing_model_dir, "--output", "again.jsonl")
    assert [row["input_token_ids"] for row in read_rows("again.jsonl")] == [tom["token_ids"], mia["token_ids"]]


def test_questions_that_change_while_they_are_answered_are_noticed(tmp_path):
    path = write_lines(tmp_path / "q.txt", TOM, MIA)
    questions = datasets.open_questions(str(path))
    questions.check_unchanged()
    write_lines(path, TOM, MIA, TOM)
    with pytest.raises(UserError, match=r"q\.txt was changed while its questions were answered"):
        questions.check_unchanged()


def test_what_can_be_read_once_is_read_often(tmp_path):
    """A pipe with a file's name, as `--input <(…)` gives one."""
    pipe = tmp_path / "q.jsonl"
    subprocess.run(["mkfifo", pipe], check=True)
    with subprocess.Popen(["sh", "-c", f'printf \'{{"question": "How?"}}\\n\' > "{pipe}"']):
        questions = datasets.open_questions(str(pipe))
    assert [list(questions.rows()) for _ in range(2)] == [[{"question": "How?"}]] * 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_questions(tiny_model_dir, tmp_path):
    """A question's row has 12,000 characters: 7,000 more of them are 84 MB where they are held together."""
    note = "x" * 12_000
    program = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for n in (1_000, 8_000):
        with open(tmp_path / f"{n}.jsonl", "w") as stream:
            stream.writelines(json.dumps({"question": f"Tom has {i}?", "note": note}) + "\n" for i in range(n))
        flags = ["--checkpoint", tiny_model_dir, "--max-new-tokens", 1, "--chunk", 64, "--output", f"{n}-rows.jsonl"]
        command = [sys.executable, "-c", program, ROOT / "sample.py", "--input", f"{n}.jsonl", *map(str, flags)]
        outcome = subprocess.run(
            command, cwd=tmp_path, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert outcome.returncode == 0, outcome.stderr
        peaks.append(int(outcome.stdout.split()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 40e6


# -- eval.py ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluating(tiny_model_dir, monkeypatch) -> list:
    """A command of four sets, each greedy and sampled: 4 and 8 rows, in chunks of 3; but for its --output."""
    monkeypatch.setattr(sampler, "CHUNK", 3)
    flags = ["--limit", 4, "--max-new-tokens", 5, "--calculator", "on", "--pass-at", "1,2", "--maj-at", 2, "--slots", 2]
    return ["eval.py", "--checkpoint", tiny_model_dir, *flags]


def test_evaluation_goes_on_where_it_was_interrupted(call, evaluating, monkeypatch):
    shown = call(*evaluating, "--output", "whole.json", "--save-completions", "whole.jsonl").out
    assert call(*evaluating).out == shown  # what is saved changes nothing
    outputs = ["--output", "a.json", "--save-completions", "a.jsonl"]
    for n_chunks in (0, 4, 6):
        with Interrupted(n_chunks):
            outcome = call(*evaluating, *outputs)
        assert (outcome.status, outcome.complaints) == (130, [f"eval.py: {GOES_ON}"])
    assert len(list(Path("a.json.progress").glob("*.jsonl"))) == 10
    outcome = call(*evaluating, "--seed", 1, *outputs)
    assert outcome.complaints == [
        "eval.py: a.json.progress was begun with seed = 42, this command has 1; --overwrite begins anew"
    ]
    # The first two sets have five chunks each, and are not sampled again.
    committed, commit = [], Chunks.commit
    monkeypatch.setattr(Chunks, "commit", lambda *a: (committed.append(a), commit(*a))[1])
    outcome = call(*evaluating, *outputs)
    assert (outcome.status, outcome.out, len(committed)) == (0, shown, 10)
    assert Path("a.json").read_bytes() == Path("whole.json").read_bytes()
    assert Path("a.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert {path.name for path in Path().iterdir()} == {"a.json", "a.jsonl", "whole.json", "whole.jsonl"}


def test_an_evaluation_that_is_finished_is_shown_again(call, evaluating, monkeypatch):
    """After a kill between the naming of the output and the end of the command."""

    def killed(*arguments):
        raise KeyboardInterrupt

    shown = call(*evaluating).out
    with monkeypatch.context() as patch:
        patch.setattr(Job, "remove", killed)
        assert call(*evaluating, "--output", "a.json").status == 130
    monkeypatch.setattr(Chunks, "commit", killed)
    outcome = call(*evaluating, "--output", "a.json")
    assert (outcome.status, outcome.out) == (0, shown)
    assert [path.name for path in Path().iterdir()] == ["a.json"]


def test_results_say_what_they_were_measured_with(call, evaluating):
    call(*evaluating, "--output", "a.json", "--save-completions", "a.jsonl")
    content = json.loads(Path("a.json").read_text())
    assert content["versions"].keys() == {"minidpost", "python", "torch"}
    assert content["settings"]["seed"] == 42
    assert content["settings"]["temperature"] == 0.7
    result = content["results"][0]
    assert (len(result["correct"]), len(result["n_correct"]), len(result["majority"]["2"])) == (4, 4, 4)
    rows = read_rows("a.jsonl")
    assert len(rows) == 4 * (4 + 8)
    first = [row for row in rows if row["task"] == "toy/test"]
    kinds = [(row["kind"], row["example_index"], row["sample_index"]) for row in first]
    assert kinds == [("greedy", i, 0) for i in range(4)] + [("sampled", i, k) for i in range(4) for k in range(2)]
    assert [int(row["is_correct"]) for row in first[:4]] == result["correct"]


def test_a_question_that_is_too_long_claims_nothing(call, evaluating, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda *arguments: [datasets.Example("How? " * 3000, "1")])
    outcome = call(*evaluating, "--output", "a.json")
    assert outcome.status == 2
    assert "tokens; the limit is 1,024" in outcome.complaints[0]
    assert not list(Path().iterdir())


def entry(task: str, correct: list[int], **sampled) -> dict:
    """A part of what eval.py writes for one set."""
    return {"task": task, "calculator": True, "n": len(correct), "correct": correct, **sampled}


def test_differences_are_of_pairs(tmp_path):
    sampled = {"n_samples": 4, "pass_at": {"1": {}, "2": {}}, "majority": {"2": [1, 1, 0]}}
    after = entry("a", [1, 1, 0], n_correct=[4, 2, 0], **sampled)
    before = entry("a", [0, 1, 0, 1], n_correct=[2, 1, 0, 1], n_samples=2, majority={"2": [0, 1, 0, 1], "1": [0] * 4})
    found = differences(after, before)
    assert found["accuracy"] == asdict(paired_difference([0, 1, 0], [1, 1, 0]))
    assert found["accuracy"]["n"] == 3
    assert found["pass_at"]["1"] == asdict(paired_difference([1, 0.5, 0], [1, 0.5, 0]))
    assert found["pass_at"]["2"]["value"] == pytest.approx((0 + (5 / 6 - 1) + 0) / 3)
    assert found["maj_at"] == {"2": asdict(paired_difference([0, 1, 0], [1, 1, 0]))}
    assert differences(after, entry("a", [1, 1])) == {"accuracy": asdict(paired_difference([1, 1], [1, 1]))}


def test_the_difference_to_an_earlier_evaluation_and_to_a_run(call, knowing_model_dir, tiny_model_dir, monkeypatch):
    known = [datasets.Example(TOM, "7"), datasets.Example(MIA, "5")]
    monkeypatch.setattr(datasets, "load", lambda name, split, data_dir: known)
    flags = ["--split", "dev", "--max-new-tokens", 30, "--calculator", "on"]
    call("eval.py", "--checkpoint", tiny_model_dir, *flags, "--output", "tiny.json")
    outcome = call(
        "eval.py", "--checkpoint", knowing_model_dir, *flags, "--baseline", "tiny.json", "--output", "a.json"
    )
    line = re.compile(r"toy/dev \| on         \| 2         \| \+50\.0 \(−48\.0 to \+100\.0\)")
    assert line.search(outcome.out)
    assert json.loads(Path("a.json").read_text())["results"][0]["difference"]["accuracy"]["value"] == 0.5

    for name, content in {
        "config.json": {"settings": {"no_calculator": False}},
        "results.json": {"best_iteration": 1},
        "iteration-1/evaluation.json": {"sft": {"greedy": {"toy/dev": {"correct": [0, 0]}}}},
    }.items():
        Path("run", name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(Path("run", name), content)
    assert line.search(call("eval.py", "--checkpoint", knowing_model_dir, *flags, "--baseline", "run").out)

    # What cannot be compared is refused before anything is measured.
    known[0] = datasets.Example(TOM, "8")
    for flags_and_complaint in [
        ([*flags, "--baseline", "tiny.json"], "its questions of toy/dev are others than those measured now"),
        ([*flags[:-1], "off", "--baseline", "run"], "none of the tasks is in it; it has toy/dev with calculator on"),
        ([*flags, "--baseline", "none.json"], "--baseline none.json: cannot be read"),
        ([*flags, "--baseline", "run/config.json"], "a JSON file of eval.py --output"),
        ([*flags, "--baseline", "."], "cannot be read (results.json: No such file"),
    ]:
        outcome = call("eval.py", "--checkpoint", tiny_model_dir, *flags_and_complaint[0])
        assert (outcome.status, len(outcome.complaints)) == (2, 1)
        assert flags_and_complaint[1] in outcome.complaints[0]


# -- on a terminal ----------------------------------------------------------------------------------------------------


def pieces_of(template, token_ids: list[int], forced: list[bool], capsys) -> list[str]:
    """What is printed after each of these tokens, and at the end."""
    stream, pieces = sample_command.Stream(template), []
    for n in range(1, len(token_ids) + 1):
        stream.write(Row(0, Request((), ""), token_ids[:n], forced[:n]))
        pieces.append(capsys.readouterr().out)
    sample = Sample(0, 0, "", None, template.decode(token_ids), None, token_ids, forced, "stop")
    stream.end(sample)
    pieces.append(capsys.readouterr().out)
    sample_command.show([sample], template, with_questions=False)
    assert "".join(pieces) == capsys.readouterr().out
    return pieces


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_stream_prints_what_the_whole_would(family, tiny_template, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    directory = ROOT / "weights" / f"tiny-{family}"
    template = load_template(directory, None)
    rationale = "Tom pays $<<2*3=6>>6 for 3 - 1 = 2 pens.\nHe has $ -5 [left] <<7 left.\n#### 6"
    token_ids = template.target_ids(rationale)
    pieces = pieces_of(template, token_ids, [False] * len(token_ids), capsys)
    assert sum(map(bool, pieces)) > 8  # in pieces indeed
    # Whatever a model may write.
    random = Random(1)
    size = load_tokenizer(directory).vocab_size
    texts = (" [", "]", " $", " #", "####", " <<", ">>", " -", "5", "=")
    marks = [token_id for text in texts for token_id in template.target_ids(text)]
    for _ in range(60):
        ids = [random.choice(marks) if random.random() < 0.6 else random.randrange(size) for _ in range(25)]
        forced = [False]
        while len(forced) < len(ids):
            forced.append(not forced[-1] and random.random() < 0.4)  # what is forced never goes on after its end
        pieces_of(template, ids, forced, capsys)


def test_forced_tokens_stand_out_in_a_stream(call, knowing_model_dir, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    outcome = call("sample.py", TOM, "--checkpoint", knowing_model_dir, terminal=True)
    bold = f"{sample_command.BOLD}7{sample_command.PLAIN}"
    assert outcome.out == f"{TOM}\n    Tom has <<3+4={bold}>>7 apples.\n    #### 7\n"
    assert "%|" not in outcome.err  # no bar in between


def test_several_are_shown_in_order_as_they_end(tiny_template, capsys):
    order = [(1, 0), (0, 1), (0, 0), (2, 0), (1, 1), (2, 1)]
    ended, shown = [], []

    def samples():
        for i, k in order:
            ended.append((i, k))
            yield Sample(i, k, "", None, "", None, [], [], "stop")

    for sample in sample_command.in_order(samples(), 2):
        shown.append((sample_command.place(sample), len(ended)))
    assert shown == [((0, 0), 3), ((0, 1), 3), ((1, 0), 3), ((1, 1), 5), ((2, 0), 5), ((2, 1), 6)]


@pytest.mark.parametrize("end", ["\n", "", f"\n{TOM}\n"])
def test_one_question_after_another(call, knowing_model_dir, monkeypatch, end):
    """An empty line or the end of the input ends; a question that is too long does not."""
    loaded = []
    monkeypatch.setattr("minidpost.cli.load_model", lambda *a: (loaded.append(a), load_model(*a))[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{MIA}\n{'How? ' * 3000}\n{TOM}\n{end}"))
    outcome = call("sample.py", "--interactive", "--checkpoint", knowing_model_dir)
    answers = ["    " + KNOWN[question].replace("\n", "\n    ") for question in (MIA, TOM)]
    assert outcome.status == 0
    assert outcome.out.strip("\n") == "\n".join(answers).strip("\n")
    assert (len(loaded), len(outcome.complaints)) == (1, 1)
    assert "the limit is 1,024" in outcome.complaints[0]


def test_interactive_is_for_a_terminal_alone(call, tiny_model_dir):
    outcome = call("sample.py", "--interactive", "--output", "rows.jsonl", "--checkpoint", tiny_model_dir)
    assert outcome.status == 2
    assert "--interactive asks and answers on the terminal" in outcome.complaints[0]
