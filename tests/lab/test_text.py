import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.lab import text

PROMPT = text.render_messages([{"role": "user", "content": "Why is the sky blue?"}])


def said(prompt: str, seed: int = 0) -> str:
    return "".join(text.generate_text(prompt, model="m", seed=seed).tokens)


def test_the_same_prompt_gets_the_same_answer_and_another_gets_another() -> None:
    assert said(PROMPT) == said(PROMPT) != said(PROMPT, seed=1)
    assert said(PROMPT) != said(text.render_messages([{"role": "user", "content": "Why is the sky red?"}]))


@given(st.data())
def test_an_answer_cut_anywhere_is_continued_with_exactly_what_was_missing(data: st.DataObject) -> None:
    whole = said(PROMPT)
    cut = data.draw(st.integers(0, len(whole) - 1))
    messages = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": whole[:cut]}]
    assert said(text.render_messages(messages)) == whole[cut:]
    assert said(PROMPT + whole[:cut]) == whole[cut:]  # as a raw prompt too


def test_a_template_that_closes_the_turn_does_not_continue() -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the old"}]
    assert text.render_messages(messages, continues=False).endswith(f"<|im_end|>\n{text.ASSISTANT_MARK}")


def test_the_length_is_within_its_bounds_and_num_predict_cuts_it() -> None:
    for number in range(50):
        answer = text.generate_text(f"{number}{PROMPT}", model="m", length_range=(5, 9))
        assert 5 <= len(answer.tokens) <= 9
        assert answer.done_reason == "stop"
    cut = text.generate_text(PROMPT, model="m", num_predict=3)
    assert (len(cut.tokens), cut.done_reason) == (3, "length")


def test_a_stop_word_ends_the_answer_before_it() -> None:
    whole = text.generate_text(PROMPT, model="m")
    mark = whole.tokens[5].strip()
    first = "".join(whole.tokens).index(mark)
    stopped = text.generate_text(PROMPT, model="m", stop=(mark,))
    assert "".join(stopped.tokens) == "".join(whole.tokens)[:first]
    assert stopped.done_reason == "stop"


@pytest.mark.parametrize(
    ("content", "expected"),
    [("plain", "plain"), ([{"type": "text", "text": "a"}, {"type": "image_url"}], "a"), (None, ""), (7, "")],
)
def test_text_of_a_message(content: object, expected: str) -> None:
    assert text.content_text(content) == expected
