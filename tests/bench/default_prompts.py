"""Writes the prompts that the default model's head is trained on: what people ask, in the forms of six kinds of tasks.

Run: python -m tests.bench.default_prompts --corpora FOLDER --measured FILE [FILE ...] --out prompts.jsonl
Then: foretoken build-trigram and train-ctc with --data prompts.jsonl (server/default_model/README.md tells the flags).

`--corpora` holds chat-*.jsonl.xz with {"messages": [...]} per line and books-*.txt.xz. `--measured` are the prompts and
references that drafters are measured on: no prompt that shares 8 words in a row with one of them is written.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

WORDS = 8
"""So many equal words in a row make two texts one."""
PASSAGE_CHARS = (500, 1600)


def listed(names: str) -> list[str]:
    return names.split(", ")


COUNTRIES = listed(
    "France, Japan, Brazil, Egypt, Canada, Kenya, Norway, India, Peru, Turkey, Spain, Vietnam, Poland, Chile, Morocco, "
    "Australia, Greece, Mexico, Thailand, Ireland, Nigeria, Finland, Argentina, Iran, Portugal, Cuba, Nepal, Hungary"
)
THINGS = listed(
    "the telephone, the steam engine, penicillin, the bicycle, paper, the printing press, dynamite, the light bulb, "
    "the microscope, the airplane, the camera, the computer mouse, the zipper, chess, basketball, the piano, coffee, "
    "the World Wide Web, the microwave oven, glass, the compass, vaccination, the elevator, the typewriter, radar"
)
PEOPLE = listed(
    "Marie Curie, Isaac Newton, Cleopatra, Napoleon, Mozart, Frida Kahlo, Nelson Mandela, Ada Lovelace, "
    "Charles Darwin, "
    "Jane Austen, Galileo Galilei, Amelia Earhart, Leonardo da Vinci, Mahatma Gandhi, Florence Nightingale, Socrates, "
    "Vincent van Gogh, Joan of Arc, Alan Turing, Rosa Parks, Confucius, Beethoven, Hypatia, Marco Polo, Queen Victoria"
)
BOOKS = listed(
    "Moby Dick, Frankenstein, War and Peace, Don Quixote, Dracula, The Hobbit, Hamlet, 1984, Jane Eyre, The Odyssey, "
    "Little Women, The Jungle Book, Ulysses, Les Miserables, Brave New World, Great Expectations, Treasure Island, "
    "The Stranger, The Metamorphosis, Lord of the Flies, The Old Man and the Sea, Emma, Peter Pan, Pinocchio"
)
QUESTIONS = (
    (COUNTRIES, "What is the capital of {}?", "What language do people speak in {}?", "Which countries border {}?",
     "When did {} become independent?", "What currency is used in {}?", "What is the highest mountain in {}?",
     "How many people live in {}?", "What food is {} known for?", "What is the longest river in {}?"),
    (THINGS, "Who invented {}?", "When was {} invented?", "How does {} work?", "Where was {} first used?",
     "Why is {} important?"),
    (PEOPLE, "Who was {}?", "When was {} born?", "Where did {} die?", "What is {} famous for?",
     "How did {} become famous?"),
    (BOOKS, "Who wrote {}?", "When was {} published?", "Who is the main character of {}?", "What is {} about?",
     "Where does the story of {} take place?", "Who plays the lead in the film of {}?"),
)  # fmt: skip
GERMAN = (
    ("Der Bürgermeister", "Die Polizei", "Ein Sprecher des Unternehmens", "Die Ministerin", "Der Verein",
     "Eine Gruppe von Forschern", "Die Gemeinde", "Der Trainer", "Das Gericht", "Die Zeitung"),
    ("erklärte am Montag", "teilte gestern mit", "betonte nach der Sitzung", "bestätigte in Berlin",
     "sagte im Gespräch mit unserer Redaktion", "wies darauf hin"),
    (", dass die neue Brücke im Frühjahr eröffnet wird .", ", dass die Kosten stärker gestiegen sind als erwartet .",
     ", dass niemand bei dem Unfall verletzt wurde .", ", dass viele Bürger den Plan unterstützen .",
     ", dass das Hotel nur wenige Minuten vom Bahnhof entfernt liegt .", ", dass es noch keine Entscheidung gibt .",
     ", dass die Zahl der Besucher um ein Drittel zugenommen hat .", ", dass das Spiel wegen des Regens ausfällt ."),
)  # fmt: skip
CODE = re.compile(r'^( *def (?!_)\w+\(.*\).*:\n +"""[^"]{30,400}""")', re.MULTILINE)
SUMMARISE = ("Summarize: {}", "Summarize the following text.\n\n{}", "Give a short summary of this: {}")


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """Every WORDS words in a row of a text; the whole of a shorter one."""
    words = re.findall(r"\w+", text.lower())
    for first in range(max(1, len(words) - WORDS + 1)):
        yield tuple(words[first : first + WORDS])


def lines(path: Path) -> Iterator[dict[str, object]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def first_words(corpora: Path, name: str) -> list[tuple[str, str]]:
    """(question, answer) of each dialogue of a corpus."""
    found = []
    for row in lines(corpora / f"chat-{name}.jsonl.xz"):
        messages: list[dict[str, str]] = row["messages"]  # type: ignore[assignment]
        if messages[0]["role"] == "user" and len(messages) > 1:
            found.append((messages[0]["content"].strip(), messages[1]["content"].strip()))
    return found


def passages(texts: list[str], stream: random.Random) -> Iterator[str]:
    """Pieces of texts, cut at the end of a sentence."""
    for text in texts:
        piece = text[: stream.randint(*PASSAGE_CHARS)]
        end = piece.rfind(". ") + 1
        if end >= PASSAGE_CHARS[0] // 2:
            yield piece[:end]


def candidates(corpora: Path, stream: random.Random) -> dict[str, list[str]]:
    """Prompts by kind, in random order, more than are taken."""
    assistants = first_words(corpora, "oasst_eval")
    answers: dict[str, list[str]] = {}
    for question, answer in assistants:
        if len(answer) > PASSAGE_CHARS[0]:
            answers.setdefault(question, []).append(answer)
    teacher = first_words(corpora, "gpteacher")
    with lzma.open(next(corpora.glob("books-*.txt.xz")), "rt", encoding="utf-8") as file:
        book = file.read(20_000_000)
    pages = [book[place : place + 1700] for place in range(5000, len(book) - 1700, 20_000)]
    with lzma.open(next(corpora.glob("misc-python*.txt.xz")), "rt", encoding="utf-8") as file:
        functions = CODE.findall(file.read())
    long_answers = [stream.choice(texts) for texts in answers.values() for _ in range(2)]
    stream.shuffle(long_answers)
    from_passages = []
    for question, texts in answers.items():
        if question.endswith("?") and len(question) < 200:
            for _ in range(2):
                chosen = list(passages(stream.sample(texts, min(2, len(texts))), stream))
                if chosen:
                    from_passages.append("\n".join([*chosen, question]))
    short = [form.format(name) for names, *forms in QUESTIONS for name in names for form in forms]
    kinds = {
        "question": sorted({question for question, _ in assistants}),
        "passage question": from_passages,
        "summary": [
            stream.choice(SUMMARISE).format(piece) for piece in passages([*long_answers, *pages], stream)
        ],
        "translation": [f"Translate German to English: {a} {b} {c}" for a, b, c in product(*GERMAN)],
        "role play and code": [question for question, _ in teacher],
        "word problem": [question for question, _ in first_words(corpora, "gsm8k_train")],
        "function": [f"Complete this function:\n\n{text}" for text in functions],
        "short question": short,
        "dialogue": sorted({question for question, _ in first_words(corpora, "oasst_human_trees")}),
    }  # fmt: skip
    for prompts in kinds.values():
        stream.shuffle(prompts)
    return kinds


SHARES = {
    "question": 1300, "passage question": 900, "summary": 1000, "translation": 350, "role play and code": 1900,
    "word problem": 1200, "function": 300, "short question": 700, "dialogue": 150,
}  # fmt: skip
"""At most so many of each kind."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--measured", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    stream = random.Random(14)
    measured = {run for path in arguments.measured for run in runs_of_file(path)}
    counts = {}
    with arguments.out.open("w", encoding="utf-8") as file:
        for kind, prompts in candidates(arguments.corpora, stream).items():
            kept = [text for text in dict.fromkeys(prompts) if measured.isdisjoint(runs(text))][: SHARES[kind]]
            counts[kind] = {"written": len(kept), "found": len(prompts)}
            for text in kept:
                file.write(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
    print(json.dumps(counts))


def runs_of_file(path: Path) -> Iterator[tuple[str, ...]]:
    """Of every text in a .jsonl file, however deep it lies."""
    waiting: list[object] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield from runs(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


if __name__ == "__main__":
    main()
