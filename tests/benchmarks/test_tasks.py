"""Tasks are what they say: exact lengths, answers that a reader of the document finds, scores that tell them apart."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tasks.expected import Expected, Quoted, passage_steps, records, steps
from benchmarks.accuracy.tasks.session import Outputs, Session
from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang

CONTEXTS = (512, 4096, 16384)
PAGE = 32
FILLER_LINE = 64  # tokens: more than any line of filler has
every_task = pytest.mark.parametrize("name", TASKS)
one_document = pytest.mark.parametrize("name", [name for name in TASKS if name != "sections"])


def draw(name: str, context: int = 4096, seed: int = 0, count: int = 1) -> list[Session]:
    return TASKS[name].sessions(seed, count, context)


def document_of(session: Session) -> list[int]:
    """The first prompt up to the question."""
    prompt = session.turns[0].prompt
    marks = (lang.QUESTION, lang.COMMON, lang.INVENT)
    return prompt[: next(i for i, token in enumerate(prompt) if token in marks)]


def stored_records(document: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Position and content of each record, in the order in which they lie."""
    starts = [i for i, token in enumerate(document) if token == lang.RECORD]
    return [(i, tuple(document[i + 1 : document.index(lang.NEWLINE, i)])) for i in starts]


def asked_keys(prompt: list[int]) -> list[tuple[int, ...]]:
    """The keys after the marks `?` and `!` of a prompt."""
    keys: list[list[int]] = []
    for token in prompt[:-1]:
        if token in (lang.QUESTION, lang.INVENT):
            keys.append([])
        elif keys:
            keys[-1].append(token)
    return [tuple(key) for key in keys]


def read(contents: list[tuple[int, ...]], key: tuple[int, ...]) -> list[int]:
    """Look a key up as a reader of the text would, and follow pointers; there must be one record to find."""
    found = [content for content in contents if content[: len(key)] == key]
    if not found:  # the last word of a scattered passage
        return list(key)
    (content,) = found
    if content[-1] == lang.END:
        return list(content)
    pointer = content.index(lang.POINTER)
    return [*content[: pointer + 1], *read(contents, content[pointer + 1 :])]


def play(session: Session, rng: Random) -> Outputs:
    """What a perfect reader of the session's text outputs; it knows nothing of the scores."""
    document = document_of(session)
    contents = [content for _, content in stored_records(document)]
    outputs: Outputs = []
    for turn in session.turns:
        if lang.COMMON in turn.prompt:
            common = Counter(token for token in document if token != lang.NEWLINE).most_common(4)
            outputs.append([*(word for word, _ in common), lang.END])
        elif lang.INVENT in turn.prompt:
            (key,) = asked_keys(turn.prompt)
            contents.append((*key, *doc.draw_words(rng, rng.randint(2, 16)), lang.END))
            outputs.append(list(contents[-1]))
        else:
            outputs.append([token for key in asked_keys(turn.prompt) for token in read(contents, key)])
        assert len(outputs[-1]) <= turn.max_new_tokens
    return outputs


def scores(session: Session, outputs: Outputs) -> list[float]:
    return [value for turn in session.turns if turn.score for value in turn.score(outputs)]


@one_document
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prompts_and_answers_fill_the_context_to_the_token(name, context, seed):
    for session in draw(name, context, seed, count=3):
        assert sum(len(turn.prompt) + turn.max_new_tokens for turn in session.turns) == session.context == context


@pytest.mark.parametrize("context", CONTEXTS)
def test_inventions_of_any_length_fit_the_context(context):
    (session,) = draw("sections", context)
    longest = sum(len(turn.prompt) + turn.max_new_tokens for turn in session.turns)
    assert context - 40 < longest <= session.context == context


@every_task
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_reader_of_the_document_gets_every_reference(name, context):
    for session in draw(name, context, seed=3, count=5):
        values = scores(session, play(session, Random(0)))
        assert values
        assert set(values) == {1.0}


@every_task
def test_silence_and_a_backward_answer_score_low(name):
    for session in draw(name, count=3):
        outputs = play(session, Random(0))
        silent = [[] for _ in outputs]
        assert set(scores(session, silent)) == {0.0}
        if name != "common":  # in any order
            backward = [
                output[::-1] if turn.score else output for turn, output in zip(session.turns, outputs, strict=True)
            ]
            assert sum(scores(session, backward)) == 0


@one_document
def test_another_documents_answer_scores_nothing(name):
    mine, other = (draw(name, seed=seed)[0] for seed in (0, 1))
    assert sum(scores(mine, play(other, Random(0)))) == 0


def plain(sessions: list[Session]) -> list:
    return [[(turn.prompt, turn.max_new_tokens, turn.score) for turn in session.turns] for session in sessions]


@every_task
def test_a_seed_determines_sessions_and_a_larger_count_adds_to_them(name):
    assert plain(draw(name, 512, seed=5, count=9)) == plain(draw(name, 512, seed=5, count=9))
    assert plain(draw(name, 512, seed=5, count=9))[:2] == plain(draw(name, 512, seed=5, count=2))
    assert plain(draw(name, 512, seed=5)) != plain(draw(name, 512, seed=6))


@every_task
def test_names_and_groups_are_those_of_the_report(name):
    assert TASKS[name].name == name
    assert TASKS[name].group in ("lookup", "walk", "copy", "aggregate", "session", "generation")


@every_task
def test_a_context_that_is_too_short_is_refused(name):
    with pytest.raises(ValueError, match="pass 512 or more"):
        draw(name, context=511)


def test_lines_that_do_not_fit_are_refused():
    line = doc.Record((lang.FIRST_WORD,), doc.draw_words(Random(0), 20)).line()
    with pytest.raises(ValueError, match="do not fit a document of 60"):
        doc.place(Random(0), [line], [0.5], 60, others=[line, line])


@pytest.mark.parametrize("length", [2000, 2001])
def test_lines_lie_at_their_depths(length):
    rng = Random(0)
    lines = [[lang.RECORD, lang.FIRST_WORD + i, lang.NEWLINE] for i in range(40)]
    depths = doc.draw_depths(rng, 40)
    assert sorted(depths) == pytest.approx([i / 39 for i in range(40)])
    document = [token for line in doc.place(rng, lines, depths, length) for token in line]
    assert len(document) == length
    starts = {content[0]: start for start, content in stored_records(document)}
    for line, depth in zip(lines, depths, strict=True):
        late = starts[line[1]] - depth * (length - len(line))
        assert 0 <= late < FILLER_LINE


@pytest.mark.parametrize("name", ["single", "passage"])
def test_depths_are_spread_over_the_whole_document(name):
    starts = []
    for session in draw(name, count=80):
        document = document_of(session)
        ((start, content),) = stored_records(document)
        room = len(document) - len(content) - 2
        late = min(start - i / 39 * room for i in range(40) if start >= int(i / 39 * room))
        assert late < FILLER_LINE
        starts.append(start / room)
    assert len({round(start * 39) for start in starts}) > 25
    assert min(starts) < 0.1 < 0.9 < max(starts) <= 1


@pytest.mark.parametrize("name", ["single", "multikey", "multivalue", "multiquery", "spelled", "turns", "requests"])
def test_a_value_cannot_be_told_from_its_question(name):
    """The same first word of a key, the same question: other values in other documents."""
    values = []
    for session in draw(name, 512, count=60):
        key = asked_keys(session.turns[0].prompt)[0]
        (answer,) = [record for record in records(session.turns[0].score.answer) if record[: len(key)] == key]
        values.append(answer[len(key) :])
        assert set(values[-1]).isdisjoint(key) or len(values[-1]) > 1
    assert len(set(values)) >= 58


@one_document
def test_no_key_is_stored_twice(name):
    for session in draw(name, count=5):
        length = 1 if name == "scattered" else 2
        keys = [content[:length] for _, content in stored_records(document_of(session))]
        assert len(set(keys)) == len(keys)


def test_single_varies_filler_and_values():
    sessions = draw("single", 512, count=20)
    spelled = {any(letter in document_of(session) for letter in lang.LETTERS) for session in sessions}
    numbers = {any(digit in session.turns[0].score.answer for digit in lang.DIGITS) for session in sessions}
    assert spelled == numbers == {True, False}


@pytest.mark.parametrize("context", CONTEXTS)
def test_multikey_is_all_records_and_keys_look_alike(context):
    for session in draw("multikey", context, count=8):
        contents = [content for _, content in stored_records(document_of(session))]
        assert len(document_of(session)) - sum(len(content) + 2 for content in contents) < len(contents[0]) + 2
        firsts, seconds = (Counter(content[i] for content in contents) for i in (0, 1))
        alike = context**0.5 / 12
        assert sum(firsts.values()) / len(firsts) > alike
        assert sum(seconds.values()) / len(seconds) > alike


def test_multivalue_has_four_values_of_one_name_in_any_order():
    in_order = []
    for session in draw("multivalue", count=8):
        ((name, _),) = asked_keys(session.turns[0].prompt)
        wanted = records(session.turns[0].score.answer)
        stored = [content for _, content in stored_records(document_of(session)) if content[0] == name]
        assert len(wanted) == len(stored) == 4
        assert {record[0] for record in wanted} == {name}
        assert len({record[2:] for record in wanted}) == 4
        in_order.append([content[:2] for content in stored] == [record[:2] for record in wanted])
    assert not all(in_order)


def test_multiquery_asks_four_keys_and_reads_past_ends():
    (session,) = draw("multiquery")
    (turn,) = session.turns
    assert len(asked_keys(turn.prompt)) == 4
    assert turn.ignore_eos
    assert turn.score([records_joined(records(turn.score.answer)[:3])]) == [1, 1, 1, 0]


def records_joined(parts: list[tuple[int, ...]], mark: int = lang.END) -> list[int]:
    return [token for part in parts for token in (*part, mark)]


@pytest.mark.parametrize(("name", "least"), [("variables", 5), ("needles", 32), ("table", 48)])
def test_a_slip_of_a_walk_costs_one_record(name, least):
    (session,) = draw(name)
    score = session.turns[0].score
    walk = records(score.answer)
    assert least <= len(walk) <= 64
    dropped = [records_joined(walk[:2] + walk[3:], lang.POINTER)]
    assert score(dropped) == [1.0, 1.0, 0.0] + [1.0] * (len(walk) - 3)
    wrong = [records_joined([*walk[:2], (*walk[2][:2], walk[0][0]), *walk[3:]], lang.POINTER)]
    assert score(wrong) == score(dropped)
    assert sum(score([records_joined(walk[::-1], lang.POINTER)])) == 1
    assert sum(score([records_joined(walk[1::2], lang.POINTER)])) == len(walk) // 2


@pytest.mark.parametrize("name", ["variables", "needles"])
def test_walks_lie_in_any_order_among_other_chains(name):
    for session in draw(name, count=4):
        document = document_of(session)
        walk = [record[:2] for record in records(session.turns[0].score.answer)]
        stored = [content[:2] for _, content in stored_records(document)]
        assert [key for key in stored if key in walk] != walk
        assert len(stored) > 2 * len(walk)


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_table_is_stored_by_row_and_read_by_column_from_the_last(context):
    (session,) = draw("table", context)
    stored = stored_records(document_of(session))
    order = [record[:2] for record in records(session.turns[0].score.answer)]
    cells = [(start, content[:2], start + len(content) + 2) for start, content in stored if content[:2] in order]
    rows = list(dict.fromkeys(row for _, (row, _), _ in cells))
    columns = [column for _, (row, column), _ in cells if row == rows[0]]
    assert [key for _, key, _ in cells] == [(row, column) for row in rows for column in columns]
    assert order == [(row, column) for column in columns[::-1] for row in rows]
    for (_, key, end), (start, next_key, _) in pairwise(cells):
        assert (end == start) is (key[0] == next_key[0])


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("seed", range(4))
def test_every_word_of_a_scattered_passage_turns_a_page(context, seed):
    (session,) = draw("scattered", context, seed)
    stored = stored_records(document_of(session))
    page_of = {content[-1]: (start + len(content)) // PAGE for start, content in stored}
    passage = [token for token in session.turns[0].score.answer if token != lang.POINTER][1:]
    pages = [page_of[word] for word in passage]
    assert len(set(pages)) == len(pages) >= 8
    assert pages != sorted(pages)


@pytest.mark.parametrize(("context", "words"), [(512, 16), (4096, 128), (16384, 512)])
def test_a_passage_lies_in_one_piece(context, words):
    (session,) = draw("passage", context)
    ((_, content),) = stored_records(document_of(session))
    assert len(content) == 2 + words + 1
    assert len(session.turns[0].score([list(content)])) == words


def test_copied_words_count_where_they_follow_the_right_word():
    answer = [*range(500, 520), lang.END]
    score = Expected(answer, passage_steps, in_order=True)
    assert score([answer]) == [1.0] * 18
    assert score([[*answer[:9], 999, *answer[10:]]]) == [1.0] * 7 + [0.0, 0.0] + [1.0] * 9
    assert steps([500, lang.POINTER, 501, lang.POINTER, 502]) == [(500, 501), (501, 502)]
    rng = Random(0)
    long = rng.sample(range(1000, 2000), 512)
    assert sum(Expected(long, steps, in_order=True)([rng.sample(long, 512)])) < 8


def test_common_words_take_a_tenth_to_a_fifth_of_the_text():
    for session in draw("common", 16384, count=6):
        document = [token for token in document_of(session) if token != lang.NEWLINE]
        chosen = session.turns[0].score.answer[:-1]
        assert len(set(chosen)) == 4
        assert 0.09 < sum(token in chosen for token in document) / len(document) < 0.22
        assert session.turns[0].score([chosen[::-1]]) == [1.0] * 4
        assert session.turns[0].score([[chosen[0]] * 5]) == [1.0, 0.0, 0.0, 0.0]


def test_every_turn_asks_something_new_and_the_last_leads_to_the_first():
    (session,) = draw("turns")
    asked = [asked_keys(turn.prompt)[0] for turn in session.turns]
    assert len(set(asked)) == len(asked) == 5
    first, last = (records(session.turns[i].score.answer) for i in (0, -1))
    assert last[1:] == first
    assert all(turn.prompt[0] == lang.NEWLINE for turn in session.turns[1:])
    outputs = play(session, Random(0))
    outputs[2] = []
    assert [turn.score(outputs) for turn in session.turns] == [[1.0], [1.0], [0.0], [1.0], [1.0, 1.0]]


@pytest.mark.parametrize(("name", "share"), [("requests", 8), ("multikey", 4), ("single", 1)])
def test_requests_share_their_document_and_ask_for_other_records(name, share):
    sessions = draw(name, count=2 * share)
    documents = [tuple(document_of(session)) for session in sessions]
    assert len(set(documents[:share])) == len(set(documents[share:])) == 1
    assert documents[0] != documents[-1]
    assert len({asked_keys(session.turns[0].prompt)[0] for session in sessions}) == 2 * share


@pytest.mark.parametrize("context", [4096, 16384])
def test_facts_are_generated_and_asked_at_set_distances(context):
    (session,) = draw("sections", context)
    outputs = play(session, Random(1))
    lengths = [len(turn.prompt) + len(output) for turn, output in zip(session.turns, outputs, strict=True)]
    asked = [(i, turn.score) for i, turn in enumerate(session.turns) if turn.score]
    for i, (turn, score) in enumerate(asked):
        distance = sum(lengths[score.invented : turn])
        assert distance == pytest.approx(context / (16, 4, 2)[i // 4], rel=0.15)
        assert sum(map(len, outputs[score.invented : turn])) > 0.45 * distance
        assert session.turns[score.invented].temperature == 1
        assert session.turns[turn].temperature == 0
    assert len({score.invented for _, score in asked}) == len(asked) == 12


def test_a_quote_must_be_what_was_invented():
    key, score = (500, 501), Quoted((500, 501), invented=0, turn=1)
    fact = [*key, 7, 8, lang.END]
    assert score([fact, fact]) == score([fact[:-1], fact]) == [1.0]
    for invented, quoted in [
        (fact, [*key, 7, lang.END]),
        (fact, [*key, 8, 7, lang.END]),
        (fact, [*key, 7, 8, 9, lang.END]),
        ([*key, lang.END], [*key, lang.END]),
        ([500, 502, 7, lang.END], [500, 502, 7, lang.END]),
        ([], []),
    ]:
        assert score([invented, quoted]) == [0.0]


def test_a_value_counts_only_whole_and_after_its_key():
    record = doc.Record((500, 501), (600, 601))
    score = Expected(doc.answer([record]), records)
    assert score([[500, 501, 600, 601, lang.END]]) == score([[500, 501, 600, 601]]) == [1.0]
    for wrong in ([600, 601], [500, 501, 600], [500, 501, 601, 600], [500, 501, 600, 601, 602], [501, 500, 600, 601]):
        assert score([[*wrong, lang.END]]) == [0.0]
