"""Which differences between models are real: paired by document, clustered, corrected for their number."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest

from minitron.errors import InputError
from minitron.evaluation import DocumentResult, Evaluated, Score
from minitron.evaluation.comparison import compare, comparison, setting_notes, with_tasks
from minitron.evaluation.estimates import replicates
from minitron.evaluation.result_file import ModelResults
from minitron.evaluation.uncertainty import score_error


def result(values, *, clusters=None, task="arc", fewshot=0):
    documents = tuple(
        DocumentResult(str(n), f"hash {n}", str(clusters[n] if clusters else n), {"acc,none": float(value)})
        for n, value in enumerate(values)
    )
    mean = statistics.fmean(values)
    score = Score(task, "acc", mean, None, len(values), fewshot, "1", "test", True, 10_000)
    return Evaluated(score, "none", (), documents)


def perplexities(log_likelihoods, words):
    """lm-eval's word_perplexity of documents, each with its number of words."""
    documents = tuple(
        DocumentResult(
            str(n), f"hash {n}", str(n), {"word_perplexity,none": total}, weights={"word_perplexity,none": count}
        )
        for n, (total, count) in enumerate(zip(log_likelihoods, words, strict=True))
    )
    value = math.exp(-sum(log_likelihoods) / sum(words))
    score = Score("pages", "word_perplexity", value, None, len(words), 0, "1", "test", False, 10_000)
    return Evaluated(score, "none", (), documents)


def of_two_tasks(large, small):
    """A group whose tasks count the same, of any size."""
    documents = tuple(
        DocumentResult(f"{task}/{n}", f"{task} {n}", f"{task}/{n}", {"acc,none": float(value)})
        for task, values in (("large", large), ("small", small))
        for n, value in enumerate(values)
    )
    value = (statistics.fmean(large) + statistics.fmean(small)) / 2
    score = Score("two", "acc", value, None, len(documents), 0, "1", "test", True, 10_000, None, 2)
    return Evaluated(score, "none", (), documents)


def of_pairs(answers, truth, measure=lambda pairs: statistics.correlation(*zip(*pairs, strict=True))):
    """A score that is a function of all documents together."""
    pairs = list(zip(truth, answers, strict=True))
    documents = tuple(DocumentResult(str(n), f"hash {n}", str(n), {}) for n in range(len(pairs)))
    score = Score("pairs", "mcc", measure(pairs), None, len(pairs), 0, "1", "test", True, 10_000)
    return Evaluated(score, "none", (), documents, (), replicates(measure, pairs, range(len(pairs))))


def model(name, **tasks):
    return ModelResults(name, "0" * 16, 1, "float32", "cpu", tasks)


def flipped(values, better, worse):
    """The answers of another model, which is right on `better` more of the documents and wrong on `worse` others."""
    wrong = [n for n, value in enumerate(values) if not value][:better]
    right = [n for n, value in enumerate(values) if value][:worse]
    return [1 if n in wrong else 0 if n in right else value for n, value in enumerate(values)]


BASE = [n % 2 for n in range(400)]


def test_a_difference_is_that_of_the_same_documents_with_their_own_error():
    (difference,) = compare([model("a", arc=result(BASE)), model("b", arc=result(flipped(BASE, 14, 2)))])
    changes = [1.0] * 14 + [-1.0] * 2 + [0.0] * 384
    assert difference.value == pytest.approx(12 / 400)
    assert difference.stderr == pytest.approx(statistics.stdev(changes) / 20)
    assert difference.interval[0] == pytest.approx(difference.value - 1.966 * difference.stderr, rel=1e-3)
    # 16 tosses of a coin with at most 2 or at least 14 heads
    assert difference.p_value == pytest.approx(2 * (1 + 16 + 120) / 2**16)
    assert difference.is_real
    assert difference.needed is None


@pytest.mark.parametrize(("count", "value"), [(4, 0), (400, 0), (4, 1)])
def test_models_that_are_alike_on_few_documents_are_not_known_to_be_alike(count, value):
    (difference,) = compare([model("a", arc=result([0] * count)), model("b", arc=result([value] * count))])
    # Agresti and Min: half a document more in each of the four combinations
    changed, surplus = 1 + value * count, value * count
    assert difference.stderr == pytest.approx(math.sqrt(changed - surplus**2 / (count + 2)) / (count + 2))
    low, high = difference.interval
    assert low < difference.value < high
    assert (high - low > 0.4) == (count == 4)


def test_what_is_not_real_says_how_many_documents_would_show_it():
    (difference,) = compare([model("a", arc=result(BASE[:60])), model("b", arc=result(flipped(BASE[:60], 6, 2)))])
    assert not difference.is_real
    times = difference.needed / 60
    assert times == pytest.approx((2.802 * difference.stderr / difference.value) ** 2, rel=0.01)
    # with as many documents of the same kind it is real in most repetitions
    draw = random.Random(3)
    shown = 0
    for _ in range(20):
        kinds = draw.choices([(1, 0), (0, 1), (1, 1)], weights=[2, 6, 52], k=difference.needed)
        before, after = zip(*kinds, strict=True)
        (again,) = compare([model("a", arc=result(before)), model("b", arc=result(after))])
        shown += again.is_real
    assert 11 <= shown <= 20


def of_subjects(values, num_subjects):
    """A group such as MMLU, with as many documents of each subject."""
    each = result(values, clusters=[n % num_subjects for n in range(len(values))])
    return replace(each, score=replace(each.score, num_clusters=num_subjects, num_tasks=num_subjects))


@pytest.mark.parametrize("spread", [0, 0.3])
def test_more_documents_of_the_same_subjects_do_not_reduce_what_differs_between_them(spread):
    """A model is better by 2 points in each of 40 subjects, or by 32 in half of them, and worse by 28 in the others."""
    draw = random.Random(2)

    def measured(documents):
        chances = [0.02 + (spread if n % 2 else -spread) for n in range(40)]
        changes = [draw.random() < abs(chances[n % 40]) and math.copysign(1, chances[n % 40]) for n in range(documents)]
        before = [0 if change > 0 else 1 for change in changes]
        after = [int(value + change) for value, change in zip(before, changes, strict=True)]
        subjects = [model(name, mmlu=of_subjects(values, 40)) for name, values in (("a", before), ("b", after))]
        passages = [
            model(name, mmlu=result(values, clusters=[n % 40 for n in range(documents)]))
            for name, values in (("a", before), ("b", after))
        ]
        return compare(subjects)[0], compare(passages)[0]

    subjects, passages = measured(1000) if spread else measured(200)
    assert not subjects.is_real
    assert subjects.stderr == passages.stderr
    assert not passages.unreachable  # there are others
    assert subjects.unreachable == bool(spread)
    if spread:
        assert subjects.fixed_stderr == pytest.approx(0.3 / math.sqrt(40), rel=0.2)
        assert not measured(20_000)[0].is_real
    else:
        assert 200 < passages.needed <= subjects.needed < 2 * passages.needed


def test_many_comparisons_are_corrected():
    other = flipped(BASE, 12, 3)
    (alone,) = compare([model("a", arc=result(BASE)), model("b", arc=result(other))])
    assert 0.05 > alone.p_value > 0.05 / 9
    nine = {f"t{n}": result(BASE, task=f"t{n}") for n in range(9)}
    others = {f"t{n}": result(other, task=f"t{n}") for n in range(8)} | {"t8": result(flipped(BASE, 30, 0), task="t8")}
    differences = compare([model("a", **nine), model("b", **others)])
    assert [each.task for each in differences if each.is_real] == ["t8"]
    assert differences[0].adjusted == pytest.approx(8 * alone.p_value)
    assert differences[8].adjusted == pytest.approx(9 * differences[8].p_value)


def test_documents_that_belong_together_count_once():
    """14 questions on one passage that one model understands are one piece of evidence."""
    other = flipped(BASE, 14, 0)
    clusters = [0 if a != b else n for n, (a, b) in enumerate(zip(BASE, other, strict=True), start=1)]
    together = [model("a", arc=result(BASE, clusters=clusters)), model("b", arc=result(other, clusters=clusters))]
    assert not compare(together)[0].is_real
    assert compare([model("a", arc=result(BASE)), model("b", arc=result(other))])[0].is_real


def test_perplexities_are_compared_with_the_error_of_a_ratio():
    draw = random.Random(7)
    words = [draw.randint(20, 400) for _ in range(300)]
    per_word = [draw.gauss(-3, 0.3) for _ in words]  # how hard a page is, for both models
    one = [count * rate for count, rate in zip(words, per_word, strict=True)]
    other = [count * (rate + 0.02 + draw.gauss(0, 0.05)) for count, rate in zip(words, per_word, strict=True)]
    before, after = perplexities(one, words), perplexities(other, words)
    (difference,) = compare([model("a", pages=before), model("b", pages=after)])
    assert difference.value == pytest.approx(after.score.value - before.score.value)
    assert difference.is_real
    drawn = [draw.choices(range(300), k=300) for _ in range(400)]

    def perplexity(totals, pages):
        return math.exp(-sum(totals[n] for n in pages) / sum(words[n] for n in pages))

    again = [perplexity(other, pages) - perplexity(one, pages) for pages in drawn]
    assert difference.stderr == pytest.approx(statistics.stdev(again), rel=0.15)
    # the pages' difficulty, which both models have in common, is ten times as large
    assert score_error(before.values(), range(300)) > 4 * difference.stderr


def test_a_group_whose_tasks_count_the_same_is_compared_task_by_task():
    large, small = BASE[:300], [1] * 15 + [0] * 5
    before = of_two_tasks(large, small)
    after = of_two_tasks(flipped(large, 9, 3), flipped(small, 2, 1))
    (difference,) = compare([model("a", two=before), model("b", two=after)])
    assert difference.value == pytest.approx((6 / 300 + 1 / 20) / 2)
    parts = [[1] * 9 + [-1] * 3 + [0] * 288, [1] * 2 + [-1] + [0] * 17]
    errors = [statistics.stdev(part) / math.sqrt(len(part)) for part in parts]
    assert difference.stderr == pytest.approx(math.hypot(*errors) / 2, rel=0.03)


def test_other_scores_are_compared_by_drawing_the_same_documents_for_both():
    draw = random.Random(11)
    truth = [draw.random() < 0.5 for _ in range(400)]
    answers = [right if draw.random() < 0.6 else not right for right in truth]
    better = [right if draw.random() < 0.3 else answer for answer, right in zip(answers, truth, strict=True)]
    (difference,) = compare([model("a", pairs=of_pairs(answers, truth)), model("b", pairs=of_pairs(better, truth))])
    assert difference.is_real
    low, high = difference.interval
    assert low < difference.value < high
    (none,) = compare([model("a", pairs=of_pairs(answers, truth)), model("b", pairs=of_pairs(answers, truth))])
    assert (none.value, none.stderr, none.is_real) == (0, 0, False)


def test_a_task_that_cannot_be_compared_is_named_and_the_others_are_compared():
    old = replace(of_pairs(BASE, BASE[::-1]), replicates=())  # of an earlier version
    first, second = model("a", arc=result(BASE), pairs=old), model("b", arc=result(BASE), pairs=old)
    assert [each.task for each in compare([first, second])] == ["arc"]
    (sentence,) = comparison([first, second]).not_compared
    assert sentence.startswith("pairs of b is not compared: mcc is no mean over documents")
    with pytest.raises(InputError, match="pairs of b is not compared"):
        compare(with_tasks([first, second], ["pairs"]))
    with pytest.raises(InputError, match="task 'piqa': no model has results of it") as refused:
        with_tasks([first, second], ["piqa"])
    assert refused.value.remedy == "use arc, pairs"


def test_other_settings_and_other_documents_are_refused():
    reference = model("a", arc=result(BASE))
    with pytest.raises(InputError, match="a has num_fewshot 0, but b has 5"):
        compare([reference, model("b", arc=result(BASE, fewshot=5))])
    shifted = result(BASE)
    others = tuple(DocumentResult(d.id, d.hash + "x", d.cluster, d.values) for d in shifted.documents)
    with pytest.raises(InputError, match="only 0 of the 400 documents of b are among the 400 of a"):
        compare([reference, model("b", arc=Evaluated(shifted.score, "none", (), others))])
    with pytest.raises(InputError, match="no task in common"):
        compare([reference, model("b", other=result(BASE))])
    # the first 50 documents of a limited evaluation are compared with the same ones of the other
    (difference,) = compare([reference, model("b", arc=result(BASE[:50]))])
    assert (difference.num_documents, difference.value, difference.p_value) == (50, 0, 1)


def test_models_that_were_asked_in_different_ways_are_refused_or_pointed_out():
    def asked(name, template, used, dtype="float32"):
        settings = {"arc": {"chat_template": used}}
        return replace(model(name, arc=result(BASE)), chat_template=template, settings=settings, dtype=dtype)

    plain, chatted = asked("base", None, False), asked("instruct", "a1", True)
    for pair in ([plain, chatted], [chatted, plain]):
        with pytest.raises(InputError, match="task 'arc': instruct was asked with its chat template, base without"):
            compare(pair)
    other = asked("student", "b2", True, dtype="bfloat16")
    assert len(compare([chatted, other])) == 1
    (note,) = setting_notes([chatted, other])
    assert note.startswith("instruct and student differ in settings: dtype float32 and bfloat16; chat templates")
    assert note.endswith("so other prompts in arc")
    assert setting_notes([chatted, chatted]) == []
    # a template that was not used changes nothing
    assert setting_notes([plain, asked("instruct", "a1", False)]) == []


def test_prompts_that_differ_are_pointed_out():
    def asked(prompts, examples):
        whole = result([1, 0, 1], fewshot=5)
        documents = tuple(replace(each, prompt=prompt) for each, prompt in zip(whole.documents, prompts, strict=True))
        return replace(whole, documents=documents, score=replace(whole.score, examples=examples))

    first = model("a", arc=asked("xyz", "train"))
    (note,) = setting_notes([first, model("b", arc=asked("xYZ", "validation"))])
    assert note == (
        "a and b differ in settings: other prompts for 2 of 3 documents of arc (examples of train and validation)"
    )
    assert setting_notes([first, first]) == []
    # an earlier version noted no prompts
    assert setting_notes([first, model("b", arc=asked(["", "", ""], None))]) == []


def test_models_are_compared_on_a_task_that_the_first_one_lacks():
    first = model("a", arc=result(BASE))
    second = model("b", arc=result(BASE), piqa=result(BASE, task="piqa"))
    third = replace(second, model="c", dtype="bfloat16", tasks={"piqa": result(flipped(BASE, 20, 0), task="piqa")})
    found = compare([first, second, third])
    assert [(each.task, each.reference, each.model) for each in found] == [("arc", "a", "b"), ("piqa", "b", "c")]
    assert found[1].value == 20 / 400
    assert setting_notes([first, second, third]) == ["b and c differ in settings: dtype float32 and bfloat16"]
