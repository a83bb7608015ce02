"""An answer in the form in which VQA accuracy compares answers: no punctuation, articles or capitals, numbers in digits.

    normalised("The Coca-Cola, two cans.")      # "coca cola 2 cans"

Source: the answer processor of the VQA challenge as LLaVA runs it (llava/eval/m4c_evaluator.py), slips included, since
published numbers have them: see PERIOD and _contractions.
"""

import re

ARTICLES = ("a", "an", "the")
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Meant to spare decimal points; the look-behind is misspelt there, so that every full stop without a digit behind it goes.
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # at most: the flag re.UNICODE is handed over there as the number of replacements
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _contractions() -> dict[str, str]:
    """Words that lack one apostrophe, to the words that they stand for; one entry of the table runs the other way."""
    lacking = {
        word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS for at, c in enumerate(word) if c == "'"
    }
    return lacking | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def normalised(answer: str) -> str:
    """The answer as it is compared."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (NUMBERS.get(word, word) for word in _bare(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _bare(text: str) -> str:
    """Without punctuation: a mark beside a space anywhere in the text goes, one within words only becomes a space."""
    bare = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside else " ")
    return PERIOD.sub("", bare, count=PERIODS)
