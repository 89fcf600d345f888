"""Invalid input files and output paths: the part of `bad_input_cases` about files."""

from __future__ import annotations

from tests.helpers.bad_input_words import BASE, WORKING, Case, table

# --------------------------------------------------------------------------------------------------- settings in files

_SETTINGS = """
nowhere.yaml :: there is no file nowhere.yaml
folder.yaml :: folder.yaml is not a file
empty.yaml :: empty.yaml holds no settings
binary.yaml :: binary.yaml is not UTF-8
utf16.yaml :: utf16.yaml is not UTF-8
latin1.yaml :: latin1.yaml is not UTF-8
gzip.yaml :: gzip.yaml is not UTF-8
deep.yaml :: deep.yaml has too many levels
levels.yaml :: unknown option 'a.a.a
long.yaml :: long.yaml has more than 131,072 bytes
aliases.yaml :: aliases are not supported: write the value
many.yaml :: unknown option 'x'
self.yaml :: aliases are not supported
tag.yaml :: tag.yaml:1 is not valid YAML
list.yaml :: list.yaml holds no settings
scalar.yaml :: scalar.yaml holds no settings
null.yaml :: null.yaml holds no settings
tab.yaml :: tab.yaml:2 is not valid YAML
twice.yaml :: twice.yaml:2 is not valid YAML: 'seed' is given twice
again.yaml :: cannot name another
number-key.yaml :: is not the name of a setting
dots.yaml :: dots.yaml:3 is not valid YAML
"""
_EACH = ("binary", "aliases", "tag", "list")  # to each command; the rest to two
SETTINGS = [
    Case(f"{words} --config {case.words}", 2, case.answer)
    for name, words in WORKING.items()
    for case in table(2, _SETTINGS)
    if name in ("train", "generate") or case.words.removesuffix(".yaml") in _EACH
]
SETTINGS += table(
    2,
    """
train --config no-group.yaml :: training must have settings under it, not 3
train --config unknown.yaml :: did you mean 'model.num_experts'
train --config type.yaml :: training.max_steps must be a whole number or null, not 'soon'
generate --config unknown.yaml :: model must be text or null, not
""",
)

# --------------------------------------------------------------------------------------------------- files of names

_NAMES = """
empty.txt :: no card names in it
blank.txt :: no card names in it
binary.txt :: binary.txt:1: not UTF-8
utf16.txt :: give 200 names or more
latin1.txt :: latin1.txt:2: not UTF-8
gzip.txt :: gzip.txt:1: not UTF-8
xz.txt :: xz.txt:1: not UTF-8
nul.txt :: nul.txt:1: not UTF-8
long.txt :: long.txt:1: a line of more than
long-name.txt :: long-name.txt:1: 499 characters are not a card name
folder.txt :: folder.txt is a folder
few.txt :: give 200 names or more
nowhere.txt :: no file nowhere.txt
empty.csv :: no card names in it
binary.csv :: binary.csv:1: not UTF-8
latin1.csv :: latin1.csv:2: not UTF-8
zip.csv :: zip.csv:1: not UTF-8
unnamed.csv :: unnamed.csv:1: no column 'name'
numbers.csv :: numbers.csv:1: no column 'name' in the heading (idProduct, groupCount, price): product numbers
script.txt :: script.txt:1: this is a card script of Forge
page.txt :: page.txt:1: this is XML or HTML
cards.xml :: cards.xml is XML
ragged.csv :: ragged.csv:2: 1 cells
quote.csv :: quote.csv
empty.json :: no card names in it
binary.json :: not UTF-8
object.json :: expected an array
number.json :: expected an array
half.json :: half.json:1: not JSON
deep.json :: deep.json: not the JSON of a card
long.json :: long.json:1: not JSON
empty.jsonl :: no card names in it
bad.jsonl :: bad.jsonl:2: not JSON
number.jsonl :: number.jsonl:1: expected a name or a card
nameless.jsonl :: nameless.jsonl:1: a card needs a name
nested.jsonl :: nested.jsonl:1: a card needs a name
surrogate.jsonl :: surrogate.jsonl:1: half a character
digits.jsonl :: digits.jsonl:1: not the JSON of a card
deep.jsonl :: deep.jsonl:1: not the JSON of a card
latin1.jsonl :: latin1.jsonl:
long.yaml :: cards are read from .csv
"""
_LISTS = """
nowhere.txt :: cannot read the names in nowhere.txt
names.txt/x :: cannot read the names
folder.txt :: it is a folder
empty.txt :: has no names
blank.txt :: has no names
binary.txt :: binary.txt:1: not UTF-8
long.txt :: long.txt:1: a line of more than
long-name.txt :: 499 characters are not a card name
/dev/zero :: a line of more than
"""
FILES = table(1, _NAMES, "prepare --source ")
FILES += table(1, _LISTS, "evaluate models/base --names ") + table(1, _LISTS, "inspect models/moe --names ")

# --------------------------------------------------------------------------------------------------------- the output

_FOLDERS = """
'' :: --out is empty: give the name of a folder
names.txt :: is not a directory
names.txt/new :: names.txt is not a directory
/dev/null :: is not a directory
models/base :: models/base is
"""
_OUTPUTS = """
'' :: --out is empty: give the name of a file
folder.txt :: is a directory
names.txt/new{suffix} :: names.txt is not a directory
/dev/null :: is not a regular file
"""
OUTPUT = [
    Case(f"{words} {case.words}", 1, case.answer)
    for words in ("prepare --source names.txt --out", "upcycle models/base --out", "export dense models/moe --out")
    for case in table(1, _FOLDERS)
]
OUTPUT += [
    Case(f"{words} {case.words}".replace("{suffix}", suffix), 1, case.answer)
    for words, suffix in {
        "compare models/base --out": ".html",
        "inspect models/moe --out": ".html",
        f"generate {BASE} --out": ".txt",
        "plot models/base --out": ".png",
    }.items()
    for case in table(1, _OUTPUTS)
]
OUTPUT += table(
    1,
    """
compare models/base --out report.json :: must not end in .json
inspect models/moe --out report.JSON :: must not end in .json
compare models/base --png names.txt :: is not a directory
export dense models/moe --out models/moe :: is the model that is read
benchmark moe --out nowhere/m.json :: no folder nowhere
benchmark moe --out folder.txt :: is a directory
benchmark moe --plot /dev/null :: is not a regular file
""",
)

FILE_CASES = [*SETTINGS, *FILES, *OUTPUT]
